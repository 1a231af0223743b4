"""What every rewrite leaves intact: a well-formed graph whose outputs keep shape and dtype."""

from __future__ import annotations

from torch import Tensor, fx

from rewriter.errors import RewriteError
from rewriter.program import Program

__all__ = ["check_program", "check_replacement"]


def check_program(program: Program, what: str) -> None:
    """Lint the graph and match its placeholders with the signature and the state.

    Raises:
        RewriteError: names `what` did it and what is wrong.
    """
    try:
        program.finish()
    except (RuntimeError, ValueError) as error:
        raise RewriteError(f"{what} left a malformed graph: {error}") from error
    names = {node.name for node in program.placeholders()}
    missing = [spec.name for spec in program.signature.inputs if spec.name not in names]
    if missing:
        raise RewriteError(f"{what} removed the model's input {missing[0]!r}")
    if program.decoding is None:
        return
    for spec in program.decoding.states:
        if spec.name not in names:
            raise RewriteError(f"{what} declares state {spec.name!r}, which is no input of the graph")


def check_replacement(old: fx.Node, new: fx.Node, what: str) -> None:
    """The value that took a node's place has its dtype and number of dimensions.

    Extents are compared where both are known numbers. Raises RewriteError.
    """
    before, after = old.meta.get("val"), new.meta.get("val")
    if not isinstance(before, Tensor) or not isinstance(after, Tensor):
        return
    if before.dtype != after.dtype:
        raise RewriteError(f"{what} changed the dtype of {old.name}: {before.dtype} to {after.dtype}")
    fixed = [
        (a, b)
        for a, b in zip(before.shape, after.shape, strict=False)
        if isinstance(a, int) and isinstance(b, int)
    ]
    if before.dim() != after.dim() or any(a != b for a, b in fixed):
        shapes = f"{list(before.shape)} to {list(after.shape)}"
        raise RewriteError(f"{what} changed the shape of {old.name}: {shapes}")
