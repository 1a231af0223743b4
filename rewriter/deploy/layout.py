"""What a file says about its decoder: inputs, state and limits, checked against the graph itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import onnxruntime

from rewriter.errors import ArtifactError

__all__ = ["Layout", "State", "read_layout"]

Dim = int | str
DTYPES = {"float32": "float", "float16": "float16", "bfloat16": "bfloat16", "int64": "int64"}
DTYPES |= {"int32": "int32", "bool": "bool", "float64": "double", "uint8": "uint8", "int8": "int8"}
"""Names of dtypes in the metadata, and in the runtime's signature."""


@dataclass(frozen=True)
class State:
    """One state tensor: what it is called going in and out, its dimensions and its empty value."""

    input: str
    output: str
    dims: tuple[Dim, ...]
    dtype: str
    fill: float

    @property
    def growing(self) -> bool:
        """Whether it has an entry for every token."""
        return "past" in self.dims

    def shape(self, batch_size: int, past: int) -> list[int]:
        """Its extents for a batch, with room for `past` tokens."""
        extents = {"batch": batch_size, "past": past}
        return [extents[dim] if isinstance(dim, str) else dim for dim in self.dims]


@dataclass(frozen=True)
class Layout:
    """How a decoder is called.

    Attributes:
        states: in the order of the graph.
        mask: whether it takes `attention_mask`. positions: whether it takes `position_ids`.
        right_padding: whether only rows that are padded on the right are allowed; growing state is
            then written in place, into buffers with room for more.
        last_only: whether logits are those of each row's last token alone.
        logits: dtype and width of a token's; the width is None where the graph does not say.
        vocab_size, max_positions, max_chunk: limits; None = unlimited.
    """

    states: tuple[State, ...]
    mask: bool
    positions: bool
    right_padding: bool
    last_only: bool
    logits: tuple[str, int | None]
    vocab_size: int | None
    max_positions: int | None
    max_chunk: int | None


def read_layout(metadata: dict[str, Any], runtime: onnxruntime.InferenceSession) -> Layout:
    """From metadata that `open_onnx` gave back.

    Raises:
        ArtifactError: it is no decoder, or the metadata and the graph disagree.
    """
    if metadata["kind"] != "causal_lm":
        raise ArtifactError(f"the file holds a {metadata['kind']}; allowed: a causal_lm")
    inputs = {value.name: value for value in runtime.get_inputs()}
    outputs = {value.name: value for value in runtime.get_outputs()}
    try:
        states = tuple(_state(item) for item in metadata["states"])
        layout = Layout(
            states,
            mask="attention_mask" in inputs,
            positions="position_ids" in inputs,
            right_padding={"right": True, "any": False}[metadata["padding"]],
            last_only={"last": True, "all": False}[metadata["logits"]],
            logits=_logits(outputs["logits"]),
            vocab_size=_limit(metadata["vocab_size"]),
            max_positions=_limit(metadata["max_positions"]),
            max_chunk=_limit(metadata["max_chunk"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError, StopIteration) as error:
        raise ArtifactError(f"the metadata are damaged: {error!r}") from error
    fed = {"input_ids", "attention_mask", "position_ids"}
    if inputs.keys() - fed != {s.input for s in states} or "input_ids" not in inputs:
        raise ArtifactError(f"the graph has inputs {sorted(inputs)}, the metadata say otherwise")
    if outputs.keys() != {"logits", *(s.output for s in states)}:
        raise ArtifactError(f"the graph has outputs {sorted(outputs)}, the metadata say otherwise")
    for state in states:
        _check_state(state, inputs[state.input], outputs[state.output])
    return layout


def _state(item: dict[str, Any]) -> State:
    dims = tuple(item["dims"])
    if any(d not in ("batch", "past") if isinstance(d, str) else not 0 < d < 2**40 for d in dims):
        raise ValueError(f"dims {dims}")
    if item["dtype"] not in DTYPES:
        raise ValueError(f"dtype {item['dtype']!r}")
    return State(str(item["input"]), str(item["output"]), dims, item["dtype"], float(item["fill"]))


def _logits(value: Any) -> tuple[str, int | None]:
    dtype = next(name for name, kind in DTYPES.items() if value.type == f"tensor({kind})")
    width = value.shape[-1]
    return dtype, width if isinstance(width, int) else None


def _limit(value: Any) -> int | None:
    if value is not None and (type(value) is not int or value < 1):
        raise ValueError(f"limit {value!r}")
    return value


def _check_state(state: State, *values: Any) -> None:
    for value in values:
        fits = len(value.shape) == len(state.dims) and all(
            isinstance(d, str) or not isinstance(s, int) or d == s
            for d, s in zip(state.dims, value.shape, strict=True)
        )
        if not fits or value.type != f"tensor({DTYPES[state.dtype]})":
            raise ArtifactError(
                f"the graph's {value.name} is {value.type} {value.shape}; the metadata say"
                f" {state.dtype} {list(state.dims)}"
            )
