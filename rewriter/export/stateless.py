"""The graph of a program that decodes, edited until it keeps no state."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from codegen.onnx_functions import FUNCTIONS
from codegen.onnx_functions.attention import attention_masked, seen
from codegen.onnx_functions.grouped_query import (
    entry_bias,
    entry_counts,
    grouped_query,
    merge_heads,
    split_heads,
)
from codegen.onnx_functions.positions import (
    by_mask,
    by_position,
    last_row,
    right_padded,
    rows_by_mask,
    rows_right_padded,
)
from codegen.onnx_functions.random_entries import random_entries
from codegen.onnx_functions.rope import rope_by_table
from codegen.onnx_functions.state import (
    append_entries,
    attend_ring,
    streaming_entries,
)
from rewriter.decoding.derive import logits_node
from rewriter.dialect import OPS
from rewriter.engine.cached_attention import CachedAttention
from rewriter.engine.site import bound_arguments, sites
from rewriter.errors import ExportError
from rewriter.export.baked_tables import Baked, bake_tables
from rewriter.export.grouped_query import ROTATED_WIDTH, TABLE_WIDTH, fits_grouped_query
from rewriter.export.head_layout import drop_unchanged, merged_source, merged_users
from rewriter.export.ports import (
    Functional,
    Port,
    StatePorts,
    needs_mask,
    needs_positions,
    state_ports,
)
from rewriter.program import Program

__all__ = ["Conversion", "exchange"]

aten = torch.ops.aten
ATTENTIONS = ("attention", "grouped_attention")
RING_REASON = "ONNX's Attention has no ring of slots whose keys turn to their ranks"
ENTRIES_REASON = "book-keeping of slots, in integers"


class Conversion:
    """One pass over the graph of a program of its own, which it changes."""

    def __init__(self, program: Program, ep: str, logits: str, max_length: int | None) -> None:
        assert program.decoding is not None
        self.ep = ep
        self.program, self.graph, self.decoding = program, program.graph, program.decoding
        self.logits = logits
        limits = [n for n in (self.decoding.max_positions, max_length) if n is not None]
        self.limit = min(limits, default=program.meta.get("max_positions"))
        self.states = state_ports(self.decoding)
        self.turned: dict[fx.Node, tuple[fx.Node, Baked, bool]] = {}
        self.placed: list[fx.Node] = []
        self.present: dict[fx.Node, fx.Node] = {}
        self.masks: dict[tuple[Any, ...], fx.Node] = {}
        self.decomposed: dict[str, str] = {}

    def result(self) -> Functional:
        """The edited module and its ports. Raises ExportError."""
        drop_unchanged(self.graph)
        self.grouped = self._grouped()
        self.baked = bake_tables(self.program, self.limit)
        self._positions()
        for node in list(self.graph.nodes):
            self._convert(node)
        self._finish()
        return Functional(
            self.program.module,
            tuple(self.inputs),
            (self._logits_port(), *(ports.output for ports in self.states)),
            self.states,
            self.decomposed,
            padding="right" if self.grouped else "any",
            max_positions=self._limit_of_positions(),
        )

    def _grouped(self) -> dict[fx.Node, CachedAttention]:
        """Attentions that become GroupQueryAttention: all of the dense ones, or none."""
        if self.ep == "portable":
            return {}
        found: dict[fx.Node, CachedAttention] = {}
        for op in ATTENTIONS:
            for site in sites(self.program, op):
                cached = fits_grouped_query(site)
                if isinstance(cached, str):
                    self.decomposed[op] = f"Attention with a mask, no GroupQueryAttention: {cached}"
                    return {}
                assert site.node is not None
                found[site.node] = cached
        return found

    def _limit_of_positions(self) -> int | None:
        """Where a table at true positions ends; None where positions have no end."""
        return self.limit if self.decoding.max_positions is not None else None

    def _call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        return self.graph.call_function(function, args, kwargs)

    def _positions(self) -> None:
        """New placeholders for what the caller gives, and the positions computed from them."""
        ids = self._placeholder("input_ids")
        self.inputs = [Port("input_ids", torch.int64, ("batch", "q_len"))]
        self.mask = self.true = None
        if needs_mask(self.decoding):
            self.mask = self._placeholder("attention_mask")
            self.inputs.append(Port("attention_mask", torch.int64, ("batch", "total")))
        if needs_positions(self.decoding):
            self.true = self._placeholder("true_positions")
            self.inputs.append(Port("position_ids", torch.int64, ("batch", "q_len")))
        for ports in self.states:
            self._placeholder(ports.spec.name)
            self.inputs.append(ports.input)
        last = self.program.placeholders()[-1]
        given: dict[str, fx.Node] = {}
        with self.graph.inserting_before(last.next):
            given |= self._computed(ids)
        self.q_positions = given["q_positions"]
        self.k_positions = given.get("k_positions")
        self.position_ids = given["position_ids"]
        for name, node in given.items():
            old = self.program.placeholder(name)
            if old is not None and old is not node:
                old.replace_all_uses_with(node)
                self.graph.erase_node(old)
        self.baked = {
            node: Baked(b.cos, b.sin, given.get(b.positions.name, b.positions))
            for node, b in self.baked.items()
        }

    def _placeholder(self, name: str) -> fx.Node:
        """The placeholder of that name, made if need be, behind those that were asked for before."""
        node = self.program.placeholder(name)
        first = self.program.placeholders()[len(self.placed)]
        if node is None:
            with self.graph.inserting_before(first):
                node = self.graph.placeholder(name)
        elif node is not first:
            first.prepend(node)
        self.placed.append(node)
        return node

    def _computed(self, ids: fx.Node) -> dict[str, fx.Node]:
        found: dict[str, fx.Node] = {}
        if self.mask is not None:
            if self.grouped:
                pair = self._call(entry_counts, self.mask)
                self.counts = [self._call(operator.getitem, pair, i) for i in range(2)]
            triple = self._call(right_padded if self.grouped else by_mask, self.mask, ids)
            names = ("position_ids", "q_positions", "k_positions")
            found = {n: self._call(operator.getitem, triple, i) for i, n in enumerate(names)}
        if self.true is not None:
            found["position_ids"] = self._call(by_position, self.true)
            found["q_positions"] = self.true
        return found

    def _convert(self, node: fx.Node) -> None:
        if node.op != "call_function":
            return
        namespace, name = _dialect_name(node)
        if namespace != "rewriter":
            return
        with self.graph.inserting_before(node):
            special = getattr(self, f"_{name}", None)
            if name in ATTENTIONS:
                self._attention(node)
            elif special is not None:
                special(node)
            else:
                exchange(node)

    def _rope(self, node: fx.Node) -> None:
        baked = self.baked.get(node)
        if baked is None:
            exchange(node)
            return
        arguments = bound_arguments(node)
        self.turned[node] = (arguments["x"], baked, arguments["interleaved"])
        node.args = (arguments["x"], baked.cos, baked.sin, baked.positions)
        node.target = rope_by_table

    def _kv_append(self, node: fx.Node) -> None:
        if any(cached.append is node for cached in self.grouped.values()):
            return
        arguments = bound_arguments(node)
        for kept, new in (("k_cache", "k"), ("v_cache", "v")):
            state = arguments[kept]
            joined = self._call(append_entries, state, arguments[new])
            self._replace_views(state, joined, node)
        self.graph.erase_node(node)

    def _replace_views(self, state: fx.Node, joined: fx.Node, append: fx.Node) -> None:
        """Everything that reads the first entries of the state after the append reads all of them."""
        for user in list(state.users):
            if user in (joined, append):
                continue
            if user.target is not aten.slice.Tensor or state in self.present:
                raise ExportError(f"{state.name} is read by {user.target}, which is not supported")
            user.replace_all_uses_with(joined)
            self.graph.erase_node(user)
        self.present[state] = joined

    def _attention(self, node: fx.Node) -> None:
        if node in self.grouped:
            self._grouped_query(node, self.grouped[node])
            return
        arguments = bound_arguments(node)
        q_positions, k_positions = arguments["q_positions"], arguments["k_positions"]
        mask, span = arguments.pop("mask"), arguments.pop("span")
        names = ("q", "k", "v", "bias", "sinks", "slopes", "softmax_scale", "softcap")
        given = {name: arguments[name] for name in names}
        keep = self._seen(q_positions, k_positions, mask, span)
        node.target, node.args = attention_masked, ()
        node.kwargs = given | {"keep": keep, "q_positions": q_positions, "k_positions": k_positions}

    def _grouped_query(self, node: fx.Node, cached: CachedAttention) -> None:
        arguments = bound_arguments(node)
        mask, span = arguments["mask"], arguments["span"]
        q, k, tables, interleaved = self._rotated(arguments["q"], cached.k)
        merged = [merged_source(x) or self._call(merge_heads, x) for x in (q, k, cached.v)]
        states = (cached.k_state, cached.v_state)
        num_heads = int(arguments["q"].meta["val"].shape[1])
        call = self._call(
            grouped_query,
            *(*merged, *states, *self.counts, self.mask, *tables),
            self._bias(arguments["slopes"], mask, span),
            arguments["sinks"],
            num_heads=num_heads,
            softmax_scale=arguments["softmax_scale"],
            softcap=arguments["softcap"],
            window=span if mask == "sliding_window" else -1,
            interleaved=interleaved,
        )
        out, *kept = (self._call(operator.getitem, call, i) for i in range(3))
        self.present |= dict(zip(states, kept, strict=True))
        for user in merged_users(node):
            user.replace_all_uses_with(out)
        node.replace_all_uses_with(self._call(split_heads, out, num_heads))
        for old in (node, *dict.fromkeys(cached.views), cached.append):
            self.graph.erase_node(old)

    def _rotated(self, q: fx.Node, k: fx.Node) -> tuple[Any, Any, tuple[Any, Any], bool]:
        """q and k before a rotation that the operator can do, and its tables."""
        if q not in self.turned or k not in self.turned:
            return q, k, (None, None), False
        (x, baked, how), (y, other, same) = self.turned[q], self.turned[k]
        alike = (baked.cos, baked.sin, how) == (other.cos, other.sin, same)
        narrow = x.meta["val"].shape[3] % ROTATED_WIDTH or self._table_width(baked) % TABLE_WIDTH
        if not alike or narrow or baked.positions is not self.position_ids:
            return q, k, (None, None), False
        return x, y, (baked.cos, baked.sin), how

    def _table_width(self, baked: Baked) -> int:
        return self.program.module.get_buffer(str(baked.cos.target)).shape[1]

    def _bias(self, slopes: fx.Node | None, mask: str, span: int) -> fx.Node | None:
        """One for all layers alike; None where attributes say it all."""
        if slopes is None and mask in ("causal", "sliding_window"):
            return None
        key = (slopes, mask, span)
        if key not in self.masks:
            at = (self.q_positions, self.k_positions, slopes)
            self.masks[key] = self._call(entry_bias, *at, mask=mask, span=span)
        return self.masks[key]

    def _seen(self, q_positions: fx.Node, k_positions: fx.Node, mask: str, span: int) -> fx.Node:
        """One mask for all layers that see alike."""
        key = (q_positions, k_positions, mask, span)
        if key not in self.masks:
            after = max(q_positions, k_positions)
            with self.graph.inserting_after(after):
                self.masks[key] = self._call(seen, q_positions, k_positions, mask=mask, span=span)
        return self.masks[key]

    def _streaming_entries(self, node: fx.Node) -> None:
        self._entries(node, streaming_entries, 4)

    def _random_entries(self, node: fx.Node) -> None:
        self._entries(node, random_entries, 3)

    def _entries(self, node: fx.Node, function: Callable[..., Any], last: int) -> None:
        """The same results and one more: the positions in the slots afterwards."""
        state = bound_arguments(node)["slot_positions"]
        self.decomposed[_dialect_name(node)[1]] = ENTRIES_REASON
        node.target = function
        with self.graph.inserting_after(node):
            self.present[state] = self._call(operator.getitem, node, last)

    def _streaming_attention(self, node: fx.Node) -> None:
        arguments = bound_arguments(node)
        baked = self.baked.get(node)
        if baked is not None:
            tables = {"cos": baked.cos, "sin": baked.sin, "ranks": baked.positions}
            arguments |= tables
        self.decomposed["streaming_attention"] = RING_REASON
        states = (arguments["k_ring"], arguments["v_ring"])
        call = self._call(attend_ring, **arguments)
        out, *kept = (self._call(operator.getitem, call, i) for i in range(3))
        node.replace_all_uses_with(out)
        self.graph.erase_node(node)
        self.present |= dict(zip(states, kept, strict=True))

    def _finish(self) -> None:
        output = self.graph.output_node()
        logits = logits_node(self.program)
        logits = self._last_logits(logits) if self.logits == "last" else self._all_logits(logits)
        missing = [s.spec.name for s in self.states if self._state(s) not in self.present]
        if missing:
            raise ExportError(f"state {missing[0]} is never written")
        output.args = ((logits, *(self.present[self._state(s)] for s in self.states)),)
        self._erase_dead()
        self.program.finish()

    def _state(self, ports: StatePorts) -> fx.Node:
        node = self.program.placeholder(ports.spec.name)
        assert node is not None
        return node

    def _cuts(self) -> list[fx.Node]:
        """Where the program cuts to the last `logits_to_keep` rows before its last projection."""
        keep = self.program.placeholder("logits_to_keep")
        if keep is None:
            return []
        negated = [u for u in keep.users if u.target is operator.neg]
        return [cut for node in negated for cut in node.users]

    def _all_logits(self, logits: fx.Node) -> fx.Node:
        for cut in self._cuts():
            cut.replace_all_uses_with(cut.args[0])  # pyright: ignore
        return logits

    def _last_logits(self, logits: fx.Node) -> fx.Node:
        """Only the last token of each row is projected."""
        cuts = self._cuts()
        if not cuts:
            with self.graph.inserting_before(self.graph.output_node()):
                return self._call(last_row, logits, self._last_columns())
        for cut in cuts:
            with self.graph.inserting_before(cut):
                last = self._call(last_row, cut.args[0], self._last_columns())
            cut.replace_all_uses_with(last)
        return logits

    def _last_columns(self) -> fx.Node:
        if self.grouped:
            return self._call(rows_right_padded, self.mask, self.program.placeholder("input_ids"))
        return self._call(rows_by_mask, self.q_positions)

    def _erase_dead(self) -> None:
        """Python functions have no schema, so nothing else would know that they can go."""
        for node in reversed(list(self.graph.nodes)):
            declared = node.op == "placeholder" and node.name not in _INTERNAL
            if not node.users and node.op != "output" and not declared:
                self.graph.erase_node(node)

    def _logits_port(self) -> Port:
        value = logits_node(self.program).meta["val"]
        rows = 1 if self.logits == "last" else "q_len"
        return Port("logits", value.dtype, ("batch", rows, int(value.shape[2])))


def exchange(node: fx.Node) -> None:
    """An operator of the dialect becomes the function that is traced in its place."""
    namespace, name = _dialect_name(node)
    if namespace == "rewriter":
        node.target = FUNCTIONS.get(name, OPS[name].reference)


_INTERNAL = ("position_ids", "q_positions", "k_positions", "kv_offset", "logits_to_keep")


def _dialect_name(node: fx.Node) -> tuple[str, str]:
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return "", ""
    return target.namespace, target._schema.name.split("::")[-1]
