"""Why a model could not be traced: the operator, the model's source line, and one sentence."""

from __future__ import annotations

import linecache
import re
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import torch

from rewriter.errors import CaptureError

__all__ = ["capture_error", "summarize"]

_TORCH = str(Path(torch.__file__).parent)
_OWN = str(Path(__file__).parent)
_OPERATOR = re.compile(r"\b(?:torch\.ops\.)?(aten[.:]+\w+(?:\.\w+)?)")


def capture_error(model_name: str, error: BaseException) -> CaptureError:
    """The error users see for an exception that torch.export raised."""
    frames = [frame for one in _chain(error) for frame in traceback.walk_tb(one.__traceback__)]
    operator = _last_traced(error) or _operator(frames) or _operator_in_text(error)
    where = _model_line(frames)
    named = f" at operator {operator}" if operator else ""
    located = f" ({where})" if where else ""
    return CaptureError(f"{model_name} cannot be traced{named}{located}: {summarize(error)}")


def summarize(error: BaseException) -> str:
    """The first sentence of an exception, at most 200 characters."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else ""
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """The exception, then what caused it, outermost first."""
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _model_line(frames: list[tuple[FrameType, int]]) -> str:
    """The innermost line outside torch and this package: `file.py:12 in forward: text`."""
    for frame, line in reversed(frames):
        file = frame.f_code.co_filename
        if file.startswith((_TORCH, _OWN, "<")) or not Path(file).is_file():
            continue
        text = linecache.getline(file, line).strip()
        short = "/".join(Path(file).parts[-2:])
        return f"{short}:{line} in {frame.f_code.co_name}: {text}"
    return ""


def _operator(frames: list[tuple[FrameType, int]]) -> str:
    """The operator that was being dispatched when it failed."""
    for frame, _ in reversed(frames):
        for name in ("func", "op"):
            value = frame.f_locals.get(name)
            if isinstance(value, torch._ops.OpOverload):
                return str(value)
    return ""


def _last_traced(error: BaseException) -> str:
    """The operator traced last, where the tracer says how far it got: a value was read from it."""
    found = _OPERATOR.findall(str(getattr(error, "partial_fx_graph", "")))
    return found[-1] if found else ""


def _operator_in_text(error: BaseException) -> str:
    found = _OPERATOR.search(str(error))
    return found.group(1) if found else ""
