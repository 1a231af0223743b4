"""How far apart two tokens may be that an operator with a constant offset joins.

A shift by 40 does nothing to 13 tokens: this says how long a probe has to be to see it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, fx

from rewriter.engine.site import bound_arguments
from rewriter.program import Program

__all__ = ["reach"]

aten = torch.ops.aten
OPEN_END = 2**31
"""Slices without an end have a larger number there."""


def reach(program: Program) -> tuple[int, fx.Node | None]:
    """The largest constant by which an operator moves along a dynamic dimension, and that operator."""
    furthest: tuple[int, fx.Node | None] = (0, None)
    for node in program.graph.nodes:
        offset = max(_offsets(node), default=0)
        if offset > furthest[0]:
            furthest = (offset, node)
    return furthest


def _offsets(node: fx.Node) -> list[int]:
    rule = RULES.get(node.target)
    if rule is None:
        return []
    return [abs(n) for n in rule(node) if isinstance(n, int) and abs(n) < OPEN_END]


def _shape(node: Any) -> tuple[Any, ...]:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return tuple(value.shape) if isinstance(value, Tensor) else ()


def _dynamic(node: Any, dim: int) -> bool:
    """Whether a dimension's extent depends on the inputs, or is not known."""
    shape = _shape(node)
    return not shape or not isinstance(shape[dim], int)


def _along(node: fx.Node) -> Iterable[Any]:
    """op(x, dim, amounts...)."""
    dim = node.args[1] if len(node.args) > 1 else 0
    return node.args[2:] if _dynamic(node.args[0], dim) else ()  # pyright: ignore


def _padding(node: fx.Node) -> Iterable[Any]:
    """pad(x, [last before, last after, second last before, ...])."""
    widths: Any = node.args[1]
    return [n for i, n in enumerate(widths) if _dynamic(node.args[0], -1 - i // 2)]


def _rolling(node: fx.Node) -> Iterable[Any]:
    """roll(x, shifts, dims); without dims over everything."""
    arguments = bound_arguments(node)
    shifts, dims = arguments["shifts"], arguments["dims"]
    if not dims:
        return shifts
    return [n for n, dim in zip(shifts, dims, strict=True) if _dynamic(node.args[0], dim)]


def _joined(node: fx.Node) -> Iterable[Any]:
    """cat([x, y], dim): what stands before shifts what comes after."""
    parts: Any = node.args[0]
    dim: Any = node.args[1] if len(node.args) > 1 else 0
    if not _dynamic(node, dim):
        return ()
    return [_shape(part)[dim] for part in parts if _shape(part)]


def _window(node: fx.Node) -> Iterable[Any]:
    """conv(x, weight, ...) with stride, padding and dilation: what a kernel spans."""
    spans = [n for arg in node.args[3:] for n in _numbers(arg)]
    widths = [n for n in _shape(node.args[1])[2:] if isinstance(n, int)]
    return [width * max([1, *spans]) for width in widths]


def _pooling(node: fx.Node) -> Iterable[Any]:
    return [n for arg in node.args[1:] for n in _numbers(arg)]


def _arithmetic(node: fx.Node) -> Iterable[Any]:
    """Sizes that differ from the number of tokens by a constant, or count blocks of them."""
    return () if _shape(node) else node.args


def _numbers(value: Any) -> list[int]:
    if isinstance(value, (list, tuple)):
        return [n for n in value if isinstance(n, int)]
    return [value] if isinstance(value, int) and not isinstance(value, bool) else []


RULES: dict[Any, Callable[[fx.Node], Iterable[Any]]] = {
    aten.slice.Tensor: _along,
    aten.select.int: _along,
    aten.narrow.default: _along,
    aten.unfold.default: _along,
    aten.pad.default: _padding,
    aten.constant_pad_nd.default: _padding,
    aten.roll.default: _rolling,
    aten.cat.default: _joined,
    aten.conv1d.default: _window,
    aten.conv1d.padding: _window,
    aten.conv2d.default: _window,
    aten.conv2d.padding: _window,
    aten.convolution.default: _window,
    aten.avg_pool1d.default: _pooling,
    aten.max_pool1d.default: _pooling,
    aten.avg_pool2d.default: _pooling,
    operator.add: _arithmetic,
    operator.sub: _arithmetic,
    operator.floordiv: _arithmetic,
    operator.mod: _arithmetic,
}
"""The constants of each operator that moves values along a dimension."""
