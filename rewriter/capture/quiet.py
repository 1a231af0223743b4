"""Keep torch.export from printing half-traced graphs: what they tell is in our error."""

from __future__ import annotations

import contextlib
import logging
import sys
import warnings
from collections.abc import Iterator
from typing import TextIO

__all__ = ["without_dumps"]

_DUMP = "def forward("
_SHAPES = "torch.fx.experimental.symbolic_shapes"


class _WithoutGraphs:
    """A text stream that lets everything through but printed graphs."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        return len(text) if _DUMP in text else self._stream.write(text)

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)


@contextlib.contextmanager
def without_dumps() -> Iterator[None]:
    """Drop graphs on stderr, warnings, and the shape solver's log, while a model is traced."""
    log = logging.getLogger(_SHAPES)
    stream = _WithoutGraphs(sys.stderr)
    log.addFilter(_never)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(stream):  # pyright: ignore
            warnings.simplefilter("ignore")
            yield
    finally:
        log.removeFilter(_never)


def _never(_: logging.LogRecord) -> bool:
    return False
