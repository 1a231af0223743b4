"""Sink tokens and a recent window: bounded KV cache for endless decoding."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, fx

from rewriter.cost.cost import Cost
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
from rewriter.engine.repositioning import Rotated, rotated, tables_at
from rewriter.engine.rewrite_pass import Facts, Fidelity, RewritePass
from rewriter.engine.site import Site
from rewriter.errors import ConfigError
from rewriter.program import Program, StateSpec

__all__ = ["StreamingFacts", "StreamingLLM"]

MAX_CHUNK = 512
"""Most new tokens of one call: a long prompt costs less in pieces, each attends S + W + itself."""

POSITIONS_ROLE = "streaming positions"


@dataclass(frozen=True)
class StreamingFacts(Facts):
    """The cache of the site, its inputs before their rotation, and its other arguments."""

    shape: AttentionShape
    cached: CachedAttention
    inputs: Rotated
    softmax_scale: float
    span: int
    softcap: float


@dataclass(frozen=True, kw_only=True)
class StreamingLLM(RewritePass):
    """Keeps the first tokens and the most recent ones; positions are ranks among what is kept.

    What it does:
        Replaces the growing cache by `num_sink_tokens` slots for the first positions and a ring of
        `recent_window` slots for the last ones, keys being kept before their rotation. Every call
        rotates by the rank in the cache, so neither memory nor positions grow, and decoding has no
        end. With everything kept the ranks are the positions and nothing changes.
    Applies when:
        Decoding was derived, the mask is causal or a sliding window, and positions enter by a
        rotation of q and k right before the attention, by ALiBi slopes, or not at all.
    Does not:
        Extend what the model understands: tokens outside the window and the sinks are forgotten.
        Leaves alone attentions whose cache others read, keys that are rotated in parts (MLA), and
        models that add their positions to the embeddings.
    Shapes:
        Keys and values bhsd [batch_size, num_kv_heads, S + W + 1, width] per layer, the last slot
        takes the writes of padding; positions int64 [batch_size, S + W + 1] once per program.
    Numerics:
        Approximate; equal to the original, in another order of rounding, while a row has no more
        than S + W tokens.
    Cost:
        One token attends S + W entries whatever came before. Their keys are turned again for
        every token: three more passes over them where no kernel fuses it. Prompts run in chunks of
        at most `MAX_CHUNK` and `recent_window` tokens.
    Parameters:
        num_sink_tokens: S >= 0, first tokens of a row that are always kept.
        recent_window: W >= 1, last tokens that are kept; a model's own sliding window still holds.
        layers: the layers it may touch; None = all.
    Raises:
        ConfigError: a knob out of range.
    Source:
        https://arxiv.org/abs/2309.17453
    """

    name: ClassVar[str] = "streaming-llm"
    fidelity: ClassVar[Fidelity] = Fidelity.APPROXIMATE
    source: ClassVar[str] = "https://arxiv.org/abs/2309.17453"
    anchor: ClassVar[str] = "attention"
    conflicts: ClassVar[frozenset[str]] = frozenset({"streaming-llm"})

    num_sink_tokens: int = 4
    recent_window: int = 1020

    def __post_init__(self) -> None:
        for field, least in (("num_sink_tokens", 0), ("recent_window", 1)):
            value = getattr(self, field)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ConfigError(field, value, f"an integer of at least {least}")

    @property
    def budget(self) -> int:
        """Entries kept of a row."""
        return self.num_sink_tokens + self.recent_window

    def check(self, site: Site) -> StreamingFacts | Miss:
        """A cache of its own, a causal mask, and positions that can be counted anew."""
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
        inputs = rotated(site, cached, self.name)
        if isinstance(inputs, Miss):
            return inputs
        span = arguments["span"] if arguments["mask"] == "sliding_window" else 0
        options = (arguments["softmax_scale"], span, arguments["softcap"])
        return StreamingFacts(attention_shape(site), cached, inputs, *options)

    def rewrite(self, graph: fx.Graph, site: Site, facts: StreamingFacts) -> None:
        """Exchange the state, count positions anew, and put the streaming operator in place."""
        old, program, cached = site.node, site.program, facts.cached
        assert old is not None
        k_ring, v_ring = (self._ring(program, s) for s in (cached.k_state, cached.v_state))
        *entries, ranks = self._entries(site)
        cos, sin = self._tables(program, facts.inputs, ranks)
        new = (facts.inputs.q, facts.inputs.k, cached.v, k_ring, v_ring, *entries, cos, sin)
        additions = (site.arguments["sinks"], site.arguments["slopes"])
        with graph.inserting_before(old):
            call = graph.call_function(
                OPS["streaming_attention"].overload, (*new, *additions), self._options(facts)
            )
        call.meta = dict(old.meta)
        old.replace_all_uses_with(call)
        for node in (old, *dict.fromkeys(cached.views), cached.append):
            graph.erase_node(node)
        self._limit(program)

    def _options(self, facts: StreamingFacts) -> dict[str, Any]:
        return {
            "softmax_scale": facts.softmax_scale,
            "num_sink_tokens": self.num_sink_tokens,
            "interleaved": facts.inputs.interleaved,
            "span": facts.span,
            "softcap": facts.softcap,
        }

    def _ring(self, program: Program, state: fx.Node) -> fx.Node:
        """The state with a fixed number of slots in the place of its capacity."""
        assert program.decoding is not None
        spec = program.decoding.state(state.name)
        dims = tuple(self.budget + 1 if dim == "capacity" else dim for dim in spec.dims)
        return program.replace_state(replace(spec, dims=dims))

    def _entries(self, site: Site) -> list[fx.Node]:
        """slots, distance, mask and ranks: one call for every layer with these knobs."""
        program, target = site.program, OPS["streaming_entries"].overload
        knobs = {"num_sink_tokens": self.num_sink_tokens, "recent_window": self.recent_window}
        calls = [node for node in program.calls(target) if node.kwargs == knobs]
        call = calls[0] if calls else self._count(site, knobs)
        return [_result(program.graph, call, index) for index in range(4)]

    def _count(self, site: Site, knobs: dict[str, Any]) -> fx.Node:
        """The operator that keeps positions, before everything else."""
        program = site.program
        name = f"streaming_positions_{self.num_sink_tokens}_{self.recent_window}"
        dims = ("batch", self.budget + 1)
        state = program.add_state(StateSpec(name, dims, torch.int64, POSITIONS_ROLE, fill=-1))
        operands = (state, site.arguments["q_positions"])
        with program.graph.inserting_before(program.placeholders()[-1].next):
            return program.graph.call_function(OPS["streaming_entries"].overload, operands, knobs)

    def _tables(
        self, program: Program, inputs: Rotated, ranks: fx.Node
    ) -> Sequence[fx.Node | None]:
        """cos and sin at the ranks."""
        if inputs.cos is None or inputs.sin is None:
            return None, None
        return tables_at(program, (inputs.cos, inputs.sin), ranks)

    def _limit(self, program: Program) -> None:
        """What a session has to keep to: chunks fit the ring, and ranks fit the rotary tables."""
        decoding = program.decoding
        assert decoding is not None
        chunk = min(self.recent_window, MAX_CHUNK, decoding.max_chunk or MAX_CHUNK)
        limit = decoding.max_positions
        budget = max(_slots(state) for state in decoding.states if state.role == POSITIONS_ROLE)
        if not program.calls(OPS["kv_append"].overload) and (limit is None or budget < limit):
            chunk, limit = min(chunk, (limit or budget + chunk) - budget), None
        program.decoding = replace(
            decoding, max_positions=limit, max_chunk=chunk, requires_positions=True
        )

    def reference_inputs(self, site: Site, facts: StreamingFacts) -> tuple[fx.Node | None, ...]:
        """q and k before their rotation, v, positions, rotary tables, sinks and slopes."""
        inputs, rest = facts.inputs, ("q_positions", "sinks", "slopes")
        named = (site.arguments[name] for name in rest)
        return (inputs.q, inputs.k, facts.cached.v, inputs.cos, inputs.sin, *named)

    def reference(self, *tensors: Tensor | None, facts: StreamingFacts) -> Tensor:
        """Query by query: turn everything to its rank in the cache of that moment, and attend."""
        q, k, v, cos, sin, positions, sinks, slopes = tensors
        assert q is not None and k is not None and v is not None
        if positions is None:
            positions = torch.arange(q.shape[2], device=q.device).expand(q.shape[0], -1)
        tables = None if cos is None or sin is None else _by_rank(cos, sin, positions)
        outputs = [
            self._attend(q[:, :, i : i + 1], k, v, tables, positions, i, sinks, slopes, facts)
            for i in range(q.shape[2])
        ]
        return torch.cat(outputs, dim=2)

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        tables: tuple[Tensor, Tensor] | None,
        positions: Tensor,
        index: int,
        sinks: Tensor | None,
        slopes: Tensor | None,
        facts: StreamingFacts,
    ) -> Tensor:
        """The output of query `index`, which stands alone in q."""
        own = positions[:, index : index + 1]
        shift = (own + 1 - self.budget).clamp_min(0)
        sink = positions < self.num_sink_tokens
        ranks = torch.where(sink, positions, positions - shift)
        distance = own - shift - ranks
        keep = (positions >= 0) & (positions <= own) & (own >= 0)
        keep &= sink | (own - positions < self.recent_window)
        if facts.span:
            keep &= distance < facts.span
        if tables is not None:
            q = _turn(q, tables, own - shift, facts.inputs.interleaved)
            k = _turn(k, tables, ranks, facts.inputs.interleaved)
        bias = None
        if slopes is not None:
            bias = -slopes.float().view(1, -1, 1, 1) * distance[:, None, None]
        k, v = repeat_kv(k, q.shape[1]), repeat_kv(v, q.shape[1])
        mask = keep[:, None, None]
        return attend(q, k, v, mask, bias, sinks, facts.softmax_scale, facts.softcap)

    def exact_setting(self, facts: StreamingFacts, *, length: int) -> Self:
        """Everything is kept."""
        return replace(self, recent_window=max(length, self.recent_window))

    def stress_setting(self, facts: StreamingFacts, *, length: int) -> Self:
        """A ring that wraps and sinks that leave the window within `length` tokens."""
        window = max(1, min(self.recent_window, length // 3))
        return replace(
            self, num_sink_tokens=min(self.num_sink_tokens, length // 8), recent_window=window
        )

    def original_cost(self, facts: StreamingFacts) -> Cost:
        """Of one decoded token on `TYPICAL_KV_LEN` entries."""
        operands = facts.shape.decode_operands(TYPICAL_KV_LEN)
        return OPS["attention"].cost(*operands, mask="full")

    def cost(self, facts: StreamingFacts) -> Cost:
        """Of one decoded token once the ring is full."""
        q, k, v = facts.shape.decode_operands(self.budget + 1)
        new = (q, k[:, :, :1], v[:, :, :1])
        return OPS["streaming_attention"].cost(*new, k, v)

    def candidates(self, facts: StreamingFacts) -> tuple[Self, ...]:
        """The same sinks with windows from 124 to 2,044 tokens."""
        budgets = (128, 256, 512, 1024, 2048)
        return tuple(
            replace(self, recent_window=budget - self.num_sink_tokens)
            for budget in budgets
            if budget > self.num_sink_tokens
        )


def _slots(state: StateSpec) -> int:
    """Entries that a state of positions keeps, the spare slot aside."""
    extent = state.dims[1]
    assert isinstance(extent, int)
    return extent - 1


def _result(graph: fx.Graph, call: fx.Node, index: int) -> fx.Node:
    """One of several results of a call, as the node that reads it."""
    for user in call.users:
        if user.target is operator.getitem and user.args[1] == index:
            return user
    with graph.inserting_after(call):
        return graph.call_function(operator.getitem, (call, index))


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
