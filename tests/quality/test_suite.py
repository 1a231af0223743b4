"""Whole runs on a tiny random model: what must hold whatever the model knows."""

from __future__ import annotations

import json

import pytest

from codegen.cpp_kernels.compiler import find_compiler
from rewriter.errors import ConfigError, InputError, ModelError
from rewriter.quality import measure
from rewriter.quality.accuracy import draw_samples, grade
from rewriter.quality.encoding import Encoding
from rewriter.quality.measure import measure_quality
from rewriter.quality.plots import draw
from rewriter.quality.sources import read_source
from rewriter.quality.suite import Settings
from rewriter.quality.tasks import TASKS
from tests.quality.conftest import make_tokenizer, tiny_llama

STREAMING = "streaming-llm{num_sink_tokens=2}"
SMALL = {"length": 96, "rows": 1, "samples": 2, "questions": 2, "written": 16, "seeds": (0, 1)}


def measured(model, tokenizer, **changes):
    settings = Settings(**{"tasks": ("retrieval",), "texts": ("sentences",), **SMALL})
    return measure_quality(
        model, tokenizer, **{"passes": [STREAMING], "settings": settings, **changes}
    )


@pytest.fixture(scope="module")
def report(model, tokenizer):
    return measured(model, tokenizer, densities=(0.25, 1.0))


def test_every_method_stands_beside_its_controls(report):
    assert [r.label for r in report.results] == [
        "dense",
        "streaming-llm{num_sink_tokens=2,recent_window=22}",
        "random-entries{num_random=18,recent_window=6} (random)",
        "streaming-llm{num_sink_tokens=0,recent_window=24} (recent-only)",
        "streaming-llm{num_sink_tokens=2,recent_window=94}",
    ]
    assert not any(r.undone for r in report.results)


def test_controls_take_the_bytes_of_the_method(report):
    for source in ("sentences", "retrieval"):
        assert len({r.state_bytes[source] for r in report.results[1:4]}) == 1


def test_the_original_is_at_no_distance_from_itself(report):
    dense = report.results[0]
    for fidelity in dense.fidelity.values():
        assert fidelity.kl_mean == fidelity.kl_p99 == 0 and fidelity.agreement == 1
        assert fidelity.perplexity == fidelity.original_perplexity
        assert fidelity.common_prefix == 16
        assert set(fidelity.by_distance) == {"before"}


def test_with_everything_kept_the_picture_ends_at_dense(report):
    dense, small, whole = (report.results[i] for i in (0, 1, 4))
    for source, fidelity in whole.fidelity.items():
        assert fidelity.kl_mean < 1e-9 and fidelity.agreement == 1
        assert fidelity.mass == pytest.approx(dense.fidelity[source].mass)
        assert small.fidelity[source].kl_mean > 1e-3
        assert small.fidelity[source].mass.variant < small.fidelity[source].mass.oracle < 1
    for modes in whole.accuracy.values():
        for accuracy in modes.values():
            assert accuracy.difference.low == accuracy.difference.high == 0


def test_by_seed_and_by_position_average_to_the_whole(report):
    for fidelity in report.results[1].fidelity.values():
        assert sum(fidelity.by_seed.values()) / 2 == pytest.approx(fidelity.kl_mean)
        kl, agreement = zip(*fidelity.by_position.values(), strict=True)
        assert sum(kl) / 8 == pytest.approx(fidelity.kl_mean, rel=0.05)
        assert sum(agreement) / 8 == pytest.approx(fidelity.agreement, abs=0.02)


def test_the_same_seeds_give_the_same_numbers(model, tokenizer, report):
    again = measured(model, tokenizer, densities=(0.25,), controls=False)
    first, second = (r.to_json()["results"] for r in (report, again))
    assert json.dumps(second[1]) == json.dumps(first[1])


