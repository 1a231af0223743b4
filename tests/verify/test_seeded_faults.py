"""Nothing wrong gets out: each seeded fault changes the numbers, is undone, and the rest is right."""

import pytest

from rewriter.capture.causal_lm import capture_causal_lm
from rewriter.decoding.derive import derive
from rewriter.engine.pipeline import apply_passes
from rewriter.errors import VerificationError
from rewriter.raising import raise_program
from rewriter.verify.rollback import Verifier
from rewriter.verify.verification import Verification
from tests.small_lms import small_lm
from tests.verify.faults import FAULTS, Fault, Halves, OwnScale, WrongExactSetting

PREPARED = {}


def prepared(family):
    """A verifier for the model, and its decoding program."""
    if family not in PREPARED:
        captured = capture_causal_lm(small_lm(family))
        raised = captured.clone()
        raise_program(raised)
        PREPARED[family] = Verifier(captured, Verification()), derive(raised)
    return PREPARED[family]


ALONE = sorted(set(FAULTS) - {"halves", "own-scale"})


@pytest.mark.parametrize("kind", ALONE)
def test_a_wrong_rewrite_is_caught_and_undone(kind):
    verifier, base = prepared("mistral" if kind == "window-off-by-one" else "llama")
    fault = Fault(kind=kind)
    unchecked = apply_passes(base, [fault])
    assert unchecked.failures or verifier.mismatch(unchecked.program), "the fault does nothing"
    verified = verifier.verify(base, [fault])
    assert not verified.result.applied
    assert {c.status for c in verified.certificates} == {"rolled_back"}
    assert all(c.reason for c in verified.certificates)
    assert verifier.mismatch(verified.result.program) == ""
    assert verified.result.program.code == apply_passes(base, []).program.code


def test_a_fault_in_one_layer_costs_that_layer_only():
    verifier, base = prepared("llama")
    verified = verifier.verify(base, [Fault(kind="dropped-residual", layers=(1,))])
    assert [c.site for c in verified.certificates] == ["layer 1 gated_mlp"]
    assert verifier.mismatch(verified.result.program) == ""


def test_a_good_rewrite_stays_beside_a_bad_one():
    verifier, base = prepared("llama")
    verified = verifier.verify(base, [Halves(kind="halves"), Fault(kind="wrong-eps")])
    kept = {(c.spec, c.status) for c in verified.certificates}
    assert ("halves{kind=halves}", "applied") in kept
    assert ("fault{kind=wrong-eps}", "rolled_back") in kept
    assert verifier.mismatch(verified.result.program) == ""


def test_what_is_wrong_only_in_combination_is_found():
    verifier, base = prepared("llama")
    first, second = Halves(kind="halves", layers=(0,)), OwnScale(kind="own-scale", layers=(0,))
    for alone in (first, second):
        assert verifier.mismatch(apply_passes(base, [alone]).program) == ""
    assert verifier.mismatch(apply_passes(base, [first, second]).program)
    verified = verifier.verify(base, [first, second])
    assert len(verified.result.applied) == 1
    assert verifier.mismatch(verified.result.program) == ""


def test_an_approximation_has_to_be_exact_at_its_exact_setting():
    verifier, base = prepared("llama")
    verified = verifier.verify(base, [WrongExactSetting(kind="wrong-scale")])
    assert not verified.result.applied
    assert verifier.mismatch(verified.result.program) == ""


def test_a_wrong_base_program_is_an_error():
    verifier, base = prepared("llama")
    wrong = apply_passes(base, [Fault(kind="wrong-scale")]).program
    with pytest.raises(VerificationError, match="before any pass"):
        verifier.verify(wrong, [])
