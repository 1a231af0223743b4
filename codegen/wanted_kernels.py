"""Which GPU kernels a program's graph asks for: a description for each, and the nodes that want it.

One node can want several, such as attention, which is another kernel for a prompt than for one token.
What no kernel can do is a reason beside its node. Pointwise work that only one product's result goes
through becomes that product's epilogue.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from codegen.epilogue import Epilogue
from codegen.followers import followers
from codegen.kernel import KernelDescription
from codegen.triton_kernels.gated_activation import ACTIVATIONS
from codegen.triton_kernels.score_terms import TERMS
from rewriter.program import Program, StateSpec

__all__ = ["Unmet", "Wanted", "arguments_of", "describe", "states_of", "wanted_kernels"]

States = Mapping[str, StateSpec]
Answer = tuple[KernelDescription, ...] | str


@dataclass(frozen=True)
class Wanted:
    """What some nodes want.

    Attributes:
        nodes: their names.
        aligned: whether rows of their weights start at multiples of 16 elements, and end there.
    """

    description: KernelDescription
    nodes: tuple[str, ...]
    aligned: bool = True


@dataclass(frozen=True)
class Unmet:
    """Why a node stays with PyTorch."""

    node: str
    reason: str


class _UnknownShapeError(Exception):
    """A node carries no example of its result."""


def wanted_kernels(program: Program) -> tuple[tuple[Wanted, ...], tuple[Unmet, ...]]:
    """Descriptions, each once, in the order of the graph; and what has no kernel."""
    found: dict[tuple[KernelDescription, bool], list[str]] = {}
    unmet = []
    states = states_of(program)
    for node in program.graph.nodes:
        answer = describe(node, states)
        if isinstance(answer, str):
            unmet.append(Unmet(node.name, answer))
            continue
        for description in answer:
            found.setdefault((description, _aligned(node)), []).append(node.name)
    wanted = tuple(Wanted(d, tuple(dict.fromkeys(n)), even) for (d, even), n in found.items())
    return wanted, tuple(unmet)


def states_of(program: Program) -> States:
    """A program's states by name."""
    return {state.name: state for state in program.decoding.states} if program.decoding else {}


def describe(node: fx.Node, states: States) -> Answer:
    """The kernels that one node wants, none where it is no operator of the dialect; or why it cannot."""
    target = node.target
    if node.op != "call_function" or not isinstance(target, torch._ops.OpOverload):
        return ()
    describer = _DESCRIBERS.get(target)
    if describer is None:
        ours = target.namespace == "rewriter"
        return f"there is no Triton kernel of {target}" if ours else ()
    try:
        return describer(node, arguments_of(node), states)
    except _UnknownShapeError as unknown:
        return f"the shape of {unknown} is not known"


def arguments_of(node: fx.Node) -> dict[str, Any]:
    """What a call of an operator is given, by name, defaults included."""
    assert isinstance(node.target, torch._ops.OpOverload)
    schema = node.target._schema.arguments
    given = dict(zip((a.name for a in schema), node.args, strict=False))
    return {**{a.name: a.default_value for a in schema}, **given, **node.kwargs}


def _example(node: Any) -> Tensor:
    example = node.meta.get("val")
    if not isinstance(example, Tensor):
        raise _UnknownShapeError(node.name)
    return example


def _aligned(node: fx.Node) -> bool:
    """Whether every matrix among its arguments is a multiple of 16 both ways."""
    examples = (argument.meta.get("val") for argument in node.all_input_nodes)
    matrices = (e for e in examples if isinstance(e, Tensor) and e.dim() == 2)
    return all(int(size) % 16 == 0 for matrix in matrices for size in matrix.shape)


def _heads_and_width(node: fx.Node, states: States) -> tuple[int, int]:
    """Of a bhsd tensor: the second and last dimension; of the state where it is a part of one."""
    source = node
    while source.target == torch.ops.aten.slice.Tensor:
        (source,) = source.all_input_nodes[:1]
    if source.name in states:
        _, heads, _, width = states[source.name].dims
        return int(heads), int(width)
    shape = _example(node).shape
    return int(shape[1]), int(shape[3])


def _linear(node: fx.Node, arguments: dict[str, Any], states: States) -> Answer:
    return tuple(_last_product(node, arguments["weight"], arguments.get("bias")))


def _last_product(
    node: fx.Node, weight: fx.Node, bias: fx.Node | None
) -> Iterator[KernelDescription]:
    """A product whose result is the node's, with its bias and the pointwise work behind it."""
    epilogue = _biased(followers(node)[0], bias)
    return _products(_example(node).dtype, _example(weight).dtype, epilogue)


def _biased(epilogue: Epilogue, bias: fx.Node | None) -> Epilogue:
    return epilogue if bias is None else epilogue.after_bias(_example(bias).dtype)


