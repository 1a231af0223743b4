"""An ONNX file run beside the program it was made from, on prompts, padding and decode steps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import Tensor

from rewriter.decoding.state import Session
from rewriter.errors import VerificationError
from rewriter.lowering import lower
from rewriter.program import Program
from rewriter.verify.compare import relative_error
from rewriter.verify.inputs import whole_scenarios
from rewriter.verify.tolerances import end_to_end_tolerance
from rewriter.verify.verification import Verification

__all__ = ["Decoder", "check_file", "open_session"]

LENGTHS = (1, 2, 7, 23)
"""Prompts; where state is bounded another one is added that exceeds it."""
ROWS = (1, 3)
STEPS = 4
SHORTEST = (1, 0.4, 0.7)
"""Tokens of the rows of a padded batch, as shares of the longest."""
BEYOND = 9
"""Tokens by which the longest prompt exceeds bounded state."""
LONGEST, MOST_PADDED = 2304, 128
"""Tokens with the decode steps behind them, of a row alone and of each of several."""


def open_session(path: Path, provider: str = "CPUExecutionProvider") -> Any:
    """A session that keeps the weights mapped: packed copies would need their size once more."""
    options = onnxruntime.SessionOptions()
    if provider not in onnxruntime.get_available_providers():
        provider = "CPUExecutionProvider"  # has the same operators, in float16 too
    options.log_severity_level = 4  # errors are raised
    options.add_session_config_entry("session.disable_prepacking", "1")
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=[provider])
    except Exception as error:  # ONNX Runtime's errors have no common base of their own
        raise VerificationError(f"onnxruntime does not load the file: {error}") from error


def run_session(session: Any, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    """All outputs. Raises VerificationError where the runtime refuses."""
    try:
        return session.run(None, feeds)
    except Exception as error:
        raise VerificationError(f"onnxruntime does not run the file: {error}") from error


class Decoder:
    """State of one batch of a file.

    Args:
        session: of the file. states: as in its metadata. inputs: names of its inputs.
    """

    def __init__(self, session: Any, states: Sequence[dict[str, Any]], rows: int) -> None:
        self.session = session
        self.names = [value.name for value in session.get_inputs()]
        self.outputs = [value.name for value in session.get_outputs()]
        self.states = states
        self.state = {s["input"]: _empty(s, rows) for s in states}
        self.mask = np.zeros((rows, 0), np.int64)

    def run(self, ids: np.ndarray, mask: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Feed tokens int64 [batch_size, q_len]; mask and true positions (-1 = padding) alike."""
        self.mask = np.concatenate((self.mask, mask), axis=1)
        given = {"input_ids": ids, "attention_mask": self.mask, "position_ids": positions}
        feeds = {name: given[name] for name in self.names if name in given} | self.state
        found = dict(zip(self.outputs, run_session(self.session, feeds), strict=True))
        self.state = {s["input"]: found[s["output"]] for s in self.states}
        return found["logits"]


def _empty(state: dict[str, Any], rows: int) -> np.ndarray:
    extents = {"batch": rows, "past": 0}
    shape = [extents[d] if isinstance(d, str) else d for d in state["dims"]]
    return np.full(shape, state["fill"], np.dtype(state["dtype"]))


@dataclass(frozen=True)
class _Prompt:
    """Tokens and who of them is real, int64 [batch_size, length], and true positions."""

    ids: Tensor
    mask: Tensor

    @property
    def name(self) -> str:
        padded = " with padding" if not bool(self.mask.all()) else ""
        return f"{self.ids.shape[0]} row(s) of {self.ids.shape[1]} tokens{padded}"

    @property
    def positions(self) -> Tensor:
        return torch.where(self.mask != 0, self.mask.cumsum(1) - 1, -1)


def check_file(
    path: Path, metadata: dict[str, Any], program: Program, provider: str
) -> dict[str, float]:
    """Compare what a file computes with its program: logits and greedy tokens, or a module's outputs.

    Returns:
        `error`: largest relative error found; `greedy`: share of equal tokens; `limit` of the error,
        which depends on the dtype of the file's outputs and state.

    Raises:
        VerificationError: which input differs, and by how much.
    """
    session = open_session(path, provider)
    if program.decoding is None:
        return _check_module(session, metadata, program)
    return _check_decoder(session, metadata, program)


def _limit(metadata: dict[str, Any]) -> float:
    """By the narrowest dtype of the file's outputs."""
    dtypes = {getattr(torch, port["dtype"]) for port in metadata["outputs"]}
    return max(end_to_end_tolerance(dtype) for dtype in dtypes)


