"""Train `reasoner`, a small Llama that calculates, remembers and looks things up.

    python examples/reference_models/train.py -o examples/models/reasoner

Everything is generated from the seed. `--bf16` computes in mixed precision, which pays on processors
with bf16 matrix products.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from evaluate import table
from muon import Muon
from sequences import Sequences
from tokenizer import build_tokenizer
from torch import nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

MAX_POSITIONS = 4096
TOKENS_PER_STEP = 8192
CONTEXT_SHARE = 0.55
"""Share of sequences that are about one context; the others are problems."""

CURRICULUM = (
    (0.05, {64: 1.0}),
    (0.15, {128: 1.0}),
    (0.35, {128: 0.4, 256: 0.4, 512: 0.2}),
    (0.60, {256: 0.3, 512: 0.4, 1024: 0.3}),
    (1.00, {256: 0.2, 512: 0.2, 1024: 0.25, 2176: 0.35}),
)
"""Until this part of the training: share of steps by sequence length."""

MATRIX_RATE, OTHER_RATE = 0.02, 3e-3
WARMUP, COOLDOWN = 0.02, 0.35
"""Parts of the training in which the learning rates rise and fall linearly."""

LOG_EVERY, EVALUATE_EVERY = 20, 400


def new_model(vocab_size: int, bos: int, eos: int, pad: int) -> LlamaForCausalLM:
    """2.3M parameters; the MLP is narrow, so that what is remembered fills it."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        intermediate_size=384,
        max_position_embeddings=MAX_POSITIONS,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
        bos_token_id=bos,
        eos_token_id=eos,
        pad_token_id=pad,
    )
    return LlamaForCausalLM(config)


def optimizers(model: nn.Module) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for embeddings and norms."""
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    return [
        Muon(matrices, lr=MATRIX_RATE),
        torch.optim.AdamW(others, lr=OTHER_RATE, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def rate(done: float) -> float:
    """Of the learning rates, by the part of the training done."""
    return min(1.0, done / WARMUP, (1 - done) / COOLDOWN)


def sequence_length(done: float, rng: random.Random) -> int:
    shares = next(shares for until, shares in CURRICULUM if done <= until)
    return rng.choices(list(shares), list(shares.values()))[0]


def train(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    *,
    steps: int,
    seed: int,
    bf16: bool,
    after_step: Callable[[int, int, float], None],
) -> None:
    """The loop: loss on what is to be learned, one optimizer step a batch.

    `after_step` is called with the steps done, the length of the rows and the loss.
    """
    rng, data = random.Random(seed), Sequences(tokenizer, seed)
    chosen = optimizers(model)
    for step in range(steps):
        length = sequence_length(step / steps, rng)
        batch = data.batch(TOKENS_PER_STEP // length, length, CONTEXT_SHARE)
        ids, labels = map(torch.from_numpy, batch)
        learned = labels >= 0
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
            logits = model.lm_head(hidden[learned]).float()
        loss = functional.cross_entropy(logits, labels[learned])
        loss.backward()
        for optimizer in chosen:
            for group in optimizer.param_groups:
                group["lr"] = group.setdefault("peak", group["lr"]) * rate(step / steps)
            optimizer.step()
            optimizer.zero_grad()
        after_step(step + 1, length, loss.item())


def save(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    directory: Path,
    training: dict[str, Any],
) -> None:
    """In fp32, as a Hugging Face directory, with what its card says of the training."""
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    (directory / "training.json").write_text(json.dumps(training, indent=1) + "\n")


def machine() -> str:
    """Threads and instructions, in words."""
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{torch.get_num_threads()} CPU threads ({capability}), torch {torch.__version__}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--start", type=Path, help="go on from this model instead of from nothing")
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bf16", action="store_true", help="compute in mixed precision")
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    tokenizer = build_tokenizer(MAX_POSITIONS)
    specials = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    model = new_model(len(tokenizer), *specials)
    before = {"steps": 0, "minutes": 0.0, "note": ""}
    if arguments.start:
        model = LlamaForCausalLM.from_pretrained(arguments.start, dtype=torch.float32)
        before = json.loads((arguments.start / "training.json").read_text())
        before["note"] = f"It went on from a model of {before['steps']:,} steps. {before['note']}"

    started = time.perf_counter()

    def after_step(step: int, length: int, loss: float) -> None:
        if step % LOG_EVERY == 0:
            speed = step * TOKENS_PER_STEP / (time.perf_counter() - started)
            print(f"{step:6} rows of {length:5}: loss {loss:.3f}, {speed:.0f} tokens/s", flush=True)
        if step % EVALUATE_EVERY == 0 or step == arguments.steps:
            scores = table(model.eval(), tokenizer, samples=40)
            print(" ".join(f"{name}: {score:.0%}" for name, score in scores.items()), flush=True)
            model.train()
            training = {
                "seed": arguments.seed,
                "steps": step + before["steps"],
                "tokens": (step + before["steps"]) * TOKENS_PER_STEP,
                "bf16": arguments.bf16,
                "minutes": (time.perf_counter() - started) / 60 + before["minutes"],
                "machine": machine(),
                "note": before["note"],
            }
            save(model, tokenizer, arguments.output, training)

    train(
        model,
        tokenizer,
        steps=arguments.steps,
        seed=arguments.seed,
        bf16=arguments.bf16,
        after_step=after_step,
    )


if __name__ == "__main__":
    main()