def _products(
    dtype: torch.dtype, weight_dtype: torch.dtype, epilogue: Epilogue
) -> Iterator[KernelDescription]:
    """One row and few rows."""
    narrow = weight_dtype if weight_dtype != dtype else None
    for form in ("row", "rows"):
        yield KernelDescription(
            operator="gemv", dtype=dtype, weight_dtype=narrow, form=form, epilogue=epilogue or None
        )


def _gated_mlp(node: fx.Node, arguments: dict[str, Any], states: States) -> Answer:
    dtype, weight = _example(node).dtype, _example(arguments["gate"])
    activation = ACTIVATIONS[arguments["activation"]] or None
    middle = KernelDescription(operator="gated_activation", dtype=dtype, epilogue=activation)
    first = [
        each
        for name in ("gate", "up")
        for each in _products(dtype, weight.dtype, _biased(Epilogue(), arguments[f"{name}_bias"]))
    ]
    return (*first, middle, *_last_product(node, arguments["down"], arguments["down_bias"]))


def _mlp(node: fx.Node, arguments: dict[str, Any], states: States) -> Answer:
    dtype, weight = _example(node).dtype, _example(arguments["up"])
    inner = _biased(ACTIVATIONS[arguments["activation"]], arguments["up_bias"])
    up = _products(dtype, weight.dtype, inner)
    return (*up, *_last_product(node, arguments["down"], arguments["down_bias"]))


def _rms_norm(node: fx.Node, arguments: dict[str, Any], states: States) -> Answer:
    out = _example(node)
    if arguments["weight"] is None:
        return "it has no weight"
    weight = _example(arguments["weight"])
    wide = arguments["wide_weight"] or arguments["weight_offset"]
    return (
        KernelDescription(
            operator="rms_norm",
            dtype=out.dtype,
            weight_dtype=weight.dtype if weight.dtype != out.dtype else None,
            head_dim=int(out.shape[-1]),
            form="wide" if wide else "",
            epilogue=followers(node)[0] or None,
        ),
    )


def _append(node: fx.Node, arguments: dict[str, Any], states: States) -> Answer:
    """With the rotation of the keys; queries are rotated in the same launch."""
    k, v = arguments["k"], _example(arguments["v"])
    if k.target != torch.ops.rewriter.rope.default:
        return "its keys are not rotated right before"
    described = KernelDescription(  # a program's state has the dtype of its entries
        operator="rotary_append",
        dtype=v.dtype,
        head_dim=int(_example(k).shape[3]),
        value_dim=int(v.shape[3]),
        span=2 * int(_example(k.args[1]).shape[-1]),
        form="interleaved" if k.kwargs["interleaved"] else "halves",
    )
    return (described,)


def _rope(node: fx.Node, arguments: dict[str, Any], states: States) -> Answer:
    """Of keys and queries: part of the append. Without a cache there is no kernel."""
    appended = any(
        other.target == torch.ops.rewriter.kv_append.default for other in node.graph.nodes
    )
    return () if appended else "nothing is appended to a cache"


def _attention(node: fx.Node, arguments: dict[str, Any], states: States) -> Answer:
    if not isinstance(arguments["span"], int):
        return "its span is not known before it runs"
    q = _example(arguments["q"])
    num_kv_heads, head_dim = _heads_and_width(arguments["k"], states)
    _, value_dim = _heads_and_width(arguments["v"], states)
    prefill = KernelDescription(
        operator="prefill_attention",
        dtype=q.dtype,
        head_dim=head_dim,
        value_dim=value_dim,
        group_size=int(q.shape[1]) // num_kv_heads,
        mask=arguments["mask"],
        span=arguments["span"],
        softcap=arguments["softcap"],
        terms=_terms(arguments),
    )
    if arguments["q_positions"] is None:
        return (prefill,)
    merge = KernelDescription(
        operator="merge_lse",
        dtype=q.dtype,
        weight_dtype=None if q.dtype == torch.float32 else torch.float32,
        head_dim=prefill.value_dim,
    )
    return (prefill, replace(prefill, operator="decode_attention"), merge)


def _terms(arguments: dict[str, Any]) -> tuple[str, ...]:
    """What joins the scores, in the order that descriptions have."""
    bias = arguments["bias"]
    kind = "seen" if bias is not None and _example(bias).dtype == torch.bool else "bias"
    given = {kind: bias, "sinks": arguments["sinks"], "slopes": arguments["slopes"]}
    return tuple(name for name in TERMS if given.get(name) is not None)


_Describer = Callable[[fx.Node, dict[str, Any], States], Answer]
_OURS = torch.ops.rewriter
_DESCRIBERS: dict[Any, _Describer] = {
    torch.ops.aten.linear.default: _linear,
    _OURS.linear.default: _linear,
    _OURS.rms_norm.default: _rms_norm,
    _OURS.rope.default: _rope,
    _OURS.kv_append.default: _append,
    _OURS.attention.default: _attention,
    _OURS.grouped_attention.default: _attention,
    _OURS.gated_mlp.default: _gated_mlp,
    _OURS.mlp.default: _mlp,
}
