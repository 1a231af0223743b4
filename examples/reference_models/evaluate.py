"""Accuracy of a model on held-out samples of the tasks.

    python examples/reference_models/evaluate.py examples/models/reasoner

An answer counts when every token of it is the model's first choice, which is when greedy decoding
would have given it.
"""

from __future__ import annotations

import sys
from random import Random
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from rewriter.quality.encoding import Encoding
from rewriter.quality.tasks import TASKS

CASES = (
    ("arithmetic", 0),
    ("recalled-arithmetic", 0),
    ("people", 0),
    ("lists", 0),
    ("retrieval", 20),
    ("retrieval", 80),
    ("retrieval", 330),
    ("retrieval", 664),
    ("tracking", 20),
    ("tracking", 110),
    ("tracking", 440),
    ("affixes", 12),
    ("affixes", 60),
    ("affixes", 240),
)
"""Task, and entries in the context."""


@torch.inference_mode()
def accuracy(
    model: nn.Module, tokenizer: Any, task: str, size: int, samples: int, seed: int
) -> float:
    """Share of answers that are right from their first to their last token.

    Questions about one context are asked one by one, each right after the context.
    """
    rng, right, asked = Random(seed), 0, 0
    per_context, encoding = 1 if size == 0 else 4, Encoding(tokenizer, len(tokenizer))
    for _ in range(samples // per_context):
        sample = encoding.encode(TASKS[task].sample(rng, size, per_context, held_out=True))
        for question, answer in zip(sample.questions, sample.answers, strict=True):
            prompt = sample.context + question
            ids = torch.tensor([prompt + answer])
            logits = model(ids, logits_to_keep=len(answer) + 1).logits[0]
            right += int(_all_first(logits[:-1], torch.tensor(answer)))
            asked += 1
    return right / asked


def _all_first(logits: Tensor, answer: Tensor) -> bool:
    return bool((logits.argmax(-1) == answer).all())


def table(model: nn.Module, tokenizer: Any, samples: int, seed: int = 0) -> dict[str, float]:
    """Accuracy by task and number of entries."""
    return {
        f"{task} {size}".removesuffix(" 0"): accuracy(model, tokenizer, task, size, samples, seed)
        for task, size in CASES
    }


def main() -> None:
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
    for name, value in table(model, tokenizer, samples=200).items():
        print(f"{name:24} {100 * value:5.1f} %")


if __name__ == "__main__":
    main()
