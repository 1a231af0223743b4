"""What methods share that keep a fixed number of entries of a row; each says which ones, and where."""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, fx

from rewriter.cost.work import Work
from rewriter.dialect import OPS
from rewriter.dialect.attention import attend, repeat_kv
from rewriter.engine.cached_attention import (
    TYPICAL_KV_LEN,
    AttentionShape,
    CachedAttention,
    attention_shape,
    cached_attention,
)
from rewriter.engine.miss import Miss
from rewriter.engine.repositioning import Rotated, tables_at
from rewriter.engine.rewrite_pass import Facts, Fidelity, RewritePass
from rewriter.engine.site import Site
from rewriter.errors import ConfigError
from rewriter.program import Decoding, Program, StateSpec

__all__ = ["MAX_CHUNK", "BoundedCache", "CacheFacts", "Seen"]

MAX_CHUNK = 512
"""Most new tokens of one call: a long prompt costs less in pieces, each attends the cache + itself."""


@dataclass(frozen=True)
class CacheFacts(Facts):
    """The cache of the site, its inputs as they are to be cached, and its other arguments."""

    shape: AttentionShape
    cached: CachedAttention
    inputs: Rotated
    softmax_scale: float
    span: int
    softcap: float


class Seen(NamedTuple):
    """What one query sees, by the definition of the method; kv_len entries in order of arrival.

    Attributes:
        keep: bool [batch_size, kv_len].
        ranks: int64 [batch_size, kv_len], where the entries stand for this query.
        own: int64 [batch_size, 1], where the query stands.
    """

    keep: Tensor
    ranks: Tensor
    own: Tensor


