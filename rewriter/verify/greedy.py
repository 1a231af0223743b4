"""How long two programs write the same text."""

from __future__ import annotations

import torch
from torch import Tensor

from rewriter.decoding.state import Session
from rewriter.program import Program
from rewriter.verify.scenarios import TokenScenario

__all__ = ["greedy_agreement"]

PROMPT, NEW_TOKENS = 4, 12


def greedy_agreement(base: Program, program: Program, scenario: TokenScenario) -> float:
    """Share of greedily generated tokens before the first that differs, over the rows of a batch."""
    length = scenario.ids.shape[1]
    prompt = scenario.ids[:, : min(PROMPT, length // 2)]
    steps = min(NEW_TOKENS, length - prompt.shape[1])
    ours, theirs = _continue(program, prompt, steps), _continue(base, prompt, steps)
    return (ours == theirs).int().cumprod(dim=1).double().mean().item()


def _continue(program: Program, prompt: Tensor, steps: int) -> Tensor:
    """Token ids [batch_size, steps] that follow a prompt."""
    session, tokens, new = Session(program, prompt.shape[0]), prompt, []
    for _ in range(steps):
        tokens = session.run(tokens, logits_to_keep=1)[:, -1:].argmax(-1)
        new.append(tokens)
    return torch.cat(new, dim=1)
