"""A session: one batch being decoded, and the state tensors that the program keeps for it.

Two counts are never confused: the true position of each row's next token, and the number of entries
kept in the dense caches, which is the same for all rows because padding takes entries too.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rewriter.decoding.derive import logits_index
from rewriter.decoding.new_tokens import check_tokens, new_columns, new_positions
from rewriter.errors import ConfigError, InputError
from rewriter.program import Decoding, Program, StateSpec

__all__ = ["Session"]

FIRST_CAPACITY = 64
"""Entries of a growing cache at first; it doubles whenever it is full."""


class Session:
    """State of one batch. `run` feeds tokens and returns logits; the state moves on.

    Args:
        program: with decoding derived.
        batch_size: rows of the batch.
        capacity: entries to make room for, and no more; None grows geometrically.
        run: what runs the program's placeholders in order; None = the graph itself.
        prefill_chunk: most new tokens of one call, for long prompts; None = as the program allows.
    """

    def __init__(
        self,
        program: Program,
        batch_size: int,
        *,
        capacity: int | None = None,
        run: Callable[..., Any] | None = None,
        prefill_chunk: int | None = None,
    ) -> None:
        if program.decoding is None:
            reason = "this program has no decoding state; call it like the model it came from"
            raise InputError(reason)
        sizes = {"batch_size": batch_size, "capacity": capacity, "prefill_chunk": prefill_chunk}
        for field, value in sizes.items():
            if value is not None and value < 1:
                raise ConfigError(field, value, "an integer of at least 1")
        self.program, self.batch_size, self.capacity = program, batch_size, capacity
        self._decoding: Decoding = program.decoding
        self._run = program.module if run is None else run
        self._names = [node.name for node in program.placeholders()]
        self._logits = logits_index(program)
        self._vocab_size = program.meta.get("vocab_size")
        self._dense = not any(spec.bounded for spec in self._decoding.states)
        self._chunk = _smallest(prefill_chunk, self._decoding.max_chunk)
        parameters = list(program.module.parameters())
        self._device = parameters[0].device if parameters else torch.device("cpu")
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self._room = self.capacity or FIRST_CAPACITY
        self.entries = 0
        self._state = {spec.name: self._empty(spec) for spec in self._decoding.states}
        self._next = 0
        self._true: Tensor | None = None
        self._k_positions: Tensor | None = None

    @property
    def true_positions(self) -> Tensor:
        """Position of the next token of each row, int64 [batch_size]."""
        if self._true is not None:
            return self._true
        return torch.full((self.batch_size,), self._next, dtype=torch.int64, device=self._device)

    @property
    def bounded(self) -> bool:
        """Whether some state forgets: it cannot be taken back, and positions have to go on by one."""
        return not self._dense

    def state_bytes(self) -> int:
        """Bytes of all state tensors."""
        tensors = [*self._state.values()]
        if self._k_positions is not None:
            tensors.append(self._k_positions)
        return sum(t.numel() * t.element_size() for t in tensors)

    def run(
        self,
        input_ids: Tensor,
        *,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        logits_to_keep: int = 0,
    ) -> Tensor:
        """Feed new tokens.

        Args:
            input_ids: int64 [batch_size, q_len].
            attention_mask: 1 = token, 0 = padding, on either side; its last q_len columns are read.
            position_ids: true positions [batch_size, q_len]; by default each row counts on over its
                tokens. Given ones may count over padding too.
            logits_to_keep: how many last rows of logits to compute; 0 = all.

        Returns:
            logits [batch_size, logits_to_keep or q_len, vocab_size]; rows of padding mean nothing.

        Raises:
            InputError: wrong dtype or shape, an unknown token, no room left, or a position the model
                does not have. The state is as it was.
        """
        return self.outputs(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            logits_to_keep=logits_to_keep,
        )[self._logits]

    def outputs(
        self,
        input_ids: Tensor,
        *,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        logits_to_keep: int = 0,
    ) -> tuple[Tensor, ...]:
        """Like `run`, with everything that the program returns; of chunks: the last one's, but logits."""
        check_tokens(input_ids, self.batch_size, self._vocab_size)
        q_len = input_ids.shape[1]
        positions = self._positions(q_len, attention_mask, position_ids)
        self._check_limits(q_len, positions)
        with torch.no_grad():
            if self._chunk is None or q_len <= self._chunk:
                return self._call(input_ids, positions, logits_to_keep)
            return self._call_in_chunks(input_ids, positions, logits_to_keep)

    def crop(self, entries: int) -> None:
        """Drop the newest entries, keeping the first `entries`; only for dense, unpadded state.

        Raises:
            InputError: bounded state, padding, or more entries than there are.
        """
        if not self._dense or self._true is not None:
            raise InputError("only dense, unpadded state can be cropped")
        if not 0 <= entries <= self.entries:
            raise InputError(f"entries={entries} is not allowed: 0 to {self.entries}")
        self.entries = self._next = entries

    def reorder(self, rows: Tensor) -> None:
        """Row i becomes what row rows[i] was, int64 [batch_size]; for beam search."""
        for name, tensor in self._state.items():
            self._state[name] = tensor.index_select(0, rows)
        if self._true is not None:
            self._true = self._true.index_select(0, rows)
        if self._k_positions is not None:
            self._k_positions = self._k_positions.index_select(0, rows)

    def fork(self, batch_size: int | None = None) -> Session:
        """A session of its own that goes on from here.

        Args:
            batch_size: a single row may become several; None = the same rows.

        Raises:
            InputError: several rows cannot become another number of them.
        """
        if batch_size is not None and self.batch_size not in (1, batch_size):
            raise InputError(f"batch_size={batch_size} is not allowed: {self.batch_size} rows")
        rows = torch.arange(batch_size or self.batch_size, device=self._device)
        other = copy.copy(self)
        other._state, other.batch_size = dict(self._state), len(rows)
        other.reorder(rows if self.batch_size > 1 else torch.zeros_like(rows))
        return other

    def kept_positions(self) -> dict[int, Tensor]:
        """True positions of what the layers that forget still hold.

        Returns:
            by layer: int64 [batch_size, ..., slots], -1 = empty. A layer that keeps everything is not
            among them.
        """
        return {
            spec.layer: self._state[spec.positions]
            for spec in self._decoding.states
            if spec.positions is not None and spec.layer is not None
        }

    def _empty(self, spec: StateSpec) -> Tensor:
        extents = {"batch": self.batch_size, "capacity": self._room}
        shape = [extents[dim] if isinstance(dim, str) else dim for dim in spec.dims]
        return torch.full(shape, spec.fill, dtype=spec.dtype, device=self._device)

    def _check_limits(self, q_len: int, positions: Tensor | None) -> None:
        limit = self._decoding.max_positions
        last = self._next + q_len if positions is None else int(positions.max()) + 1
        if limit is not None and last > limit:
            raise InputError(f"{last} tokens are longer than the model's {limit} positions")
        dense = any(not spec.bounded for spec in self._decoding.states)
        if dense and self.capacity is not None and self.entries + q_len > self.capacity:
            raise InputError(
                f"{self.entries + q_len} entries do not fit: capacity={self.capacity} was asked for"
            )

    def _positions(
        self, q_len: int, attention_mask: Tensor | None, position_ids: Tensor | None
    ) -> Tensor | None:
        """True positions [batch_size, q_len], -1 = padding; None when all rows simply count on."""
        real = None
        if attention_mask is not None:
            real = new_columns(attention_mask, self.batch_size, q_len)
            real = None if real is None else real.to(self._device)
        if position_ids is None and real is None and self._true is None:
            return None
        start = self.true_positions
        positions = new_positions(start, q_len, real, position_ids, dense=self._dense)
        if real is not None or self._true is not None:
            return positions
        counting_on = torch.arange(self._next, self._next + q_len, device=self._device)
        return None if bool((positions == counting_on).all()) else positions

    def _call_in_chunks(
        self, input_ids: Tensor, positions: Tensor | None, logits_to_keep: int
    ) -> tuple[Tensor, ...]:
        q_len, step = input_ids.shape[1], self._chunk or input_ids.shape[1]
        wanted = logits_to_keep or q_len
        kept: list[Tensor] = []
        outputs: tuple[Tensor, ...] = ()
        for start in range(0, q_len, step):
            end = min(start + step, q_len)
            part = None if positions is None else positions[:, start:end]
            rows = min(wanted - (q_len - end), end - start)
            outputs = self._call(input_ids[:, start:end], part, max(rows, 1))
            if rows > 0:
                kept.append(outputs[self._logits])
        merged = list(outputs)
        merged[self._logits] = torch.cat(kept, dim=1)
        return tuple(merged)

    def _call(
        self, input_ids: Tensor, positions: Tensor | None, logits_to_keep: int
    ) -> tuple[Tensor, ...]:
        q_len = input_ids.shape[1]
        self._make_room(q_len)
        values: dict[str, Any] = {
            "input_ids": input_ids.to(self._device, torch.int64),
            "kv_offset": self.entries,
            "logits_to_keep": logits_to_keep,
        }
        values.update(self._place(q_len, positions))
        states = self._state
        outputs = self._run(*[states[n] if n in states else values.get(n) for n in self._names])
        self.entries += q_len
        logits = outputs[self._logits]
        if 0 < logits_to_keep < logits.shape[1]:  # a program without a projection to cut short
            outputs = list(outputs)
            outputs[self._logits] = logits[:, -logits_to_keep:]
        return tuple(outputs)

    def _place(self, q_len: int, positions: Tensor | None) -> dict[str, Tensor | None]:
        """The position inputs of a call, moving the rows' positions on."""
        if positions is None:
            row = self._counting_on(q_len)
            self._next += q_len
            given = row if self._decoding.requires_positions else None
            return {"position_ids": row, "q_positions": given, "k_positions": None}
        self._true = torch.maximum(self.true_positions, positions.amax(1) + 1)
        self._next += q_len
        return {
            "position_ids": positions.clamp_min(0),
            "q_positions": positions,
            "k_positions": self._keep_positions(positions),
        }

    def _counting_on(self, q_len: int) -> Tensor:
        """The next positions [batch_size, q_len]; one operator where a token takes few."""
        if q_len == 1:
            return torch.full((self.batch_size, 1), self._next, device=self._device)
        row = torch.arange(self._next, self._next + q_len, device=self._device)
        return row.unsqueeze(0).expand(self.batch_size, -1)

    def _keep_positions(self, positions: Tensor) -> Tensor | None:
        """Positions of all entries, the new ones written behind the kept ones."""
        if "k_positions" not in self._names:
            return None
        if self._k_positions is None:
            shape = (self.batch_size, self._room)
            self._k_positions = torch.full(shape, -1, dtype=torch.int64, device=self._device)
            self._k_positions[:, : self.entries] = torch.arange(self.entries, device=self._device)
        total = self.entries + positions.shape[1]
        self._k_positions[:, self.entries : total] = positions
        return self._k_positions[:, :total]

    def _make_room(self, q_len: int) -> None:
        """Double the growing tensors until the new entries fit."""
        needed = self.entries + q_len
        if needed <= self._room or all(spec.bounded for spec in self._decoding.states):
            return
        while self._room < needed:
            self._room *= 2
        for spec in self._decoding.states:
            if not spec.bounded:
                self._state[spec.name] = self._grown(self._state[spec.name], spec)
        if self._k_positions is not None:
            old = self._k_positions
            self._k_positions = old.new_full((self.batch_size, self._room), -1)
            self._k_positions[:, : self.entries] = old[:, : self.entries]

    def _grown(self, old: Tensor, spec: StateSpec) -> Tensor:
        new, dim = self._empty(spec), spec.dims.index("capacity")
        new.narrow(dim, 0, self.entries).copy_(old.narrow(dim, 0, self.entries))
        return new


def _smallest(*limits: int | None) -> int | None:
    given = [limit for limit in limits if limit is not None]
    return min(given) if given else None
