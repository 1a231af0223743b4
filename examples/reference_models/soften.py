"""Divide the attention scores of a model's layers.

    python examples/reference_models/soften.py MODEL DIR 0.5 0.2 0.5 0.5

Training on exact lookups makes scores of a thousand, of which fp32 keeps four digits: two right ways to
compute attention then differ by more than rounding should. Heads as sharp as that choose the same entries
at a fifth of the scores, so answers stay as they were; measure again to be sure.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


@torch.no_grad()
def soften(model: Any, factors: list[float]) -> None:
    """Multiply the queries of every layer, in place; one factor for each layer."""
    for layer, factor in zip(model.model.layers, factors, strict=True):
        layer.self_attn.q_proj.weight.mul_(factor)


def main() -> None:
    source, target = map(Path, sys.argv[1:3])
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    soften(model, list(map(float, sys.argv[3:])))
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(source).save_pretrained(target)
    (target / "training.json").write_text((source / "training.json").read_text())


if __name__ == "__main__":
    main()
