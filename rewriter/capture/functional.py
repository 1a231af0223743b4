"""Make an exported graph functional by rewriting nodes, without tracing it again.

What torch.export gives for inference differs from functional ATen in a handful of composite
operators (`to`, `contiguous`, `dropout`, ...) and in-place ones on fresh tensors. Rewriting just
those takes a few milliseconds, where `run_decompositions({})` takes as long as the export did.
Whatever is not on the list is left to it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from rewriter.engine.site import bound_arguments

__all__ = ["functionalize"]

aten = torch.ops.aten
Replacement = fx.Node | None


def functionalize(graph: fx.Graph) -> bool:
    """Rewrite composite and in-place operators of `graph`, in place.

    Returns:
        False if it holds something beyond this; the graph is then not to be used.
    """
    if any(_is_subgraph(node) for node in graph.nodes):
        return False
    order = {node: index for index, node in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        if node.op != "call_function" or not _needs_change(node):
            continue
        rule = _RULES.get(node.target)
        replacement = rule(graph, node) if rule else _out_of_place(graph, node, order)
        if replacement is None:
            return False
        node.replace_all_uses_with(replacement)
        graph.erase_node(node)
    return True


def _is_subgraph(node: fx.Node) -> bool:
    """A higher-order operator or a module call."""
    return node.op == "call_module" or isinstance(node.target, torch._ops.HigherOrderOperator)


def _needs_change(node: fx.Node) -> bool:
    return node.target in _RULES or _writes(node) or _has_to_be_decomposed(node)


def _writes(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _aliases(node: fx.Node) -> bool:
    """Whether its result may share memory with an input."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return target is operator.getitem
    returned = any(result.alias_info is not None for result in target._schema.returns)
    return returned or torch.Tag.maybe_aliasing_or_mutating in target.tags


def _has_to_be_decomposed(node: fx.Node) -> bool:
    """A composite operator that may alias, `reshape` apart: later stages know it by its parts."""
    if not isinstance(node.target, torch._ops.OpOverload) or not _aliases(node):
        return False
    if node.target is aten.reshape.default:
        return False
    name = node.target.name()
    return torch._C._dispatch_has_kernel_for_dispatch_key(name, "CompositeImplicitAutograd")


