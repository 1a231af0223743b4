"""Measure a reference model and write its card.

    python examples/reference_models/card.py examples/models/reasoner

The card (README.md in the directory) says what the model is, how it was made, what it can do, and how it
takes what approximations do: attention on the first token, and MLPs cut to their most active neurons.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from random import Random
from typing import Any

import torch
from evaluate import CASES, accuracy
from sparse_mlp import keep_active_neurons
from transformers import AutoModelForCausalLM, AutoTokenizer

from rewriter import optimize
from rewriter.quality.retained_mass import first_token_mass
from rewriter.quality.tasks import TASKS
from rewriter.quality.tasks.sentences import text as sentences
from rewriter.report.files import write_file

DENSITIES = (1.0, 0.75, 0.5, 0.35, 0.25, 0.15, 0.1, 0.05)
SPARSE_CASES = (
    ("arithmetic", 0),
    ("recalled-arithmetic", 0),
    ("people", 0),
    ("lists", 0),
    ("retrieval", 80),
    ("tracking", 110),
    ("affixes", 60),
)
POINTS = 15
"""Loss of accuracy, in percent points, that the card looks for."""

CARD = """\
# {name}

A Llama of {parameters:.1f}M parameters that solves small problems step by step, remembers facts, and looks
things up in its context. It was made to judge approximations by: it can do something that they may break.

{config}. fp32, {size:.1f} MiB. A vocabulary of whole words and single digits, {vocab_size} tokens; every
sequence begins with `<s>`, every answer ends with a newline, which is the end token.

## How it was made

```bash
python examples/reference_models/train.py -o DIR --compile{flags}
```

{tokens:.0f}M generated tokens in {steps:,} steps, {minutes:.0f} minutes on {machine}. {note} Problems are
drawn without end; those whose text hashes to 0 modulo 8 are never trained on, and only they are asked here.

## What it can do

Greedy, the whole answer right to its last token, {samples} held-out questions each. The number is that of
the entries in the context: pairs, names or strings.

| task | entries | tokens | right |
|---|---|---|---|
{accuracy}

## Attention on the first token

Share of the attention of late queries, mean over a row of {mass_tokens} tokens, by layer and head:

| layer | {heads} |
|---|{rules}
{masses}

## With fewer neurons

In every token and layer only the neurons with the largest activated gate count (as a mask).

| task | {densities} |
|---|{density_rules}
{curves}

{verdict}
"""


def percent(share: float) -> str:
    """For a table."""
    return f"{100 * share:.1f} %"


def row(*cells: str) -> str:
    """Of a table."""
    return f"| {' | '.join(cells)} |"


def length_of(tokenizer: Any, task: str, size: int) -> int:
    """Tokens of a context with one question and its answer."""
    sample = TASKS[task].sample(Random(0), size, 1, held_out=True)
    question = sample.questions[0]
    text = f"{sample.context} {question.prompt} {question.answer}"
    return len(tokenizer(text, add_special_tokens=False)["input_ids"]) + 1


def curves(model: Any, tokenizer: Any, samples: int) -> dict[str, list[float]]:
    """Accuracy by task, for each of the densities."""
    found: dict[str, list[float]] = {task: [] for task, _ in SPARSE_CASES}
    for density in DENSITIES:
        with keep_active_neurons(model, density):
            for task, size in SPARSE_CASES:
                found[task].append(accuracy(model, tokenizer, task, size, samples, seed=1))
        print(f"density {density:g}", flush=True)
    return found


def verdict(found: dict[str, list[float]]) -> str:
    """Where the first task loses `POINTS` points."""
    for index, density in enumerate(DENSITIES):
        lost = {task: 100 * (shares[0] - shares[index]) for task, shares in found.items()}
        task = max(lost, key=lost.__getitem__)
        if lost[task] >= POINTS:
            return (
                f"The largest of these densities at which a task loses {POINTS} points or more is "
                f"{100 * density:g} %: {task} loses {lost[task]:.0f}."
            )
    return f"No task loses {POINTS} points at any of these densities."


def masses(model: Any, tokenizer: Any) -> tuple[list[list[float]], int]:
    """Share on the first token by layer and head, on retrieval and on sentences, and their length."""
    sample = TASKS["retrieval"].sample(Random(0), 160, 1, held_out=True)
    texts = (sample.context, sentences(Random(0), 200))
    rows = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    length = min(map(len, rows))
    ids = torch.tensor([[tokenizer.bos_token_id, *r[:length]] for r in rows])
    return first_token_mass(optimize(model).program, ids), length + 1


def describe(config: Any) -> str:
    """The sizes in words."""
    return (
        f"{config.hidden_size} wide, {config.num_hidden_layers} layers, "
        f"{config.num_attention_heads} query heads on {config.num_key_value_heads} KV heads of "
        f"{config.head_dim}, {config.intermediate_size} neurons a layer, "
        f"{config.max_position_embeddings} positions"
    )


@torch.no_grad()
def card(directory: Path, samples: int) -> str:
    """The text of the card."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    training = json.loads((directory / "training.json").read_text())
    right = []
    for task, size in CASES:
        share = accuracy(model, tokenizer, task, size, samples, seed=1)
        tokens = str(length_of(tokenizer, task, size))
        right.append(row(task, str(size or ""), tokens, percent(share)))
        print(right[-1], flush=True)
    sparse = curves(model, tokenizer, samples)
    first, mass_tokens = masses(model, tokenizer)
    weights = directory / "model.safetensors"
    return CARD.format(
        name=directory.name,
        parameters=sum(p.numel() for p in model.parameters()) / 1e6,
        config=describe(model.config),
        size=weights.stat().st_size / 2**20,
        vocab_size=model.config.vocab_size,
        flags=" --bf16" if training["bf16"] else "",
        tokens=training["tokens"] / 1e6,
        samples=samples,
        accuracy="\n".join(right),
        mass_tokens=mass_tokens,
        heads=" | ".join(str(head) for head in range(len(first[0]))),
        rules="---|" * len(first[0]),
        masses="\n".join(row(str(i), *map(percent, heads)) for i, heads in enumerate(first)),
        densities=" | ".join(f"{100 * density:g} %" for density in DENSITIES),
        density_rules="---|" * len(DENSITIES),
        curves="\n".join(row(task, *map(percent, shares)) for task, shares in sparse.items()),
        verdict=verdict(sparse),
        **{name: training[name] for name in ("steps", "minutes", "machine", "note")},
    )


def main() -> None:
    torch.set_flush_denormal(True)  # attention has many, which take most of the time
    directory = Path(sys.argv[1])
    text = card(directory, samples=100)
    write_file(directory / "README.md", text.encode(), "card")


if __name__ == "__main__":
    main()
