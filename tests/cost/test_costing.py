"""Passes and backends under a cost model."""

from __future__ import annotations

import json

import pytest
import torch

from passes.grouped_attention import GroupedAttention
from passes.int8_weights import Int8Weights
from passes.streaming_llm import StreamingLLM
from rewriter import lowering, optimize
from rewriter.cost import costing
from rewriter.cost.context import current, on_backend, predict
from rewriter.cost.model import Estimate
from rewriter.cost.roofline import Ceilings, Roofline
from rewriter.cost.step import predict_backends, step_works
from rewriter.cost.work import Work, linear_work, total
from rewriter.report.json import report_from_json
from rewriter.verify.certify import unverified_certificates
from tests.passes.derived import prepared, rewritten
from tests.small_lms import small_lm

ROOFLINE = Roofline(Ceilings("test", 2, bandwidth=10e9, flops=100e9, overhead=1e-6))


class Told:
    """A model whose times are given by operator or by backend."""

    name = "told"

    def __init__(self, spread: float = 1.01, unsure: str = "", **seconds: float) -> None:
        self.spread, self.unsure, self.seconds = spread, unsure, seconds

    def estimate(self, work: Work, backend: str) -> Estimate:
        found = self.seconds.get(work.operator, self.seconds.get(backend, 1.0))
        return Estimate(found, found / self.spread, found * self.spread, self.unsure)


def test_outside_of_it_nothing_is_predicted():
    assert current() is None and predict([], []) is None
    (first, _) = rewritten(prepared("llama")[1], GroupedAttention()).applied
    assert first.prediction is None


def test_what_surely_loses_is_left_alone():
    with costing(Told(attention=1e-3, grouped_attention=2e-3)):
        result = rewritten(prepared("llama")[1], GroupedAttention())
    assert not result.applied and len(result.misses) == 2
    reason = result.misses[0].reason
    assert reason == "predicted to be slower by told: 1 ms → 2 ms on eager"
    assert result.misses[0].site and result.misses[0].source


@pytest.mark.parametrize(
    "model",
    [
        Told(attention=1e-3, grouped_attention=5e-4),
        Told(attention=1e-3, grouped_attention=1.1e-3, spread=1.5),
        Told(attention=1e-3, grouped_attention=2e-3, unsure="never saw it"),
    ],
    ids=["faster", "open", "unsure"],
)
def test_what_may_pay_is_applied(model):
    with costing(model):
        result = rewritten(prepared("llama")[1], GroupedAttention())
    assert len(result.applied) == 2 and not result.misses
    prediction = result.applied[0].prediction
    assert prediction is not None and prediction.before.seconds == 1e-3
    assert bool(prediction.unsure) == (model.spread > 1.1 or bool(model.unsure))


def test_who_asks_for_an_approximate_pass_gets_it():
    streaming = StreamingLLM(num_sink_tokens=2, recent_window=6)
    with costing(Told(grouped_attention=1e-3, streaming_attention=9e-3)):
        result = rewritten(prepared("llama")[1], streaming)
    assert len(result.applied) == 2
    prediction = result.applied[0].prediction
    assert prediction is not None and prediction.slower and prediction.ratio == pytest.approx(9)


def test_passes_tell_the_work_before_and_after():
    for rewrite in (GroupedAttention(), Int8Weights(min_elements=1)):
        applied = rewritten(prepared("llama")[1], rewrite).applied[0]
        before, after = rewrite.original_work(applied.facts), rewrite.work(applied.facts)
        assert before[0].operator in ("attention", "linear")
        assert total(after).bytes_moved < total(before).bytes_moved
        assert total(after).flops == pytest.approx(total(before).flops)
        assert 0 < total(after).launches <= total(before).launches


@pytest.fixture(scope="module")
def report():
    with torch.no_grad(), costing(ROOFLINE):
        return optimize(small_lm(), passes=["default", "int8-weights{min_elements=512}"]).report


def test_certificates_carry_predictions(report):
    told = [c.predicted for c in report.certificates]
    assert told and all(p is not None and p.backend == "eager" for p in told)
    assert report_from_json(json.loads(json.dumps(report.to_json()))) == report
    assert "predicted" in str(report) and " → " in str(report)


def test_reports_without_predictions_are_read(report):
    stored = report.to_json()
    steps = [c for step in stored["steps"] for c in step["certificates"]]
    for certificate in (*stored["certificates"], *steps):
        assert certificate.pop("predicted")
    read = report_from_json(stored)
    assert read.certificates and all(c.predicted is None for c in read.certificates)
    assert "predicted" not in str(read)


def test_page_tells_times(report, tmp_path):
    report.to_html(tmp_path / "page.html")
    assert "predicted time" in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_unverified_certificates_too():
    with costing(ROOFLINE):
        result = rewritten(prepared("llama")[1], GroupedAttention())
    told = [c.predicted for c in unverified_certificates(result, [GroupedAttention()])]
    assert len(told) == 2 and None not in told


def test_backend_of_predictions():
    work = linear_work(1, 64, 64, "float32", "float32")
    with costing(ROOFLINE), on_backend("cpu"):
        told = predict([work], [work])
        assert told is not None and told.backend == "cpu" and told.ratio == 1
        with on_backend(None):
            assert current() is None


def test_step_of_a_program():
    program = prepared("llama")[1]
    works = list(step_works(program))
    count = {op: sum(w.operator == op for w in works) for op in ("linear", "attention")}
    assert count == {"linear": 2 * 7 + 1, "attention": 2}
    assert {w.sizes["rows"] for w in works if w.operator == "linear"} == {1}
    bounded = rewritten(program, StreamingLLM(num_sink_tokens=2, recent_window=6)).program
    slots = [w for w in step_works(bounded) if w.operator == "streaming_attention"]
    assert [w.sizes["kv_len"] for w in slots] == [8, 8]
    narrow = rewritten(program, Int8Weights(min_elements=1)).program
    dtypes = {w.weight_dtype for w in step_works(narrow) if w.operator == "linear"}
    assert dtypes == {"int8"}


@pytest.mark.parametrize(("cpu", "name"), [(0.5, "cpu"), (2.0, "eager")])
def test_auto_asks_the_model(monkeypatch, cpu, name):
    monkeypatch.setattr(lowering, "_why_not_cpu", lambda program: None)
    monkeypatch.setattr(lowering, "COMPILE_FROM", 0)
    program = prepared("llama")[1]
    assert "of weights" in lowering.choose_backend("auto", program).reason
    model = Told(eager=1.0, cpu=cpu)
    with costing(model):
        chosen = lowering.choose_backend("auto", program)
    assert chosen.name == name and "predicted by told" in chosen.reason
    told = predict_backends(model, program, "eager", "cpu")
    assert told is not None and told.ratio == pytest.approx(cpu)