def _call(graph: fx.Graph, node: fx.Node, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
    """A call before `node` that computes its value; it takes over its meta."""
    with graph.inserting_before(node):
        call = graph.call_function(target, args, kwargs)
    call.meta = dict(node.meta)
    return call


def _source(node: fx.Node) -> Any:
    """What it is called on: a node, in every operator that has a rule here."""
    return node.args[0]


def _value(node: fx.Node) -> Any:
    return node.meta["val"]


def _size(graph: fx.Graph, node: fx.Node, source: fx.Node, dim: int) -> int | fx.Node:
    size = _value(source).shape[dim]
    if isinstance(size, int):
        return size
    call = _call(graph, node, aten.sym_size.int, source, dim)
    call.meta["val"] = size
    return call


def _to(graph: fx.Graph, node: fx.Node) -> Replacement:
    """`to` and `type_as`: a copy only where dtype or device change."""
    source = _source(node)
    options = {} if node.target is aten.type_as.default else bound_arguments(node)
    if options.get("copy") or options.get("memory_format") is not None:
        return None
    old, new = _value(source), _value(node)
    changed: dict[str, Any] = {"dtype": new.dtype} if old.dtype != new.dtype else {}
    if old.device != new.device:
        changed["device"] = new.device
    return _call(graph, node, aten._to_copy.default, source, **changed) if changed else source


def _identity(graph: fx.Graph, node: fx.Node) -> Replacement:
    """Memory layout is no part of a functional graph: `reshape` copies where it has to."""
    return _source(node)


def _reshape(graph: fx.Graph, node: fx.Node) -> Replacement:
    return _call(graph, node, aten.reshape.default, *node.args)


def _flatten(graph: fx.Graph, node: fx.Node) -> Replacement:
    options, source = bound_arguments(node), _source(node)
    rank = _value(source).dim()
    if rank == 0:
        return None
    start, end = options["start_dim"] % rank, options["end_dim"] % rank
    outer = [_size(graph, node, source, dim) for dim in range(rank)]
    merged = _value(node).shape[start]
    inner = merged if isinstance(merged, int) else -1
    return _call(
        graph, node, aten.reshape.default, source, [*outer[:start], inner, *outer[end + 1 :]]
    )


def _unflatten(graph: fx.Graph, node: fx.Node) -> Replacement:
    options, source = bound_arguments(node), _source(node)
    dim, sizes = options["dim"], options["sizes"]
    rank = _value(source).dim()
    outer = [_size(graph, node, source, d) for d in range(rank)]
    return _call(
        graph,
        node,
        aten.reshape.default,
        source,
        [*outer[: dim % rank], *sizes, *outer[dim % rank + 1 :]],
    )


def _dropout(graph: fx.Graph, node: fx.Node) -> Replacement:
    options = bound_arguments(node)
    return None if options["train"] and options["p"] else _source(node)


def _chunk(graph: fx.Graph, node: fx.Node) -> Replacement:
    options, source = bound_arguments(node), _source(node)
    extent = _value(source).shape[options["dim"]]
    if not isinstance(extent, int):
        return None
    size = -(-extent // options["chunks"])
    return _call(graph, node, aten.split.Tensor, source, size, options["dim"])


def _reverse(graph: fx.Graph, node: fx.Node) -> Replacement:
    """`x.T`: all dimensions in reverse."""
    source = _source(node)
    order = list(reversed(range(_value(source).dim())))
    return _call(graph, node, aten.permute.default, source, order)


def _expand_as(graph: fx.Graph, node: fx.Node) -> Replacement:
    source, other = _source(node), bound_arguments(node)["other"]
    sizes = [_size(graph, node, other, dim) for dim in range(_value(other).dim())]
    return _call(graph, node, aten.expand.default, source, sizes)


_RULES: dict[Any, Callable[[fx.Graph, fx.Node], Replacement]] = {
    aten.to.dtype: _to,
    aten.to.dtype_layout: _to,
    aten.to.device: _to,
    aten.to.other: _to,
    aten.type_as.default: _to,
    aten.contiguous.default: _identity,
    aten.view.default: _reshape,
    aten._unsafe_view.default: _reshape,
    aten.flatten.using_ints: _flatten,
    aten.unflatten.int: _unflatten,
    aten.dropout.default: _dropout,
    aten.feature_dropout.default: _dropout,
    aten.chunk.default: _chunk,
    aten.expand_as.default: _expand_as,
    aten.numpy_T.default: _reverse,
}


def _out_of_place(graph: fx.Graph, node: fx.Node, order: dict[fx.Node, int]) -> Replacement:
    """The functional twin of an in-place operator whose tensor nothing else shares."""
    target, written = node.target, node.args[0]
    twin = _functional_twin(target) if _writes(node) else None  # pyright: ignore
    if twin is None or not isinstance(written, fx.Node) or not _is_fresh(written):
        return None
    values = [_value(argument) for argument in node.all_input_nodes if "val" in argument.meta]
    dtypes = {value.dtype for value in values if isinstance(value, torch.Tensor)}
    at = order.get(node, -1)
    before = [user for user in written.users if user is not node and order.get(user, at) < at]
    if len(dtypes) > 1 or any(_aliases(user) for user in before):
        return None
    result = _call(graph, node, twin, *node.args, **node.kwargs)
    for user in list(written.users):
        if user not in before and user is not node and user is not result:
            user.replace_input_with(written, result)
    order[result] = at
    return result


def _functional_twin(target: torch._ops.OpOverload) -> torch._ops.OpOverload | None:
    """`aten.add.Tensor` for `aten.add_.Tensor`; None where there is none or more is written."""
    written = [a for a in target._schema.arguments if a.alias_info and a.alias_info.is_write]
    name = target._schema.name.removeprefix("aten::")
    if len(written) != 1 or not name.endswith("_") or target._schema.arguments[0] != written[0]:
        return None
    packet = getattr(aten, name[:-1], None)
    return getattr(packet, target._overloadname, None) if packet is not None else None


def _is_fresh(node: fx.Node) -> bool:
    """Whether nothing else sees a value's memory: computed, or the sole view of what was."""
    if node.op != "call_function":
        return False
    if not _aliases(node):
        return isinstance(node.target, torch._ops.OpOverload)
    source = _source(node)
    if not isinstance(source, fx.Node):
        return False
    if node.target is operator.getitem and not _aliases(source):
        return _is_fresh(source)
    return len(source.users) == 1 and _is_fresh(source)
