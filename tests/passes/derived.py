"""Small models brought to the point where passes run."""

from __future__ import annotations

import functools
import json
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from rewriter.capture.causal_lm import capture_causal_lm
from rewriter.decoding.derive import derive
from rewriter.decoding.state import Session
from rewriter.engine.miss import Miss
from rewriter.engine.pipeline import PipelineResult, apply_passes
from rewriter.engine.rewrite_pass import RewritePass
from rewriter.program import Program
from rewriter.raising import raise_program

__all__ = ["derived", "prepared", "rewritten", "run"]

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}


def model_of(family: str, **changes: Any) -> PreTrainedModel:
    """A tiny model of a family, its random weights large enough to tell positions apart."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**SIZES, **changes})
    config._attn_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config).eval()
    for name, weight in model.named_parameters():
        if weight.dim() >= 2 and "norm" not in name:
            torch.nn.init.normal_(weight, std=0.2)
    return model


@functools.cache
def _prepared(family: str, changes: str) -> tuple[PreTrainedModel, Program]:
    model = model_of(family, **json.loads(changes))
    return model, derived(model)


def prepared(family: str, **changes: Any) -> tuple[PreTrainedModel, Program]:
    """A tiny model and its derived program; tests share them, so neither may be changed."""
    return _prepared(family, json.dumps(changes))


def derived(model: PreTrainedModel) -> Program:
    """Captured, raised and derived."""
    program = capture_causal_lm(model)
    raise_program(program)
    result = derive(program)
    assert not isinstance(result, Miss), result
    return result


def rewritten(program: Program, *passes: RewritePass) -> PipelineResult:
    """After the passes, nothing excluded."""
    return apply_passes(program, passes, excluded=frozenset())


def run(program: Program, tokens: Tensor, chunks: list[int], mask: Tensor | None = None) -> Tensor:
    """Logits of every token, the sequence being fed in chunks to one session."""
    session, start, logits = Session(program, tokens.shape[0]), 0, []
    with torch.no_grad():
        for size in chunks:
            part = slice(start, start + size)
            kept = None if mask is None else mask[:, : start + size]
            logits.append(session.run(tokens[:, part], attention_mask=kept))
            start += size
    return torch.cat(logits, dim=1)