def _check_module(session: Any, metadata: dict[str, Any], program: Program) -> dict[str, float]:
    worst, limit = 0.0, _limit(metadata)
    run = lower(program, "eager")
    names = [value.name for value in session.get_inputs()]
    for scenario in whole_scenarios(program, Verification()):
        with torch.no_grad():
            expected = scenario.candidate(program, run)
        feeds = {name: scenario.inputs[name].numpy() for name in names}
        for index, value in enumerate(run_session(session, feeds)):
            error = relative_error(torch.from_numpy(value), expected[index])
            if not error <= limit:
                raise VerificationError(
                    f"the file computes another {metadata['outputs'][index]['name']} than the"
                    f" program: relative error {error:.2g}, allowed {limit:.2g} ({scenario.name})"
                )
            worst = max(worst, error)
    return {"error": worst, "limit": limit}


def _check_decoder(session: Any, metadata: dict[str, Any], program: Program) -> dict[str, float]:
    run = lower(program, "eager")
    limit = _limit(metadata)
    worst, same, count = 0.0, 0, 0
    for prompt in _prompts(program, metadata):
        decoder = Decoder(session, metadata["states"], prompt.ids.shape[0])
        reference = Session(program, prompt.ids.shape[0], run=run)
        for step, (found, expected) in enumerate(_logits(decoder, reference, prompt, metadata)):
            error = relative_error(found, expected)
            if not error <= limit:
                raise VerificationError(
                    f"the file computes other logits than the program: relative error {error:.2g},"
                    f" allowed {limit:.2g} ({prompt.name}, step {step})"
                )
            worst = max(worst, error)
            same += _same_tokens(found, expected, limit)
            count += found.shape[0]
    if same < count:
        raise VerificationError(f"{count - same} of {count} greedy tokens differ from the program")
    return {"error": worst, "greedy": same / count, "limit": limit}


def _same_tokens(found: Tensor, expected: Tensor, limit: float) -> int:
    """Rows whose likeliest token is the same, or as likely as rounding tells."""
    token = found.argmax(-1, keepdim=True)
    margin = expected.amax(-1, keepdim=True) - expected.gather(-1, token)
    return int((margin <= 2 * limit * expected.abs().amax()).sum())


def _prompts(program: Program, metadata: dict[str, Any]) -> Iterator[_Prompt]:
    generator = torch.Generator().manual_seed(0)
    vocab_size = metadata["vocab_size"]
    for rows in ROWS:
        for length in _lengths(metadata, most=LONGEST if rows == 1 else MOST_PADDED):
            ids = torch.randint(0, vocab_size, (rows, length), generator=generator)
            mask = torch.ones_like(ids)
            if rows > 1:
                for row in range(rows):
                    real = max(1, round(SHORTEST[row % len(SHORTEST)] * length))
                    mask[row, real:] = 0
                if metadata["padding"] == "any":
                    mask = mask.flip(1)
            yield _Prompt(ids, mask)


def _lengths(metadata: dict[str, Any], most: int) -> list[int]:
    fixed = [s["dims"][1] for s in metadata["states"] if len(s["dims"]) == 2]
    lengths = [*LENGTHS, *(size + BEYOND for size in fixed if isinstance(size, int))]
    limit = min(metadata["max_positions"] or most, most) - STEPS
    return sorted({length for length in lengths if length <= limit})


def _logits(
    decoder: Decoder, reference: Session, prompt: _Prompt, metadata: dict[str, Any]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Of the last token of every row: the file's and the program's, [batch_size, vocab_size]."""
    length = prompt.ids.shape[1]
    chunk = metadata["max_chunk"] or length
    parts = range(0, length, chunk)
    last = prompt.mask.shape[1] - 1 - prompt.mask.flip(1).argmax(1)
    found = torch.empty(0)
    whole = reference.run(prompt.ids, attention_mask=prompt.mask)
    expected = _row(whole, last)
    for start in parts:
        at = slice(start, start + chunk)
        ids, mask, positions = (
            t[:, at].contiguous().numpy() for t in (prompt.ids, prompt.mask, prompt.positions)
        )
        logits = torch.from_numpy(decoder.run(ids, mask, positions)).float()
        if metadata["logits"] == "all":
            logits = _row(logits, (last - start).clamp(0, logits.shape[1] - 1))
        else:
            logits = logits[:, 0]
        inside = ((last >= start) & (last < start + chunk)).unsqueeze(1)
        found = torch.where(inside, logits, found) if found.numel() else logits
    yield found, expected
    positions = prompt.mask.sum(1, keepdim=True)
    for step in range(STEPS):
        token = expected.argmax(-1, keepdim=True)
        expected = reference.run(token)[:, -1].float()
        ones = np.ones((len(token), 1), np.int64)
        logits = decoder.run(token.numpy(), ones, (positions + step).numpy())
        yield torch.from_numpy(logits).float()[:, -1], expected


def _row(logits: Tensor, columns: Tensor) -> Tensor:
    """logits[b, columns[b]]."""
    return logits[torch.arange(len(columns)), columns].float()
