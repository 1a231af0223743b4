"""Reports: text for people, JSON for machines, one HTML file for looking."""

import json
import re

import pytest

from rewriter import ConfigError, optimize
from rewriter.report.html import readable, render_html, side_by_side
from rewriter.report.json import report_from_json
from tests.small_lms import small_lm


@pytest.fixture(scope="module")
def report():
    return optimize(small_lm(), passes=["streaming-llm{recent_window=8}", "default"]).report


def test_json_round_trip(report):
    stored = json.loads(json.dumps(report.to_json()))
    assert report_from_json(stored).to_json() == report.to_json()


def test_text_names_what_was_done(report):
    text = str(report)
    assert "streaming-llm{recent_window=8}" in text
    assert re.search(r"attention +2/2 +causal", text)
    assert "top1_agreement" in text


def test_html_is_one_file_without_addresses(report, tmp_path):
    path = tmp_path / "report.html"
    report.to_html(path)
    page = path.read_text()
    assert "streaming_attention" in page
    assert not re.search(r'(src|href)="', page)
    assert "http" not in re.sub(r"https://arxiv\S*", "", page).replace("http-equiv", "")
    assert page.count('<section class="step">') == len(report.steps)
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_html_escapes_what_models_bring(report):
    import dataclasses

    marked = dataclasses.replace(report, model="<script>alert(1)</script>")
    assert "<script>alert" not in render_html(marked)


def test_an_unwritable_file_is_an_error(report, tmp_path):
    with pytest.raises(ConfigError, match="html"):
        report.to_html(tmp_path / "missing" / "report.html")


def test_side_by_side_collapses_what_did_not_change():
    before = [f"line {i}" for i in range(100)]
    after = [*before[:50], "new", *before[51:]]
    rows = side_by_side(before, after)
    assert len(rows) < 12
    assert [(r.left, r.right) for r in rows if r.kind == "change"] == [("line 50", "new")]


def test_readable_drops_what_only_the_interpreter_needs():
    lines = readable("        x = torch.ops.aten.add(a, b);  a = b = None\n        w = self.weight")
    assert lines == ["    x = aten.add(a, b)"]
