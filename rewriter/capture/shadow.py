"""A structural copy of a model that shares its weights: tracing never touches the original."""

from __future__ import annotations

import copy

import torch
from torch import nn

from rewriter.errors import CaptureError

__all__ = ["shadow"]

_TRACEABLE_ATTENTION = ("eager", "sdpa")
_TRACEABLE_EXPERTS = "batched_mm"
"""Experts as batched products: the one implementation without data-dependent control flow
that stays plain ATen."""


def shadow(model: nn.Module) -> nn.Module:
    """Copy modules and configurations, share every tensor, and switch the copy to inference.

    The copy is in eval mode. A Hugging Face model's copy uses expert and attention implementations
    that can be traced (an implementation that can be is kept).

    Raises:
        CaptureError: the model holds something that cannot be copied.
    """
    try:
        copied = copy.deepcopy(model, _shared_tensors(model))
    except (TypeError, RuntimeError, ValueError) as error:
        raise CaptureError(
            f"{type(model).__name__} cannot be copied for tracing: {error}"
        ) from None
    copied.eval()
    _use_traceable_implementations(copied)
    return copied


def _shared_tensors(model: nn.Module) -> dict[int, object]:
    """A deepcopy memo that maps every tensor reachable from a module to itself."""
    memo: dict[int, object] = {}
    for module in model.modules():
        held = [*module._parameters.values(), *module._buffers.values(), *vars(module).values()]
        memo.update({id(value): value for value in held if isinstance(value, torch.Tensor)})
    return memo


def _use_traceable_implementations(model: nn.Module) -> None:
    """Choose, on the copy's own configuration, what has no data-dependent control flow."""
    config = getattr(model, "config", None)
    if getattr(config, "_attn_implementation", "eager") not in _TRACEABLE_ATTENTION:
        model.set_attn_implementation("sdpa")  # pyright: ignore
    can_choose = getattr(model, "_can_set_experts_implementation", None)
    if can_choose is not None and can_choose():
        model.set_experts_implementation(_TRACEABLE_EXPERTS)  # pyright: ignore