@dataclass(frozen=True, kw_only=True)
class BoundedCache(RewritePass, ABC):
    """A growing cache becomes `budget` slots; one operator per program says what is in them.

    A method adds its knobs, which are those of its entries operator, and defines `budget`,
    `max_chunk`, `inputs` and `seen`. Every layer then attends over its slots with
    `streaming_attention`.
    """

    fidelity: ClassVar[Fidelity] = Fidelity.APPROXIMATE
    anchor: ClassVar[str] = "attention"
    conflicts: ClassVar[frozenset[str]] = frozenset({"random-entries", "streaming-llm"})
    entries_op: ClassVar[str]
    """Gives slots, distance, mask and, where keys turn in the cache, ranks; mutates positions."""
    positions_role: ClassVar[str]
    """Role of the state with the positions in the slots, which is named after it."""

    @property
    @abstractmethod
    def budget(self) -> int:
        """Entries kept of a row."""

    @property
    @abstractmethod
    def max_chunk(self) -> int:
        """Most new tokens of one call."""

    @property
    def first_slots(self) -> int:
        """Slots that hold the first positions, ranked apart from the rest."""
        return 0

    @abstractmethod
    def inputs(self, site: Site, cached: CachedAttention) -> Rotated | Miss:
        """q and k as they are cached, with the tables that turn them to their ranks, if any."""

    @abstractmethod
    def seen(self, positions: Tensor, own: Tensor) -> Seen:
        """What the query at position `own` [batch_size, 1] sees of `positions` [batch_size, kv_len]."""

    def limited(self, decoding: Decoding) -> Decoding:
        """What a session has to keep to, once a layer was rewritten."""
        chunk = min(self.max_chunk, decoding.max_chunk or self.max_chunk)
        return replace(decoding, max_chunk=chunk, requires_positions=True)

    def require(self, **least: int) -> None:
        """Raises ConfigError for a knob that is no integer, or below its least value."""
        for field, lowest in least.items():
            value = getattr(self, field)
            if not isinstance(value, int) or isinstance(value, bool) or value < lowest:
                raise ConfigError(field, value, f"an integer of at least {lowest}")

    def check(self, site: Site) -> CacheFacts | Miss:
        """Decoding was derived, a causal mask, a cache of its own, and what the method asks of k."""
        assert site.node is not None
        if site.program.decoding is None:
            return Miss.at(site.node, self.name, "decoding was not derived", site=site.label)
        arguments = site.arguments
        if arguments["mask"] not in ("causal", "sliding_window") or arguments["bias"] is not None:
            found = (
                "a mask that is a tensor" if arguments["bias"] is not None else arguments["mask"]
            )
            reason = f"expected a causal or sliding-window mask, found {found}"
            return Miss.at(site.node, self.name, reason, site=site.label)
        cached = cached_attention(site, self.name)
        if isinstance(cached, Miss):
            return cached
        inputs = self.inputs(site, cached)
        if isinstance(inputs, Miss):
            return inputs
        span = arguments["span"] if arguments["mask"] == "sliding_window" else 0
        options = (arguments["softmax_scale"], span, arguments["softcap"])
        return CacheFacts(attention_shape(site), cached, inputs, *options)

    def rewrite(self, graph: fx.Graph, site: Site, facts: CacheFacts) -> None:
        """Exchange the state, keep positions once, and put the streaming operator in place."""
        old, program, cached = site.node, site.program, facts.cached
        assert old is not None and program.decoding is not None
        k_slots, v_slots = (self._slots(program, s) for s in (cached.k_state, cached.v_state))
        entries = self._entries(site)
        slots, distance, mask = (_result(graph, entries, index) for index in range(3))
        cos, sin = _tables(program, facts.inputs, entries)
        new = (facts.inputs.q, facts.inputs.k, cached.v, k_slots, v_slots, slots, distance, mask)
        additions = (cos, sin, site.arguments["sinks"], site.arguments["slopes"])
        with graph.inserting_before(old):
            call = graph.call_function(
                OPS["streaming_attention"].overload, (*new, *additions), self._options(facts)
            )
        call.meta = dict(old.meta)
        old.replace_all_uses_with(call)
        for node in (old, *dict.fromkeys(cached.views), cached.append):
            graph.erase_node(node)
        program.decoding = self.limited(program.decoding)

    def _options(self, facts: CacheFacts) -> dict[str, Any]:
        return {
            "softmax_scale": facts.softmax_scale,
            "num_sink_tokens": self.first_slots,
            "interleaved": facts.inputs.interleaved,
            "span": facts.span,
            "softcap": facts.softcap,
        }

    def _knobs(self) -> dict[str, Any]:
        """The arguments of the entries operator."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "layers"}

    def _positions(self) -> StateSpec:
        """The state shared by all layers with these knobs."""
        words = (*self.positions_role.split(), *map(str, self._knobs().values()))
        dims = ("batch", self.budget + 1)
        return StateSpec("_".join(words), dims, torch.int64, self.positions_role, fill=-1)

    def _slots(self, program: Program, state: fx.Node) -> fx.Node:
        """The state with a fixed number of slots in the place of its capacity."""
        assert program.decoding is not None
        spec = program.decoding.state(state.name)
        dims = tuple(self.budget + 1 if dim == "capacity" else dim for dim in spec.dims)
        return program.replace_state(replace(spec, dims=dims, positions=self._positions().name))

    def _entries(self, site: Site) -> fx.Node:
        """The call that keeps positions, before everything else; one for every layer alike."""
        program, target, knobs = site.program, OPS[self.entries_op].overload, self._knobs()
        calls = [node for node in program.calls(target) if node.kwargs == knobs]
        if calls:
            return calls[0]
        operands = (program.add_state(self._positions()), site.arguments["q_positions"])
        with program.graph.inserting_before(program.placeholders()[-1].next):
            return program.graph.call_function(target, operands, knobs)

    def reference_inputs(self, site: Site, facts: CacheFacts) -> tuple[fx.Node | None, ...]:
        """q and k as they are cached, v, rotary tables, positions, sinks and slopes."""
        inputs, rest = facts.inputs, ("q_positions", "sinks", "slopes")
        named = (site.arguments[name] for name in rest)
        return (inputs.q, inputs.k, facts.cached.v, inputs.cos, inputs.sin, *named)

    def reference(self, *tensors: Tensor | None, facts: CacheFacts) -> Tensor:
        """Query by query: turn everything to its rank in the cache of that moment, and attend."""
        q, k, v, cos, sin, positions, sinks, slopes = tensors
        assert q is not None and k is not None and v is not None
        if positions is None:
            positions = torch.arange(q.shape[2], device=q.device).expand(q.shape[0], -1)
        tables = None if cos is None or sin is None else _by_rank(cos, sin, positions)
        outputs: list[Tensor] = []
        for i in range(q.shape[2]):
            query, keys, seen = q[:, :, i : i + 1], k, self.seen(positions, positions[:, i : i + 1])
            if tables is not None:
                query = _turn(query, tables, seen.own, facts.inputs.interleaved)
                keys = _turn(keys, tables, seen.ranks, facts.inputs.interleaved)
            outputs.append(_attend(query, keys, v, seen, sinks, slopes, facts))
        return torch.cat(outputs, dim=2)

    def original_work(self, facts: CacheFacts) -> tuple[Work, ...]:
        """Of one decoded token on `TYPICAL_KV_LEN` entries, heads grouped where they can be."""
        name = "grouped_attention" if facts.shape.group_size > 1 else "attention"
        return (facts.shape.decode_work(name, TYPICAL_KV_LEN),)

    def work(self, facts: CacheFacts) -> tuple[Work, ...]:
        """Of one decoded token once the slots are full."""
        return (facts.shape.decode_work("streaming_attention", self.budget),)


def _result(graph: fx.Graph, call: fx.Node, index: int) -> fx.Node:
    """One of several results of a call, as the node that reads it."""
    for user in call.users:
        if user.target is operator.getitem and user.args[1] == index:
            return user
    with graph.inserting_after(call):
        return graph.call_function(operator.getitem, (call, index))


def _tables(program: Program, inputs: Rotated, entries: fx.Node) -> Sequence[fx.Node | None]:
    """cos and sin at the ranks; None where nothing turns in the cache."""
    if inputs.cos is None or inputs.sin is None:
        return None, None
    return tables_at(program, (inputs.cos, inputs.sin), _result(program.graph, entries, 3))


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seen: Seen,
    sinks: Tensor | None,
    slopes: Tensor | None,
    facts: CacheFacts,
) -> Tensor:
    """The output of one query, turned to its rank like the keys."""
    distance, keep, bias = seen.own - seen.ranks, seen.keep, None
    if facts.span:
        keep = keep & (distance < facts.span)
    if slopes is not None:
        bias = -slopes.float().view(1, -1, 1, 1) * distance[:, None, None]
    k, v = repeat_kv(k, q.shape[1]), repeat_kv(v, q.shape[1])
    mask = keep[:, None, None]
    return attend(q, k, v, mask, bias, sinks, facts.softmax_scale, facts.softcap)


def _by_rank(cos: Tensor, sin: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Tables [batch_size, 1, ranks, width] whose row r is the angle of position r.

    cos, sin: [batch_size or 1, 1, q_len, width] at the positions of a sequence, maybe padded.
    """
    padding = (positions < 0).sum(1, keepdim=True)
    length = positions.shape[1]
    rows = torch.arange(length, device=positions.device) + padding
    rows = rows.clamp_max(length - 1)
    cos, sin = (t.expand(positions.shape[0], *t.shape[1:]) for t in (cos, sin))
    return _rows(cos, rows), _rows(sin, rows)


def _rows(table: Tensor, rows: Tensor) -> Tensor:
    """table[b, :, rows[b, i]]."""
    index = rows[:, None, :, None].expand(-1, table.shape[1], -1, table.shape[3])
    return table.gather(2, index)


def _turn(x: Tensor, tables: tuple[Tensor, Tensor], ranks: Tensor, interleaved: bool) -> Tensor:
    """x bhsd turned to ranks [batch_size, seq]."""
    cos, sin = (_rows(table, ranks.clamp_min(0)) for table in tables)
    return OPS["rope"].reference(x, cos, sin, interleaved=interleaved)
