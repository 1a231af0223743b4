"""What comes of a prompt, whole or piece by piece."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tokenizers import Tokenizer

from rewriter.deploy.text import StopText, TextStream

__all__ = ["Generated", "Piece", "Row"]


@dataclass(frozen=True)
class Piece:
    """One step of a generation.

    Attributes:
        ids: the new tokens. text: what they add; "" inside of a character, or without a tokenizer.
        finish_reason: at the end "stop" (end of sequence, or a stop word) or "length".
    """

    ids: tuple[int, ...]
    text: str
    finish_reason: str | None = None


@dataclass(frozen=True)
class Generated:
    """What a prompt led to: new tokens without the prompt's, their text, and why it ended."""

    prompt_ids: tuple[int, ...]
    ids: tuple[int, ...]
    text: str
    finish_reason: str


class Row:
    """One prompt of a batch, and what came of it."""

    def __init__(
        self, prompt_ids: Sequence[int], tokenizer: Tokenizer | None, stop: Sequence[str]
    ) -> None:
        self.prompt_ids = tuple(prompt_ids)
        self.ids: list[int] = []
        self.text = ""
        self.finish_reason: str | None = None
        self._stream = None if tokenizer is None else TextStream(tokenizer)
        self._stop = StopText(stop)
        self._taken_ids = self._taken_text = 0

    def push(self, token: int, *, end: bool, last: bool) -> None:
        """One more token; ignored once the row is done."""
        if self.finish_reason:
            return
        self.ids.append(token)
        text = "" if self._stream is None else self._stream.push(token)
        if self._stream is not None and (end or last):
            text += self._stream.end()
        self.text += self._stop.push(text)
        if end or self._stop.found:
            self.finish_reason = "stop"
        elif last:
            self.finish_reason = "length"
        if self.finish_reason:
            self.text += self._stop.end()

    def taken(self) -> Piece:
        """What is new since the last call."""
        ids, text = tuple(self.ids[self._taken_ids :]), self.text[self._taken_text :]
        self._taken_ids, self._taken_text = len(self.ids), len(self.text)
        return Piece(ids, text, self.finish_reason)

    def result(self) -> Generated:
        """All of it."""
        reason = self.finish_reason or "length"
        return Generated(self.prompt_ids, tuple(self.ids), self.text, reason)
