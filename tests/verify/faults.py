"""Wrong rewrites, each claiming to change nothing: what verification has to catch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import fx

from rewriter.dialect import OPS
from rewriter.engine.rewrite_pass import Facts, Fidelity, RewritePass
from rewriter.engine.site import bound_arguments

__all__ = ["FAULTS", "Fault", "Halves", "OwnScale"]

aten = torch.ops.aten
Edit = Callable[[fx.Graph, fx.Node], None]


@dataclass(frozen=True)
class Options(Facts):
    """Keyword arguments of the anchor before the rewrite."""

    op: str
    values: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Fault(RewritePass):
    """An edit that is said to be harmless."""

    name: ClassVar[str] = "fault"
    fidelity: ClassVar[Fidelity] = Fidelity.REASSOCIATED
    source: ClassVar[str] = "none"
    kind: str = ""

    @property
    def anchor(self) -> str:
        return FAULTS[self.kind][0]

    def check(self, site):
        schema = site.node.target._schema
        names = [a.name for a in schema.arguments if a.kwarg_only]
        return Options(site.op, {name: site.arguments[name] for name in names})

    def rewrite(self, graph, site, facts):
        FAULTS[self.kind][1](graph, site.node)

    def reference(self, *tensors, facts):
        return OPS[facts.op].reference(*tensors, **facts.values)


@dataclass(frozen=True, kw_only=True)
class WrongExactSetting(Fault):
    """An approximation that is not exact where it says so."""

    name: ClassVar[str] = "wrong-exact-setting"
    fidelity: ClassVar[Fidelity] = Fidelity.APPROXIMATE

    def exact_setting(self, facts, *, length) -> Self:
        return self

    def reference(self, *tensors, facts):
        values = facts.values | {"softmax_scale": facts.values["softmax_scale"] * 1.2}
        return OPS["attention"].reference(*tensors, **values)


@dataclass(frozen=True, kw_only=True)
class Halves(Fault):
    """Right alone: half the queries' length, twice the scale."""

    name: ClassVar[str] = "halves"


@dataclass(frozen=True, kw_only=True)
class OwnScale(Fault):
    """Right alone: writes the scale that the head's width implies."""

    name: ClassVar[str] = "own-scale"


def _set(**values: Any) -> Edit:
    def edit(graph, node):
        node.kwargs = node.kwargs | values

    return edit


def _scale(graph, node):
    node.kwargs = node.kwargs | {"softmax_scale": node.kwargs["softmax_scale"] * 1.2}


def _wider_window(graph, node):
    node.kwargs = node.kwargs | {"span": node.kwargs["span"] + 1}


def _swap_kv(graph, node):
    q, k, v, *rest = node.args
    node.args = (q, v, k, *rest)


def _argument(index: int, function: Any, *args: Any) -> Edit:
    """Pass one argument of the anchor through a function first."""

    def edit(graph, node):
        with graph.inserting_before(node):
            changed = graph.call_function(function, (node.args[index], *args))
        node.args = (*node.args[:index], changed, *node.args[index + 1 :])

    return edit


def _result(function: Any, *args: Any) -> Edit:
    """Pass the anchor's result through a function."""

    def edit(graph, node):
        users = list(node.users)
        with graph.inserting_after(node):
            changed = graph.call_function(function, (node, *args))
        for user in users:
            user.replace_input_with(node, changed)

    return edit


def _append_at_zero(graph, node):
    node.args = (*node.args[:4], 0)


def _stale(graph, node):
    graph.erase_node(node)


def _no_positions(graph, node):
    node.args = (*node.args[:3], None, None, *node.args[5:])


def _drop_residual(graph, node):
    for user in list(node.users):
        if user.target is aten.add.Tensor:
            user.replace_all_uses_with(node)
            graph.erase_node(user)


def _round(graph, node):
    _result(aten.to.dtype, torch.float32)(graph, node)
    back = next(iter(node.users))
    with graph.inserting_after(node):
        narrow = graph.call_function(aten.to.dtype, (node, torch.bfloat16))
    back.replace_input_with(node, narrow)


def _halve(graph, node):
    _argument(0, aten.mul.Tensor, 0.5)(graph, node)
    node.kwargs = node.kwargs | {"softmax_scale": node.kwargs["softmax_scale"] * 2}


def _own_scale(graph, node):
    width = bound_arguments(node)["q"]
    while "val" not in width.meta:
        width = width.args[0]
    node.kwargs = node.kwargs | {"softmax_scale": width.meta["val"].shape[-1] ** -0.5}


def _explode(graph, node):
    raise ZeroDivisionError("a defect in a pass")


FAULTS: dict[str, tuple[str, Edit]] = {
    "wrong-scale": ("attention", _scale),
    "mask-sees-later-tokens": ("attention", _set(mask="prefix", span=3)),
    "no-mask": ("attention", _set(mask="full")),
    "window-off-by-one": ("attention", _wider_window),
    "position-off-by-one": ("rope", _argument(1, aten.roll.default, [1], [-1])),
    "keys-and-values-swapped": ("attention", _swap_kv),
    "wrong-group-map": ("attention", _argument(1, aten.flip.default, [1])),
    "stale-state": ("kv_append", _stale),
    "wrong-state-offset": ("kv_append", _append_at_zero),
    "dropped-residual": ("gated_mlp", _drop_residual),
    "rounded-through-bf16": ("attention", _round),
    "wider-dtype": ("attention", _result(aten.to.dtype, torch.float64)),
    "wrong-shape": ("attention", _result(aten.slice.Tensor, 2, 1)),
    "wrong-eps": ("rms_norm", _set(eps=0.1)),
    "wrong-activation": ("gated_mlp", _set(activation="relu")),
    "padding-ignored": ("attention", _no_positions),
    "not-a-number": ("attention", _result(aten.mul.Tensor, float("nan"))),
    "raises": ("attention", _explode),
    "halves": ("attention", _halve),
    "own-scale": ("attention", _own_scale),
}
