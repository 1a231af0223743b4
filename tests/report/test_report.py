"""Reports: text for people, JSON for machines, one HTML file for looking."""

import json
import math
import re
import time

import pytest

from rewriter import ArtifactError, Certificate, ConfigError, Miss, Report, optimize
from rewriter.cost.cost import Cost
from rewriter.report.html import render_html
from rewriter.report.json import report_from_json
from rewriter.report.report import Coverage, Step
from rewriter.report.side_by_side import readable, side_by_side
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


def test_side_by_side_folds_what_did_not_change():
    before = [f"line {i}" for i in range(100)]
    after = [*before[:50], "new", *before[51:]]
    blocks = side_by_side(before, after)
    assert [b.kind for b in blocks] == ["folded", "same", "change", "same", "folded"]
    assert sum(len(b.rows) for b in blocks if b.kind != "folded") == 7
    (row,) = blocks[2].rows
    assert (row.left_number, str(row.left), row.right_number, row.right) == (51, LINE_50, 51, "new")


LINE_50 = 'line <i class="n">50</i>'


def test_side_by_side_of_equal_texts_is_empty():
    assert side_by_side(["a", "b"], ["a", "b"]) == []
    assert side_by_side([], []) == []


def test_side_by_side_numbers_insertions_and_deletions():
    blocks = side_by_side(["a", "b", "c"], ["a", "c", "d"])
    kinds = {b.kind: b.rows[0] for b in blocks if b.kind != "same"}
    assert (kinds["delete"].left_number, kinds["delete"].right_number) == (2, None)
    assert (kinds["insert"].left_number, kinds["insert"].right_number) == (None, 3)


def test_lines_that_are_alike_have_their_difference_marked():
    (block,) = side_by_side(["y = rewriter.attention(q)"], ["y = rewriter.grouped_attention(q)"])
    (row,) = block.rows
    assert row.right == "y = rewriter.<mark>grouped_</mark>attention(q)"
    assert row.left == "y = rewriter.attention(q)"


def test_code_in_a_diff_is_escaped():
    blocks = side_by_side(["x = '<b>'"], ["completely & <i>different</i> text of another length"])
    (row,) = blocks[0].rows
    assert "<b>" not in row.left
    assert "&amp; &lt;i&gt;" in row.right


def test_a_comment_stays_with_the_code_below_it():
    comment = "# model.py:1 forward: x"
    before = [comment, "a = 1", comment, "b = 2"]
    after = [comment, "b = 2"]
    blocks = side_by_side(before, after)
    assert [(b.kind, len(b.rows)) for b in blocks] == [("delete", 2), ("same", 2)]


def test_readable_drops_what_only_the_interpreter_needs():
    lines = readable("        x = torch.ops.aten.add(a, b);  a = b = None\n        w = self.weight")
    assert lines == ["    x = aten.add(a, b)"]


def test_readable_shortens_where_a_line_comes_from():
    frame = "        # File: /usr/lib/site-packages/models/llama.py:7 in forward, code: x = y"
    assert readable(f"{frame}\n        x = y") == [
        "    # models/llama.py:7 forward: x = y",
        "    x = y",
    ]
    assert readable(f"{frame}\n        w = self.w\n{frame}\n        x = y")[0].startswith(
        "    # models"
    )
    assert len(readable(f"{frame}\n        w = self.w\n{frame}\n        x = y")) == 2


def _large_report(layers):
    """A report as of a model with many layers, each of which was rewritten."""
    code = "\n".join(
        f"        # File: /m/llama.py:{line} in forward, code: y = f(x)\n"
        f'        y_{layer}_{line}: "f32[s0, s1, 64]" = torch.ops.aten.add.Tensor(x_{layer}, {line})'
        for layer in range(layers)
        for line in range(70)
    )
    before = f"def forward(self, x):\n{code}"
    after = before.replace("_7: ", "_7_new: ").replace("_9: ", "_9_new: ")
    certificate = Certificate("p", "exact", "layer 0", "a#0", "m.py:1", status="applied")
    steps = [Step(f"step {i}", before, after, (certificate,) * layers) for i in range(4)]
    return Report("large", certificates=[certificate] * layers, steps=steps)


def test_a_page_for_24_layers_is_small_and_quick():
    report = _large_report(24)
    started = time.perf_counter()
    page = render_html(report)
    assert time.perf_counter() - started < 20
    assert len(page) < 5_000_000


def test_numbers_json_does_not_have_survive():
    certificate = Certificate(
        "p",
        "exact",
        "layer 0",
        "a#0",
        "m.py:1",
        status="rolled_back",
        implementation_error=math.inf,
        method_error={"kl_mean": math.nan},
        cost_before=Cost(1, 2, 3),
    )
    text = json.dumps(Report("m", certificates=[certificate]).to_json(), allow_nan=False)
    (read,) = report_from_json(json.loads(text)).certificates
    assert read.implementation_error == math.inf
    assert math.isnan(read.method_error["kl_mean"])
    assert read.cost_before == certificate.cost_before


@pytest.mark.parametrize(
    "stored", [[], {"schema": 1}, {"schema": 2}, None, {"schema": 1, "misses": 3}]
)
def test_a_damaged_report_is_refused(stored):
    with pytest.raises(ArtifactError, match="report"):
        report_from_json(stored)


def test_misses_are_in_the_text_and_on_the_page():
    misses = [
        Miss("raise-rope", "expected <cos>", "mul_3", "m.py:7 in f", blocked_by=("add", "sub"))
    ]
    report = Report("m", misses=misses * 3, coverage=(Coverage("rope", 0, 3),))
    assert "raise-rope  3x  expected <cos>  mul_3 at m.py:7 in f" in str(report)
    page = render_html(report)
    assert "expected &lt;cos&gt;" in page
    assert "0 of 3 operators raised" in page
    assert "← add ← sub" in page


def test_undone_rewrites_are_said_everywhere():
    undone = Certificate(
        "p{a=1}", "approximate", "layer 3 attention", "a#3", "m.py:1", "rolled_back", "too far"
    )
    report = Report("m", certificates=[undone])
    assert "too far" in str(report).split("undone")[1]
    page = render_html(report)
    assert "1 undone" in page and "rolled back" in page and "too far" in page


def test_an_empty_report_renders():
    assert "model" in str(Report("m"))
    assert "Everything that was looked for matched." in render_html(Report("m"))