def test_other_seeds_give_others(model, tokenizer, report):
    settings = Settings(tasks=("retrieval",), **{**SMALL, "seeds": (7, 8)})
    other = measured(model, tokenizer, passes="default", settings=settings)
    mine, theirs = (r.results[0].fidelity["retrieval"] for r in (report, other))
    assert mine.perplexity != theirs.perplexity


def test_accuracies_are_compared_with_the_passes_asked_for(model, tokenizer):
    spec = "streaming-llm{num_sink_tokens=2,recent_window=22}"
    settings = Settings(tasks=("retrieval",), **SMALL)
    found = measured(
        model, tokenizer, passes=[spec], against=[spec], controls=False, settings=settings
    )
    assert [r.label for r in found.results] == [spec]
    assert found.results[0].fidelity["retrieval"].kl_mean > 0
    assert found.settings["against"] == spec


def test_the_picture_is_a_png_with_a_panel_for_each_measure(report):
    picture = draw(report)
    assert picture.startswith(b"\x89PNG")
    width, height = (int.from_bytes(picture[at : at + 4], "big") for at in (16, 20))
    assert width > 3 * 400 and height > 2 * 300  # two sources and two modes in rows of three


def test_samples_together_are_graded_like_samples_alone(optimized, tokenizer):
    encoding = Encoding(tokenizer, len(tokenizer))
    samples = draw_samples("people", encoding, 64, 4, 2, seed=0)
    for mode in ("multi-request", "multi-turn"):
        together = grade(optimized(), encoding, samples, [mode])[mode].right
        alone = [
            grade(optimized(), encoding, [sample], [mode])[mode].right[0] for sample in samples
        ]
        assert together == alone


def test_right_replies_are_graded_as_right(optimized, tokenizer, monkeypatch):
    encoding = Encoding(tokenizer, len(tokenizer))
    samples = draw_samples("arithmetic", encoding, 300, 3, 2, seed=0)
    texts = iter([[s.answers[turn] for s in samples] for turn in range(2)])

    def replies(session, logits, limit, ends):
        rows = next(texts)
        return [rows[0], rows[1][:-3], rows[2]]  # the second breaks off

    monkeypatch.setattr("rewriter.quality.accuracy.continue_greedily", replies)
    grades = grade(optimized(), encoding, samples, ["multi-request"])["multi-request"]
    assert grades.right == [[1, 1], [0, 0], [1, 1]]
    assert grades.held == [[None, None]] * 3


@pytest.mark.parametrize("name", ["retrieval", "tracking", "affixes"])
def test_evidence_is_where_the_context_says_what_is_asked_for(tokenizer, name):
    encoding = Encoding(tokenizer, len(tokenizer))
    for sample in draw_samples(name, encoding, 300, 4, 3, seed=0):
        for question, positions in zip(sample.sample.questions, sample.evidence, strict=True):
            told = [sample.context[position] for position in positions]
            parts = [encoding.ids(text) for text in question.evidence]
            assert sorted(told) == sorted(token for part in parts for token in part)
            assert encoding.ids(question.final)[0] in told


def test_what_a_cache_dropped_is_told_apart_from_what_it_kept(optimized, tokenizer):
    encoding = Encoding(tokenizer, len(tokenizer))
    samples = draw_samples("retrieval", encoding, 120, 3, 4, seed=1)
    passes = "streaming-llm{num_sink_tokens=2,recent_window=40}"
    grades = grade(optimized(passes), encoding, samples, ["multi-request"])["multi-request"]
    for sample, shares in zip(samples, grades.held, strict=True):
        turns = zip(sample.questions, sample.evidence, shares, strict=True)
        for question, positions, share in turns:
            length = len(sample.context) + len(question)
            kept = all(p < 2 or length - p <= 40 for p in positions)
            assert share == float(kept)
    found = {share for shares in grades.held for share in shares}
    assert found == {0.0, 1.0}
    dense = grade(optimized(), encoding, samples, ["multi-request"])["multi-request"]
    assert {share for shares in dense.held for share in shares} == {1.0}


