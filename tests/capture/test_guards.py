from __future__ import annotations

import pytest
import torch

from rewriter.capture import capture
from rewriter.capture.guards import violated

from .toys import ShortOnly

INPUTS = {"x": torch.zeros(2, 10), "ids": torch.zeros(3, 4)}


@pytest.mark.parametrize(
    "guard, holds",
    [
        ("x.shape[1] <= 10", True),
        ("x.shape[1] < 10", False),
        ("((255 + x.shape[1]) // 256) == 1", True),
        ("(128 + ((-1)*max(0, 128 + ((-1)*x.shape[1])))) == x.shape[1]", True),
        ("x.shape[1] % 4 == 0 or ids.shape[0] > 2", True),
        ("not x.shape[1] == 10", False),
        ("x.shape[1] != 10", True),  # reported, not enforced
    ],
)
def test_conditions_are_evaluated(guard: str, holds: bool) -> None:
    assert violated([guard], INPUTS) == (None if holds else guard)


def test_only_sizes_are_understood() -> None:
    with pytest.raises((ValueError, KeyError)):
        violated(["__import__('os').getpid() > 0"], INPUTS)


def test_guards_of_a_trace_separate_the_branches() -> None:
    guards = capture(ShortOnly(), (torch.randn(2, 5),)).meta["guards"]
    assert violated(guards, {"x": torch.zeros(2, 15)}) is None
    assert violated(guards, {"x": torch.zeros(2, 16)}) is not None
