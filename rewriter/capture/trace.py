"""torch.export with as many dynamic dimensions as the model allows."""

from __future__ import annotations

import inspect
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from rewriter.capture.baked import Wanted, dynamic_dims
from rewriter.capture.call import Call
from rewriter.capture.failure import capture_error, summarize
from rewriter.capture.quiet import without_dumps
from rewriter.capture.shadow import shadow

__all__ = ["Trace", "trace"]

_FALLBACKS = (("seq",), ("batch",))
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trace:
    """An exported program and what was asked of it.

    Attributes:
        exported: what torch.export gave; not functional yet.
        names: of its inputs in order; None for a constant.
        asked: every dimension that could be dynamic; `wanted`: those this trace asked for.
        reason: why `wanted` is less than `asked`; "" when it is not.
        export_seconds: wall time of `torch.export.export` alone.
    """

    exported: ExportedProgram
    names: tuple[str | None, ...]
    asked: Wanted
    wanted: Wanted
    reason: str
    export_seconds: float


def trace(model: nn.Module, call: Call) -> Trace:
    """Export with dynamic batch and sequence; give up dimensions one by one where that fails.

    Raises:
        CaptureError: not even the example's own shapes can be traced.
    """
    wide = call.widened()
    asked = dynamic_dims(wide.tensors, ("batch", "seq"))
    try:
        exported, seconds = _export(model, wide, asked)
    except Exception as error:  # torch.export raises what the model and the tracer raise
        _log.info("dynamic trace failed: %s", summarize(error))
        return _trace_less(model, call, asked, error)
    return Trace(exported, tuple(call.tensors), asked, asked, "", seconds)


def _trace_less(model: nn.Module, call: Call, asked: Wanted, error: Exception) -> Trace:
    """The fallbacks: static first, for its verdict, then one dynamic dimension."""
    reason = f"tracing with it dynamic failed: {summarize(error)}"
    static = dynamic_dims(call.tensors, ())
    try:
        exported, seconds = _export(model, call, static)
    except Exception as last:
        raise capture_error(type(model).__name__, last) from None
    for axes in _FALLBACKS:
        wanted = dynamic_dims(call.tensors, axes)
        try:
            exported, seconds = _export(model, call.widened(), wanted)
        except Exception as failed:
            _log.info("trace with dynamic %s failed: %s", axes, summarize(failed))
            continue
        return Trace(exported, tuple(call.tensors), asked, wanted, reason, seconds)
    return Trace(exported, tuple(call.tensors), asked, static, reason, seconds)


def _export(model: nn.Module, call: Call, wanted: Wanted) -> tuple[ExportedProgram, float]:
    """Export a shadow of the model whose forward takes the call's tensors by name."""
    traced = shadow(model)
    traced.forward = _flat_forward(traced.forward, call)
    shapes = {name: dict.fromkeys(dims, Dim.AUTO) for name, dims in wanted.items()}
    with torch.no_grad(), without_dumps():
        started = time.perf_counter()
        exported = torch.export.export(
            traced, (), call.tensors, dynamic_shapes=shapes, strict=False
        )
        seconds = time.perf_counter() - started
        return exported, seconds


def _flat_forward(forward: Callable[..., Any], call: Call) -> Callable[..., Any]:
    """`forward` with the flat signature of `call`; constants are closed over."""
    names = list(call.tensors)

    def flat(**tensors: Tensor) -> object:
        args, kwargs = call.arguments([tensors[name] for name in names])
        return forward(*args, **kwargs)

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [inspect.Parameter(name, kind) for name in names]
    flat.__signature__ = inspect.Signature(parameters)  # pyright: ignore
    return flat