@pytest.mark.parametrize("name", TASKS)
def test_samples_fill_the_length_they_were_asked_for(tokenizer, name):
    encoding = Encoding(tokenizer, len(tokenizer))
    drawn = draw_samples(name, encoding, 400, 10, 2, seed=3)
    assert all(200 < sample.length <= 400 for sample in drawn)
    assert all(len(sample.questions) == 2 for sample in drawn)
    with pytest.raises(ConfigError, match=f"length=.* is not allowed: at least .* {name}"):
        draw_samples(name, encoding, 12, 1, 2, seed=3)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"tasks": ("riddles",)}, ConfigError, "riddles.*retrieval"),
        ({"tasks": (), "texts": ()}, ConfigError, "at least one task or text"),
        ({"modes": ("shouting",)}, ConfigError, "shouting.*multi-turn"),
        ({"length": 0}, ConfigError, "length"),
        ({"samples": 0}, ConfigError, "samples"),
        ({"seeds": (1, 1)}, ConfigError, "different"),
        ({"length": 300}, ConfigError, "300.*256 positions"),
        ({"length": 12}, ConfigError, "at least about .* tokens"),
        ({"texts": ("missing.txt",)}, InputError, "missing.txt cannot be read"),
    ],
)
def test_settings_that_cannot_be_measured(model, tokenizer, changes, error, message):
    with pytest.raises(error, match=message):
        settings = Settings(**{**SMALL, "tasks": ("tracking",), **changes})
        measured(model, tokenizer, settings=settings)


def test_texts_that_are_empty_or_too_short(model, tokenizer, tmp_path):
    for content, message in (("  \n", "is empty"), ("the cat", "has 2 tokens; allowed: at least")):
        path = tmp_path / "text.txt"
        path.write_text(content)
        settings = Settings(tasks=(), texts=(path,), **SMALL)
        with pytest.raises(InputError, match=message):
            measured(model, tokenizer, settings=settings)


def test_one_field_of_json_lines_is_a_text(tokenizer, tmp_path):
    path = tmp_path / "problems.jsonl"
    lines = [{"question": f"the farmer has {n} coats .", "answer": n} for n in range(10, 99)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    encoding = Encoding(tokenizer, len(tokenizer))
    source = read_source(f"{path}:question", encoding, 40, 2, (0, 1))
    assert source.ids.shape == (4, 40) and source.seeds == (0, 0, 1, 1)
    words = set(tokenizer.decode(source.ids[0, 1:]).split())
    assert {"farmer", "coats"} <= words and "question" not in words
    with pytest.raises(InputError, match="line 1: no field 'text'"):
        read_source(f"{path}:text", encoding, 40, 2, (0, 1))


def test_a_tokenizer_of_another_model_is_refused(model, tokenizer):
    few = tiny_llama(50)
    with pytest.raises(ModelError, match="do not belong together"):
        measured(few, tokenizer)
    with pytest.raises(ModelError, match="does not know the words of retrieval"):
        measured(model, make_tokenizer(["a", "b"], bos_token="<s>", eos_token="\n"))


def test_densities_want_something_that_drops(model, tokenizer):
    with pytest.raises(ConfigError, match=r"density.*drops something"):
        measured(model, tokenizer, passes="default", densities=(0.5,))


@pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler")
def test_compiled_steps_measure_the_same(model, tokenizer, report, monkeypatch):
    monkeypatch.setattr(measure, "COMPILE_FROM", 1)
    compiled = measured(model, tokenizer, densities=(0.25,), controls=False)
    for mine, theirs in zip(compiled.results, report.results[:2], strict=True):
        assert mine.label == theirs.label
        for name in mine.fidelity:
            assert mine.fidelity[name].kl_mean == pytest.approx(
                theirs.fidelity[name].kl_mean, rel=1e-3, abs=1e-9
            )
    assert compiled.results[0].fidelity["retrieval"].kl_mean == 0
