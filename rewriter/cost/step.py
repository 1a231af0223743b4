"""What a decode step of a whole program computes: its products and attentions."""

from __future__ import annotations

from collections.abc import Iterator
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx

from rewriter.cost.model import CostModel, Prediction, estimate_all
from rewriter.cost.work import Work, dtype_name, linear_work
from rewriter.dialect import OPS
from rewriter.engine.cached_attention import TYPICAL_KV_LEN, AttentionShape, attention_shape
from rewriter.engine.site import Site, bound_arguments, sites
from rewriter.program import Program

__all__ = ["predict_backends", "step_works"]

_WEIGHTS = {"linear": ("weight",), "gated_mlp": ("gate", "up", "down"), "mlp": ("up", "down")}


def predict_backends(
    model: CostModel, program: Program, before: str, after: str
) -> Prediction | None:
    """A step's products and attentions on one backend and on another; the rest is not predicted.

    None for a program that has neither.
    """
    works = list(step_works(program))
    if not works:
        return None
    old, new = (estimate_all(model, works, backend) for backend in (before, after))
    return Prediction.of(old, new, model=model.name, backend=f"{before} → {after}")


def step_works(program: Program) -> Iterator[Work]:
    """Of one new token of one row, attending `TYPICAL_KV_LEN` entries or what is kept."""
    for op in _WEIGHTS:
        for site in sites(program, op):
            yield from _products(site)
    for op in ("attention", "grouped_attention"):
        for site in sites(program, op):
            yield attention_shape(site).decode_work(op, TYPICAL_KV_LEN)
    for site in sites(program, "streaming_attention"):
        yield _bounded(site)


def _products(site: Site) -> Iterator[Work]:
    """One for each weight of the site."""
    for name in _WEIGHTS[site.op]:
        weight = _weight(site.program, site.arguments[name])
        if weight is not None:
            dtype = dtype_name(weight.dtype)
            out_size, in_size = weight.shape
            yield linear_work(1, out_size, in_size, _dtype(site, dtype), dtype)


def _dtype(site: Site, weight_dtype: str) -> str:
    """Of activations, which is that of weights unless those are int8."""
    if weight_dtype != "int8":
        return weight_dtype
    made = next(n for n in site.arguments.values() if _is_narrow(n))
    return dtype_name(bound_arguments(made)["dtype"])


def _weight(program: Program, node: Any) -> Tensor | None:
    """A parameter, its transpose, or the int8 rows of one; None for what is computed."""
    if _is_narrow(node):
        node = node.args[0]
    turned = isinstance(node, fx.Node) and node.target is torch.ops.aten.t.default
    held: Any = node.args[0] if turned else node
    if not isinstance(held, fx.Node) or held.op != "get_attr":
        return None
    value: Tensor = attrgetter(str(held.target))(program.module)
    return value.t() if turned else value


def _is_narrow(node: Any) -> bool:
    return isinstance(node, fx.Node) and node.target is OPS["dequantize_rows"].overload


def _bounded(site: Site) -> Work:
    """Attention over slots; one of them is spare."""
    assert site.program.decoding is not None
    k, v = (site.program.decoding.state(site.arguments[n].name) for n in ("k_ring", "v_ring"))
    q = site.arguments["q"].meta["val"]
    num_kv_heads, slots, head_dim = (int(extent) for extent in k.dims[1:])
    shape = AttentionShape(int(q.shape[1]), num_kv_heads, head_dim, int(v.dims[3]), q.dtype)
    return shape.decode_work("streaming_attention", slots - 1)
