"""One batch being decoded: tokens in, logits out, the state in the runtime's own tensors.

State never passes through NumPy. Where the graph appends in place, one buffer with room to spare is both
what goes in and what comes out; other growing state is handed on as the runtime made it; state of fixed
size has two buffers that take turns.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from rewriter.deploy.layout import Layout, State
from rewriter.deploy.values import enlarged, filled, read
from rewriter.errors import ConfigError, InputError

__all__ = ["OnnxSession"]

FIRST_ROOM = 64
"""Tokens that buffers are made for at first; it doubles whenever they are full."""
Array = NDArray[Any]
OrtValue = onnxruntime.OrtValue


class OnnxSession:
    """State of one batch. `run` feeds tokens and returns logits; the state moves on.

    Args:
        runtime: the loaded graph. layout: how it is called.
        batch_size: rows of the batch.
        capacity: tokens of a row to make room for, and no more; None = as many as come.
        prefill_chunk: most new tokens of one call, for long prompts; None = as the graph allows.
        device: where the state lies: "cpu" or "cuda".
    """

    def __init__(
        self,
        runtime: onnxruntime.InferenceSession,
        layout: Layout,
        batch_size: int,
        *,
        capacity: int | None = None,
        prefill_chunk: int | None = None,
        device: str = "cpu",
    ) -> None:
        sizes = {"batch_size": batch_size, "capacity": capacity, "prefill_chunk": prefill_chunk}
        for field, value in sizes.items():
            if value is not None and value < 1:
                raise ConfigError(field, value, "an integer of at least 1")
        self.batch_size, self.capacity = batch_size, capacity
        self._runtime, self._layout, self._device = runtime, layout, device
        chunks = [size for size in (prefill_chunk, layout.max_chunk) if size is not None]
        self._chunk = min(chunks) if chunks else None
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        layout = self._layout
        self.lengths = np.zeros(self.batch_size, np.int64)
        self._mask = np.zeros((self.batch_size, 0), np.int64)
        self._fed = 0
        self._room = (self.capacity or FIRST_ROOM) if layout.right_padding else 0
        self._binding = self._runtime.io_binding()
        self._binding.bind_output("logits")  # outputs are in the order in which they are bound
        self._logits = self._logits_buffer()
        self._moving = [i for i in range(len(layout.states)) if not self._in_place(i)]
        self._past = [self._empty(state) for state in layout.states]
        self._spare = [None if state.growing else self._empty(state) for state in layout.states]
        for index in range(len(layout.states)):
            self._bind(index)

    def state_bytes(self) -> int:
        """Bytes of all state tensors that a call reads."""
        return sum(value.tensor_size_in_bytes() for value in self._past)

    def run(self, input_ids: Array, attention_mask: Array | None = None) -> Array:
        """Feed new tokens.

        Args:
            input_ids: integers [batch_size, q_len].
            attention_mask: [batch_size, q_len], 1 = token, 0 = padding: on the right where the file
                says so, otherwise on either side. None = all are tokens.

        Returns:
            logits: floats [batch_size, 1, vocab_size] of the last token of each row, or
            [batch_size, q_len, vocab_size] of a file with all of them. Those of padding, or of a row
            without a token, mean nothing.

        Raises:
            InputError: wrong dtype or shape, an unknown token, no room left, or a position that the
                model does not have. The state is as it was.
        """
        ids, real = self._checked(input_ids, attention_mask)
        width = ids.shape[1]
        if self._layout.right_padding:
            width = int(real.any(axis=0).sum())
        parts = [
            (self._call(ids[:, start:end], real[:, start:end]), real[:, start:end])
            for start, end in self._slices(width)
        ]
        if not self._layout.last_only:
            logits = np.concatenate([part for part, _ in parts], axis=1)
            return np.pad(logits, ((0, 0), (0, ids.shape[1] - width), (0, 0)))
        logits = parts[0][0]
        for later, shown in parts[1:]:
            rows = shown.any(axis=1)
            logits[rows] = later[rows]
        return logits

    def _checked(self, input_ids: Array, mask: Array | None) -> tuple[Array, Array]:
        """The tokens as int64 with 0 for padding, and where they are none."""
        ids = np.asarray(input_ids)
        if ids.ndim != 2 or 0 in ids.shape or ids.shape[0] != self.batch_size:
            shape = list(ids.shape)
            raise InputError(
                f"input_ids has shape {shape}; allowed: [{self.batch_size}, 1 or more]"
            )
        if ids.dtype.kind not in "iu":
            raise InputError(f"input_ids has dtype {ids.dtype}; allowed: integers")
        real = np.ones(ids.shape, bool) if mask is None else np.asarray(mask) != 0
        if real.shape != ids.shape:
            shape = list(real.shape)
            raise InputError(f"attention_mask has shape {shape}; allowed: {list(ids.shape)}")
        ids = np.where(real, ids, 0).astype(np.int64)
        last = (self._layout.vocab_size or 2**31) - 1
        wrong = ids[(ids < 0) | (ids > last)]
        if wrong.size:
            raise InputError(f"input_ids has the token {wrong[0]}; allowed: 0 to {last}")
        self._check_limits(real)
        return ids, real

    def _check_limits(self, real: Array) -> None:
        if not real.any():
            raise InputError("attention_mask has no token; allowed: 1 or more")
        longest = int((self.lengths + real.sum(axis=1)).max())
        limit = self._layout.max_positions
        if limit is not None and longest > limit:
            raise InputError(f"{longest} tokens are longer than the model's {limit} positions")
        if self.capacity is not None and longest > self.capacity:
            raise InputError(f"{longest} tokens do not fit: capacity={self.capacity} was asked for")
        if not self._layout.right_padding:
            return
        if (real[:, 1:] & ~real[:, :-1]).any():
            raise InputError("attention_mask has a token behind padding; allowed: right padding")
        if self._fed == 0 and not real[:, 0].all():
            raise InputError(
                "attention_mask has a row without a token; allowed: 1 or more at first"
            )

    def _slices(self, q_len: int) -> list[tuple[int, int]]:
        """How to cut new tokens. Rows in place count on by as many tokens each, so by one at a time."""
        first = step = min(self._chunk or q_len, q_len)
        if self._layout.right_padding and self.batch_size > 1:
            first, step = (1 if self._fed else first), 1
        starts = [0, *range(first, q_len, step)]
        return list(zip(starts, [*starts[1:], q_len], strict=True))

    def _call(self, ids: Array, real: Array) -> Array:
        if self._layout.mask:
            self._feed("attention_mask", self._mask_with(real))
        if self._layout.positions:
            counted = self.lengths[:, None] + real.cumsum(axis=1) - 1
            self._feed("position_ids", np.where(real, counted, -1))
        self._feed("input_ids", ids)
        buffer = self._logits if self._layout.last_only or ids.shape[1] == 1 else None
        if buffer is None:
            self._binding.bind_output("logits")
        else:
            self._binding.bind_ortvalue_output("logits", buffer)
        self._runtime.run_with_iobinding(self._binding)
        # Each output that is asked for is wrapped anew: none is where all lie where they were.
        outputs = self._binding.get_outputs() if self._moving or buffer is None else []
        logits = _floats(outputs[0] if buffer is None else buffer)
        for index in self._moving:
            self._hand_on(index, outputs[1 + index])
        self.lengths = self.lengths + real.sum(axis=1)
        self._fed += ids.shape[1]
        return logits

    def _feed(self, name: str, values: Array) -> None:
        values = np.ascontiguousarray(values, np.int64)
        self._binding.bind_ortvalue_input(name, OrtValue.ortvalue_from_numpy(values))

    def _mask_with(self, real: Array) -> Array:
        """Padding of all tokens so far, the new ones included."""
        if not self._layout.right_padding:
            self._mask = np.concatenate((self._mask, real.astype(np.int64)), axis=1)
            return self._mask
        if self._fed == 0:
            self._make_room(real.shape[1])
            return real
        # Every row counts on, also one that has no more tokens: what it appends is not counted, and
        # overwritten by what comes next.
        claimed = self.lengths + real.shape[1]
        self._make_room(int(claimed.max()))
        return np.arange(claimed.max()) < claimed[:, None]

    def _make_room(self, needed: int) -> None:
        """Double the buffers until the tokens fit."""
        if needed <= self._room:
            return
        while self._room < needed:
            self._room *= 2
        for index, state in enumerate(self._layout.states):
            if state.growing:
                old, shape = self._past[index], state.shape(self.batch_size, self._room)
                self._past[index] = enlarged(old, shape, state.dtype, state.fill, self._device)
                self._bind(index)

    def _logits_buffer(self) -> OrtValue | None:
        """For one token a row, which every step writes to; None where the width is not known."""
        dtype, width = self._layout.logits
        return None if width is None else filled((self.batch_size, 1, width), dtype, 0.0)

    def _empty(self, state: State) -> OrtValue:
        return filled(
            state.shape(self.batch_size, self._room), state.dtype, state.fill, self._device
        )

    def _in_place(self, index: int) -> bool:
        return self._layout.states[index].growing and self._layout.right_padding

    def _hand_on(self, index: int, output: OrtValue) -> None:
        """What came out goes in next."""
        spare = self._spare[index]
        if spare is None:
            self._past[index] = output
        else:
            self._past[index], self._spare[index] = spare, self._past[index]
        self._bind(index)

    def _bind(self, index: int) -> None:
        state, spare = self._layout.states[index], self._spare[index]
        self._binding.bind_ortvalue_input(state.input, self._past[index])
        if self._in_place(index):
            self._binding.bind_ortvalue_output(state.output, self._past[index])
        elif spare is not None:
            self._binding.bind_ortvalue_output(state.output, spare)
        else:
            self._binding.bind_output(state.output, self._device)


def _floats(value: OrtValue) -> Array:
    """A copy as fp32."""
    content = read(value)
    if value.data_type() == "tensor(bfloat16)":
        return (content.astype(np.uint32) << 16).view(np.float32)
    return content.astype(np.float32, copy=False)
