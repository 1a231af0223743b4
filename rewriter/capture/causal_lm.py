"""Capture a Hugging Face causal language model without example inputs."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rewriter.capture.module import capture
from rewriter.capture.shadow import shadow
from rewriter.errors import CaptureError
from rewriter.program import Program

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["capture_causal_lm", "is_causal_lm"]

_BATCH_SIZE, _SEQ = 2, 11
"""Sizes of the example: not 1, which tracing specialises on, and unlike usual model dimensions."""
_POSITION_LIMITS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")


def is_causal_lm(model: nn.Module) -> bool:
    """Whether it is a Hugging Face decoder-only model from token ids to next-token logits."""
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel) or model.main_input_name != "input_ids":
        return False
    if getattr(model.config, "is_encoder_decoder", False) or not model.can_generate():
        return False
    return model.get_output_embeddings() is not None


def capture_causal_lm(model: PreTrainedModel) -> Program:
    """Trace a causal LM as (input_ids, position_ids) -> logits, without its cache.

    Inputs are int64 [batch_size, seq]; `position_ids` only where the model takes it.

    Returns:
        a program with `meta` kind "causal_lm", config, and max_positions (None when unbounded).

    Raises:
        CaptureError: the model cannot be traced; names the operator and the source line.
    """
    if not is_causal_lm(model):
        raise CaptureError(f"{type(model).__name__} is not a Hugging Face causal language model")
    limit = max_positions(model)
    example = _example(model, min(_SEQ, limit or _SEQ))
    if not _counts_from_zero(model, example):
        del example["position_ids"]
    program = capture(model, example, name=str(model.config.model_type))
    program.meta |= {"kind": "causal_lm", "config": model.config, "max_positions": limit}
    return program


def max_positions(model: PreTrainedModel) -> int | None:
    """Positions the model was built for; None when its configuration sets no limit."""
    config = model.config.get_text_config(decoder=True)
    limits = [getattr(config, name, None) for name in _POSITION_LIMITS]
    return next((limit for limit in limits if isinstance(limit, int) and limit > 0), None)


def _example(model: PreTrainedModel, seq: int) -> dict[str, Any]:
    """Example arguments of forward, in its order of parameters."""
    embedding: Any = model.get_input_embeddings()
    device, vocab_size = embedding.weight.device, embedding.num_embeddings
    ids = torch.arange(_BATCH_SIZE * seq, device=device).view(_BATCH_SIZE, seq) % vocab_size
    positions = torch.arange(seq, device=device).expand(_BATCH_SIZE, seq).contiguous()
    example: dict[str, Tensor | bool] = {"input_ids": ids}
    if _takes(model, "position_ids"):
        example["position_ids"] = positions
    if _takes(model, "use_cache"):
        example["use_cache"] = False
    return example


def _counts_from_zero(model: PreTrainedModel, example: dict[str, Any]) -> bool:
    """Whether positions 0, 1, 2, ... given explicitly are what the model takes by itself.

    Where they are not (some count from the padding index on), the trace keeps the model's own.
    """
    if "position_ids" not in example:
        return True
    without = {name: value for name, value in example.items() if name != "position_ids"}
    probe = shadow(model)
    with torch.no_grad():
        given, own = probe(**example).logits, probe(**without).logits
    return torch.allclose(given, own, rtol=1e-3, atol=1e-3, equal_nan=True)


def _takes(model: PreTrainedModel, name: str) -> bool:
    """Whether forward takes an argument, by name or by handing on whatever it does not know."""
    parameters = inspect.signature(model.forward).parameters
    if name in parameters:
        return True
    hands_on = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    inner = model.base_model
    if not hands_on or inner is model:
        return False
    return name in inspect.signature(inner.forward).parameters
