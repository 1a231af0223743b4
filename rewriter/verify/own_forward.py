"""The captured program against the model's own forward."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from rewriter.capture.shadow import shadow
from rewriter.errors import VerificationError
from rewriter.program import Signature
from rewriter.verify.baseline import Baseline, difference
from rewriter.verify.compare import CANNOT_RUN
from rewriter.verify.scenarios import FlatScenario

__all__ = ["check_capture"]

log = logging.getLogger("rewriter")


def check_capture(model: nn.Module, baseline: Baseline) -> None:
    """Run the model itself, in eval mode and unchanged, on the baseline's whole sequences.

    Raises:
        VerificationError: the captured program returns something else.
    """
    own, signature = shadow(model), baseline.original.signature
    for scenario, expected in zip(baseline.scenarios, baseline.references, strict=True):
        if not isinstance(scenario, FlatScenario):
            continue
        problem = _problem(own, signature, scenario.inputs, expected)
        if problem:
            what = "the captured program differs from the model"
            raise VerificationError(f"{what} on {scenario.name}: {problem}")


def _problem(
    own: nn.Module,
    signature: Signature,
    inputs: Mapping[str, Tensor],
    expected: tuple[Tensor, ...],
) -> str:
    args, kwargs = _arguments(signature, inputs)
    try:
        with torch.no_grad():
            returned = own(*args, **kwargs)
    except CANNOT_RUN as error:  # the captured graph may take shapes that the model refuses
        log.info("the model does not run on what was tried: %s", error)
        return ""
    leaves = [leaf for leaf in pytree.tree_leaves(returned) if isinstance(leaf, Tensor)]
    return difference(expected, leaves)


def _arguments(
    signature: Signature, inputs: Mapping[str, Tensor]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """`(args, kwargs)` of the model's forward, with the constants it was captured with."""
    constants = iter(signature.constants.values())
    leaves = [next(constants) if name is None else inputs[name] for name in signature.leaf_names]
    return pytree.tree_unflatten(leaves, signature.in_spec)
