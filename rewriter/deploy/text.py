"""Text in and out: a folder's `tokenizer.json`, and text that grows token by token."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer

from rewriter.errors import ArtifactError

__all__ = ["TOKENIZER", "StopText", "TextStream", "read_tokenizer"]

TOKENIZER = "tokenizer.json"
UNKNOWN = "\ufffd"
UNFINISHED = 3
"""Most tokens that a character can still be waiting for the rest of it."""
WINDOW = 24
"""Tokens that are decoded again for each new one, before those in front are let go."""
CONTEXT = 8
"""Fewest tokens to keep in front, because spaces depend on them."""


def read_tokenizer(directory: Path) -> Tokenizer | None:
    """The tokenizer of a directory; None where there is no `tokenizer.json`.

    Raises:
        ArtifactError: it cannot be read.
    """
    path = directory / TOKENIZER
    if not path.is_file():
        return None
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises Exception itself
        raise ArtifactError(f"{path} cannot be read: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


class TextStream:
    """Text of tokens as they come; a character that needs several tokens is not shown in halves."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._shown = 0  # characters of the text of `_ids`
        self._waiting = 0  # tokens since the text last ended with a whole character

    def push(self, token: int) -> str:
        """The text that one more token makes certain; often "" inside of a character."""
        self._ids.append(token)
        text = self._tokenizer.decode(self._ids)
        held = len(text) - len(text.rstrip(UNKNOWN))
        self._waiting = self._waiting + 1 if held else 0
        if self._waiting > UNFINISHED:  # what is older is no part of a character
            held = min(held, UNFINISHED)
        piece = text[self._shown : len(text) - held]
        self._shown += len(piece)
        if not held and len(self._ids) > WINDOW:
            self._forget(text)
        return piece

    def end(self) -> str:
        """What was held back: bytes that no longer become a character."""
        rest = self._tokenizer.decode(self._ids)[self._shown :]
        self._shown += len(rest)
        return rest

    def _forget(self, text: str) -> None:
        """Keep a few tokens, from a place where they decode to the same text alone."""
        for count in range(CONTEXT, 2 * CONTEXT):
            tail = self._tokenizer.decode(self._ids[-count:])
            if tail and text.endswith(tail):
                self._ids, self._shown = self._ids[-count:], len(tail)
                return


class StopText:
    """Text until one of some words comes; what may be the start of one is held back."""

    def __init__(self, words: Sequence[str]) -> None:
        self._words = [word for word in words if word]
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        """The text that is certainly before any stop word."""
        if self.found:
            return ""
        text = self._held + text
        places = [place for word in self._words if (place := text.find(word)) >= 0]
        if places:
            self.found, self._held = True, ""
            return text[: min(places)]
        start = len(text) - self._overlap(text)
        self._held = text[start:]
        return text[:start]

    def end(self) -> str:
        """What was held back in vain."""
        rest, self._held = self._held, ""
        return rest

    def _overlap(self, text: str) -> int:
        """Characters at the end that start a stop word."""
        longest = max((len(word) - 1 for word in self._words), default=0)
        for count in range(min(longest, len(text)), 0, -1):
            if any(word.startswith(text[-count:]) for word in self._words):
                return count
        return 0
