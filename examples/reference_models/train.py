"""Train `reasoner`, a small Llama that calculates, remembers and looks things up.

    python examples/reference_models/train.py -o examples/models/reasoner

Everything is generated from the seed. `--bf16` computes in mixed precision, which pays on processors
with bf16 matrix products; `--compile` fuses what is between the products, which pays in long trainings.
`--minutes` fits the schedule into a time, and `--start` goes on from another model.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import attention
import torch
from evaluate import table
from muon import Muon
from sequences import Sequences
from tokenizer import build_tokenizer
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

MAX_POSITIONS = 4096
TOKENS_PER_STEP = 9216
CONTEXT_SHARES = {64: 0.5, 128: 0.5, 256: 0.3, 512: 0.5, 1024: 0.9, 2304: 0.95}
"""Share of rows about contexts, by length; the others are problems, for which short rows are cheapest."""

CURRICULUM = (
    (0.05, {64: 1.0}),
    (0.15, {128: 1.0}),
    (0.35, {128: 0.4, 256: 0.4, 512: 0.2}),
    (0.60, {256: 0.6, 512: 0.25, 1024: 0.15}),
    (1.00, {256: 0.5, 512: 0.15, 1024: 0.15, 2304: 0.2}),
)
"""Until this part of the training: share of steps by row length."""

GROWN = 0.35
"""Part of the curriculum that is left out when a trained model goes on."""

MATRIX_RATE, OTHER_RATE = 0.02, 3e-3
WARMUP, COOLDOWN = 0.02, 0.65
"""Parts of the training in which the learning rates rise and fall linearly."""

LOG_EVERY, SAVE_EVERY, EVALUATE_EVERY = 20, 200, 1000


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


def optimizers(model: Any, scale: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for embeddings and norms."""
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    return [
        Muon(matrices, lr=MATRIX_RATE * scale),
        torch.optim.AdamW(others, lr=OTHER_RATE * scale, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def rate(done: float) -> float:
    """Of the learning rates, by the part of the training done."""
    return min(1.0, done / WARMUP, (1 - done) / COOLDOWN)


def sequence_length(done: float, rng: random.Random) -> int:
    """Drawn by the shares of the part of the training."""
    shares = next(shares for until, shares in CURRICULUM if done <= until)
    return rng.choices(list(shares), list(shares.values()))[0]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a training does.

    Attributes:
        steps: at most; the schedule is over these. minutes: if given, the schedule is over this time.
        rates: multiplier of the learning rates. grown: the model is trained already, and leaves the
            shortest rows out.
    """

    steps: int
    minutes: float = math.inf
    seed: int = 0
    rates: float = 1.0
    grown: bool = False
    bf16: bool = False
    compile: bool = False


def train(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    plan: Plan,
    after_step: Callable[[int, bool, float], None],
) -> None:
    """The loop: loss on what is to be learned, one optimizer step a batch.

    `after_step` is called with the steps done, whether that was the last, and the loss.
    """
    rng, data = random.Random(plan.seed), Sequences(tokenizer, plan.seed)
    chosen, loss_of = optimizers(model, plan.rates), Loss(model.lm_head)
    attention.use_tiled_attention(model)
    if plan.compile:
        compile_parts(model, loss_of)
    skipped = GROWN if plan.grown else 0.0
    started, done, step = time.monotonic(), 0.0, 0
    while done < 1:
        length = sequence_length(skipped + (1 - skipped) * done, rng)
        batch = data.batch(TOKENS_PER_STEP // length, length, CONTEXT_SHARES[length])
        ids, labels = map(torch.from_numpy, batch)
        learned = labels >= 0
        with torch.autocast("cpu", torch.bfloat16, enabled=plan.bf16):
            hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
            loss = loss_of(hidden[learned], labels[learned])
        loss.backward()
        with torch.autocast("cpu", torch.bfloat16, enabled=plan.bf16):
            for optimizer in chosen:
                for group in optimizer.param_groups:
                    group["lr"] = group.setdefault("peak", group["lr"]) * rate(done)
                optimizer.step()
                optimizer.zero_grad()
        step += 1
        done = max(step / plan.steps, (time.monotonic() - started) / 60 / plan.minutes)
        after_step(step, done >= 1, loss.item())


class Loss(nn.Module):
    """Mean cross entropy of rows [n, hidden_size] to token ids [n], in fp32."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, hidden: Tensor, ids: Tensor) -> Tensor:
        return functional.cross_entropy(self.head(hidden).float(), ids)


def compile_parts(model: Any, loss_of: nn.Module) -> None:
    """One layer for all, once for every length; what has a varying size, once."""
    for layer in model.model.layers:
        layer.compile(dynamic=False)
    loss_of.compile(dynamic=True)
    attention.score_grads = torch.compile(attention.score_grads, dynamic=True)


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


def scores(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> str:
    """Accuracy on a few samples, of a copy that is not compiled."""
    copy = LlamaForCausalLM(model.config).eval()
    copy.set_attn_implementation("sdpa")
    copy.load_state_dict(model.state_dict())
    found = table(copy, tokenizer, samples=24)
    return " ".join(f"{name}: {score:.0%}" for name, score in found.items())


def arguments() -> argparse.Namespace:
    """Of the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--start", type=Path, help="go on from this model instead of from nothing")
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--minutes", type=float, default=math.inf, help="end after so long")
    parser.add_argument("--rates", type=float, default=1.0, help="multiplier of learning rates")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bf16", action="store_true", help="compute in mixed precision")
    parser.add_argument("--compile", action="store_true", help="needs a C++ compiler")
    return parser.parse_args()


def main() -> None:
    """Train, saving on the way."""
    given = arguments()
    torch.manual_seed(given.seed)
    torch.set_flush_denormal(True)  # attention has many: they take a third of the time
    tokenizer = build_tokenizer(MAX_POSITIONS)
    specials = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    model = new_model(len(tokenizer), *specials)
    before = {"steps": 0, "tokens": 0, "minutes": 0.0, "note": ""}
    if given.start:
        model = LlamaForCausalLM.from_pretrained(given.start, dtype=torch.float32)
        tokenizer = PreTrainedTokenizerFast.from_pretrained(given.start)
        before = json.loads((given.start / "training.json").read_text())
        before["note"] = f"It went on from a model of {before['steps']:,} steps. {before['note']}"
    started = time.monotonic()

    def after_step(step: int, last: bool, loss: float) -> None:
        minutes = (time.monotonic() - started) / 60
        if step % LOG_EVERY == 0:
            speed = step * TOKENS_PER_STEP / 60 / minutes
            print(f"{step:6} {minutes:6.1f} min {speed:6.0f} tokens/s: {loss:.3f}", flush=True)
        if step % SAVE_EVERY == 0 or last:
            training = {
                "seed": given.seed,
                "steps": step + before["steps"],
                "tokens": step * TOKENS_PER_STEP + before["tokens"],
                "bf16": given.bf16,
                "minutes": minutes + before["minutes"],
                "machine": machine(),
                "note": before["note"].strip(),
            }
            save(model, tokenizer, given.output, training)
        if step % EVALUATE_EVERY == 0 or last:
            print(scores(model, tokenizer), flush=True)

    plan = Plan(
        steps=given.steps,
        minutes=given.minutes,
        seed=given.seed,
        rates=given.rates,
        grown=given.start is not None,
        bf16=given.bf16,
        compile=given.compile,
    )
    train(model, tokenizer, plan, after_step)


if __name__ == "__main__":
    main()
