"""Estimates, predictions made of two, and the roofline."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import rewriter
from rewriter.cost.cost import Cost
from rewriter.cost.model import Estimate, Prediction, compare, estimate_all, total_prediction
from rewriter.cost.roofline import Ceilings, Roofline
from rewriter.cost.work import Work, linear_work, total
from rewriter.errors import ArtifactError

CEILINGS = Ceilings("test", 2, bandwidth=10e9, flops=100e9, overhead=1e-6)


def predicted(before: Estimate, after: Estimate) -> Prediction:
    return Prediction.of(before, after, model="m", backend="cpu")


def test_slower_only_where_the_whole_interval_is():
    old = Estimate(1.0, 0.9, 1.1)
    assert predicted(old, Estimate(2.0, 1.8, 2.2)).slower
    faster = predicted(old, Estimate(0.5, 0.4, 0.6))
    assert not faster.slower and not faster.unsure and faster.high < 1
    open_ = predicted(old, Estimate(1.05, 0.9, 1.2))
    assert not open_.slower and "of the time" in open_.unsure and open_.low < 1 < open_.high


def test_an_unsure_time_decides_nothing():
    told = predicted(Estimate(1.0, 1.0, 1.0), Estimate(5.0, 5.0, 5.0, "never saw it"))
    assert told.unsure == "never saw it" and not told.slower
    assert str(told) == "1e+03 ms → 5e+03 ms on cpu (unsure: never saw it)"


def test_errors_of_both_add_up_as_if_independent():
    told = predicted(Estimate(1.0, 0.5, 2.0), Estimate(3.0, 1.5, 6.0))
    assert told.high == pytest.approx(3 * 2**2**0.5)
    assert told.low == pytest.approx(3 * 2 ** -(2**0.5))
    same = predicted(Estimate(1.0, 0.5, 2.0), Estimate(1.0, 0.5, 2.0))
    assert same.low == same.high == 1 and same.unsure and not same.slower


def test_roofline_by_hand():
    roofline = Roofline(CEILINGS)
    read = Work("linear", Cost(1e6, 1e8, 1))
    assert roofline.estimate(read, "cpu").seconds == pytest.approx(1e8 / 10e9 + 1e-6)
    busy = Work("linear", Cost(1e9, 1e6, 3))
    found = roofline.estimate(busy, "eager")
    assert found.seconds == pytest.approx(1e9 / 100e9 + 3e-6) and not found.unsure
    assert found.low < found.seconds < found.high
    both = estimate_all(roofline, [read, busy], "cpu")
    assert both.seconds == pytest.approx(1e8 / 10e9 + 1e9 / 100e9 + 4e-6)


def test_work_of_a_product():
    wide, narrow = (linear_work(2, 64, 32, "float32", dtype) for dtype in ("float32", "int8"))
    assert wide.cost == Cost(2 * 2 * 64 * 32, 4 * 64 * 32 + 4 * 2 * 96, 1)
    assert narrow.cost.bytes_moved == 64 * 32 + 4 * 64 + 4 * 2 * 96
    assert total([wide, narrow]).launches == 2
    assert compare(Roofline(CEILINGS), [wide], [narrow], "cpu").ratio < 1


def test_total_of_several_sites():
    one = predicted(Estimate(1.0, 0.9, 1.1), Estimate(0.5, 0.4, 0.6))
    told = total_prediction([one, one])
    assert told.before == Estimate(2.0, 1.8, 2.2) and told.ratio == pytest.approx(0.5)


def test_ceilings_are_measured_once(tmp_path, monkeypatch):
    monkeypatch.setenv("REWRITER_CACHE", str(tmp_path))
    asked = []
    monkeypatch.setattr(Ceilings, "measured", staticmethod(lambda: asked.append(1) or CEILINGS))
    assert Ceilings.here() == Ceilings.here() == CEILINGS and len(asked) == 1
    (kept,) = tmp_path.glob("*.json")
    kept.write_text("{}")  # another content than its digest: made anew
    assert Ceilings.here() == CEILINGS and len(asked) == 2


def test_kept_ceilings_of_another_layout_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("REWRITER_CACHE", str(tmp_path))
    monkeypatch.setattr("rewriter.cost.roofline._write", lambda path: path.write_text("[1]"))
    with pytest.raises(ArtifactError, match="ceilings"):
        Ceilings.here()


def test_measured_ceilings_are_plausible(monkeypatch):
    monkeypatch.setattr("rewriter.cost.roofline._MEBIBYTES", 16)
    found = Ceilings.measured()
    assert 1e8 < found.bandwidth < 1e13 and 1e8 < found.flops < 1e15
    assert 1e-8 < found.overhead < 1e-3 and found.threads == 1


def test_the_core_imports_no_learned_model():
    """Only the command line, which has the dataset's commands, knows of `ir_dataset`."""
    root = Path(rewriter.__file__).parent
    for path in root.rglob("*.py"):
        if path.parent.name != "cli":
            text = path.read_text(encoding="utf-8")
            assert not re.search(r"^\s*(from|import) ir_dataset", text, re.MULTILINE), path
