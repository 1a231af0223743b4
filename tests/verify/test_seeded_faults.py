"""Nothing wrong gets out: each seeded fault changes the numbers, is undone, and the rest is right."""

import copy

import pytest
import torch

from rewriter import optimize
from rewriter.capture.causal_lm import capture_causal_lm
from rewriter.decoding.derive import derive
from rewriter.engine.pipeline import apply_passes
from rewriter.errors import VerificationError
from rewriter.raising import raise_program
from rewriter.verify.baseline import Baseline
from rewriter.verify.rollback import verify_and_rollback
from rewriter.verify.verification import Verification
from tests.small_lms import small_lm
from tests.verify.faults import FAULTS, Fault, Halves, OwnScale, WrongExactSetting

PREPARED = {}


def prepared(family, dtype=torch.float32):
    """The model's outputs to compare with, and its decoding program."""
    if (family, dtype) not in PREPARED:
        captured = capture_causal_lm(copy.deepcopy(small_lm(family)).to(dtype))
        raised = captured.clone()
        raise_program(raised)
        found = Baseline.decoding(captured, Verification()), derive(raised)
        PREPARED[family, dtype] = found
    return PREPARED[family, dtype]


def verified_by(baseline, base, passes):
    return verify_and_rollback(baseline, base, passes, Verification())


ALONE = sorted(set(FAULTS) - {"halves", "own-scale"})


@pytest.mark.parametrize("kind", ALONE)
def test_a_wrong_rewrite_is_caught_and_undone(kind):
    baseline, base = prepared("mistral" if kind == "window-off-by-one" else "llama")
    fault = Fault(kind=kind)
    unchecked = apply_passes(base, [fault])
    assert unchecked.failures or baseline.mismatch(unchecked.program), "the fault does nothing"
    verified = verified_by(baseline, base, [fault])
    assert not verified.result.applied
    assert {c.status for c in verified.certificates} == {"rolled_back"}
    assert all(c.reason for c in verified.certificates)
    assert baseline.mismatch(verified.result.program) == ""
    assert verified.result.program.code == apply_passes(base, []).program.code


@pytest.mark.parametrize("kind", ALONE)
def test_a_wrong_rewrite_is_caught_in_bf16(kind):
    family = "mistral" if kind == "window-off-by-one" else "llama"
    baseline, base = prepared(family, torch.bfloat16)
    assert not verified_by(baseline, base, [Fault(kind=kind)]).result.applied


def test_rounding_in_bf16_is_no_fault(trial_reasoner):
    passes = ["streaming-llm{num_sink_tokens=4,recent_window=252}", "default"]
    report = optimize(trial_reasoner, passes=passes).report
    applied = [c for c in report.certificates if c.status == "applied"]
    assert len(applied) == len(report.certificates) == 4


def test_a_fault_in_one_layer_costs_that_layer_only():
    baseline, base = prepared("llama")
    verified = verified_by(baseline, base, [Fault(kind="dropped-residual", layers=(1,))])
    assert [c.site for c in verified.certificates] == ["layer 1 gated_mlp"]
    assert baseline.mismatch(verified.result.program) == ""


def test_a_good_rewrite_stays_beside_a_bad_one():
    baseline, base = prepared("llama")
    verified = verified_by(baseline, base, [Halves(kind="halves"), Fault(kind="wrong-eps")])
    kept = {(c.spec, c.status) for c in verified.certificates}
    assert ("halves{kind=halves}", "applied") in kept
    assert ("fault{kind=wrong-eps}", "rolled_back") in kept
    assert baseline.mismatch(verified.result.program) == ""


def test_what_is_wrong_only_in_combination_is_found():
    baseline, base = prepared("llama")
    first, second = Halves(kind="halves", layers=(0,)), OwnScale(kind="own-scale", layers=(0,))
    for alone in (first, second):
        assert baseline.mismatch(apply_passes(base, [alone]).program) == ""
    assert baseline.mismatch(apply_passes(base, [first, second]).program)
    verified = verified_by(baseline, base, [first, second])
    assert len(verified.result.applied) == 1
    assert baseline.mismatch(verified.result.program) == ""


def test_an_approximation_has_to_be_exact_at_its_exact_setting():
    baseline, base = prepared("llama")
    verified = verified_by(baseline, base, [WrongExactSetting(kind="wrong-scale")])
    assert not verified.result.applied
    assert baseline.mismatch(verified.result.program) == ""


def test_a_wrong_base_program_is_an_error():
    baseline, base = prepared("llama")
    wrong = apply_passes(base, [Fault(kind="wrong-scale")]).program
    with pytest.raises(VerificationError, match="before any pass"):
        verified_by(baseline, wrong, [])
