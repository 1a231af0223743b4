"""Milliseconds per decoded token, against Hugging Face eager and compiled, in one run.

    python benchmarks/decode.py                      # 110M shape, contexts 128 and 1,000
    python benchmarks/decode.py --kv-heads 4 --dtype bfloat16 --json -

HF eager keeps a DynamicCache; HF compiled is torch.compile over a StaticCache, as Hugging Face's
own generate does it. The model is a Llama with random weights. Every candidate decodes the same
tokens in turns (A, B, C, D, A, B, ...), and nothing is timed before all of them gave the logits of
the original: else the exit code is 1. The floor is what reading each weight and each kept key and
value once would take.
"""

from __future__ import annotations

import argparse
import functools
import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from timing import Samples, machine, read_bandwidth, save_result, timed
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

from rewriter import optimize

MAX_ERROR = {torch.float32: 1e-3, torch.bfloat16: 1e-1}
"""Largest |logits - the original's| over the largest |logit|."""
WARM_STEPS = 3

Prefill = Callable[[Tensor], Any]
"""Feeds a prompt [1, context] and returns the state."""
Step = Callable[[Any, Tensor], Tensor]
"""Feeds one token [1, 1] and returns the logits [1, 1, vocab_size]."""


@dataclass(frozen=True)
class Candidate:
    """One way to decode: how the prompt goes in, and how one more token does."""

    name: str
    prefill: Prefill
    step: Step


class WrongNumbers(Exception):
    """A candidate's logits are not the original's."""


def main() -> int:
    """Run, print and store. Returns the exit code."""
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    console = Console(stderr=arguments.json == "-")
    model = _model(arguments)
    length = max(arguments.contexts) + WARM_STEPS + arguments.rounds * arguments.steps + 1
    candidates = _candidates(model, length, arguments)
    result: dict[str, Any] = {"machine": machine(arguments.threads), "shape": _shape(model)}
    result["bandwidth_gb_s"] = round(read_bandwidth() / 1e9, 1)
    try:
        with torch.no_grad():
            result["contexts"] = [
                _context(model, candidates, context, arguments, result["bandwidth_gb_s"], console)
                for context in arguments.contexts
            ]
    except WrongNumbers as error:
        console.print(f"[red]not timed: {error}")
        return 1
    _store(result, arguments, console)
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--contexts", type=int, nargs="+", default=[128, 1000], metavar="TOKENS")
    parser.add_argument("--hidden-size", type=int, default=768)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--kv-heads", type=int, default=12)
    parser.add_argument("--intermediate-size", type=int, default=2048)
    parser.add_argument("--vocab-size", type=int, default=32_000)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rounds", type=int, default=8, help="turns of every candidate")
    parser.add_argument("--steps", type=int, default=8, help="tokens a turn")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--no-inductor", action="store_true", help="leave out compiled candidates")
    parser.add_argument("--json", default="", help="also print the result: -; or write this file")
    return parser.parse_args()


def _model(arguments: argparse.Namespace) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=arguments.vocab_size,
        hidden_size=arguments.hidden_size,
        intermediate_size=arguments.intermediate_size,
        num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.heads,
        num_key_value_heads=arguments.kv_heads,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        attn_implementation="sdpa",
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval().to(getattr(torch, arguments.dtype))


def _shape(model: LlamaForCausalLM) -> dict[str, Any]:
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    shape = {name: getattr(model.config, name) for name in names}
    shape["intermediate_size"] = model.config.intermediate_size
    shape["vocab_size"] = model.config.vocab_size
    shape["dtype"] = str(model.dtype).removeprefix("torch.")
    shape["parameters"] = sum(p.numel() for p in model.parameters())
    return shape


def _candidates(
    model: LlamaForCausalLM, length: int, arguments: argparse.Namespace
) -> list[Candidate]:
    found = [_hugging_face_eager(model), _ours(model, "eager", length)]
    if not arguments.no_inductor:
        found.insert(1, _hugging_face_compiled(model, length))
        found.append(_ours(model, "inductor", length))
    return found


def _hugging_face_eager(model: LlamaForCausalLM) -> Candidate:
    def prefill(prompt: Tensor) -> DynamicCache:
        cache = DynamicCache(config=model.config)
        model(prompt, past_key_values=cache, logits_to_keep=1)
        return cache

    def step(cache: DynamicCache, token: Tensor) -> Tensor:
        return model(token, past_key_values=cache).logits

    return Candidate("HF eager", prefill, step)


def _hugging_face_compiled(model: LlamaForCausalLM, length: int) -> Candidate:
    """As Hugging Face's own generate does it: the prompt eagerly, then a compiled step."""
    compiled = torch.compile(model.forward, fullgraph=True, dynamic=False)

    def prefill(prompt: Tensor) -> StaticCache:
        cache = StaticCache(config=model.config, max_cache_len=length)
        model(prompt, past_key_values=cache, logits_to_keep=1)
        return cache

    def step(cache: StaticCache, token: Tensor) -> Tensor:
        return compiled(token, past_key_values=cache).logits

    return Candidate("HF compiled", prefill, step)


def _ours(model: LlamaForCausalLM, backend: str, length: int) -> Candidate:
    optimized = optimize(model, backend=backend)

    def prefill(prompt: Tensor) -> Any:
        session = optimized.session(1, capacity=length)
        session.run(prompt, logits_to_keep=1)
        return session

    def step(session: Any, token: Tensor) -> Tensor:
        return session.run(token, logits_to_keep=1)

    return Candidate(f"rewriter {backend}", prefill, step)


def _context(
    model: LlamaForCausalLM,
    candidates: Sequence[Candidate],
    context: int,
    arguments: argparse.Namespace,
    bandwidth: float,
    console: Console,
) -> dict[str, Any]:
    """Check, then time, all candidates behind a prompt of `context` tokens."""
    generator = torch.Generator().manual_seed(context)
    total = context + WARM_STEPS + arguments.rounds * arguments.steps
    tokens = torch.randint(0, model.config.vocab_size, (1, total), generator=generator)
    states = [candidate.prefill(tokens[:, :context]) for candidate in candidates]
    error = _check(model, candidates, states, tokens, context)
    samples, recompiled = _timed_rounds(candidates, states, tokens, context, arguments)
    floor = _floor_bytes(model, context) / bandwidth / 1e6
    console.print(_table(samples, context, floor, recompiled))
    return {
        "context": context,
        "floor_ms": round(floor, 3),
        "largest_relative_error": error,
        "graphs_compiled_while_timing": recompiled,
        "candidates": {s.name: s.as_dict() for s in samples},
        "ratios": _ratios(samples),
    }


def _check(
    model: LlamaForCausalLM,
    candidates: Sequence[Candidate],
    states: Sequence[Any],
    tokens: Tensor,
    context: int,
) -> float:
    """The first steps, which also compile, against the original without a cache."""
    end = context + WARM_STEPS
    expected = model(tokens[:, :end], use_cache=False).logits[:, context:].float()
    worst = 0.0
    for candidate, state in zip(candidates, states, strict=True):
        steps = [candidate.step(state, tokens[:, i : i + 1]).clone() for i in range(context, end)]
        difference = (torch.cat(steps, dim=1).float() - expected).abs().max()
        error = (difference / expected.abs().max()).item()
        if not error <= MAX_ERROR[model.dtype]:
            raise WrongNumbers(f"{candidate.name} differs by {error:.1e} at context {context}")
        worst = max(worst, error)
    return worst


def _timed_rounds(
    candidates: Sequence[Candidate],
    states: Sequence[Any],
    tokens: Tensor,
    context: int,
    arguments: argparse.Namespace,
) -> tuple[list[Samples], int]:
    """Candidates in turns, all at the same context; and how many graphs were compiled meanwhile."""
    samples = [Samples(candidate.name) for candidate in candidates]
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    start = context + WARM_STEPS
    for first in range(start, start + arguments.rounds * arguments.steps, arguments.steps):
        for candidate, state, own in zip(candidates, states, samples, strict=True):
            for i in range(first, first + arguments.steps):
                step = functools.partial(candidate.step, state, tokens[:, i : i + 1])
                own.ms.append(timed(step)[1])
    return samples, torch._dynamo.utils.counters["stats"]["unique_graphs"] - graphs


def _floor_bytes(model: LlamaForCausalLM, context: int) -> int:
    """Bytes that one token has to read: every weight of a product once, and the kept entries."""
    config = model.config
    head_dim = config.hidden_size // config.num_attention_heads
    entries = 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim * context
    return (sum(p.numel() for p in model.parameters()) + entries) * model.dtype.itemsize


def _ratios(samples: Sequence[Samples]) -> dict[str, dict[str, float]]:
    """Speedups of ours over the others: medians, and quickest times."""
    ours = [s for s in samples if s.name.startswith("rewriter")]
    others = [s for s in samples if s not in ours]
    return {
        f"{mine.name} over {other.name}": {
            "p50": round(other.p50 / mine.p50, 3),
            "min": round(other.least / mine.least, 3),
        }
        for mine in ours
        for other in others
    }


def _table(samples: Sequence[Samples], context: int, floor: float, recompiled: int) -> Table:
    caption = f"floor {floor:.2f} ms; {recompiled} graphs compiled while timing"
    table = Table(title=f"decode at {context} tokens of context, ms per token", caption=caption)
    table.add_column("candidate")
    others = [s for s in samples if not s.name.startswith("rewriter")]
    headers = ["min", "p10", "p50", "p90", *(f"vs {s.name}" for s in others)]
    for header in headers:
        table.add_column(header, justify="right")
    for s in samples:
        times = (s.least, s.percentile(10), s.p50, s.percentile(90))
        speedups = (other.p50 / s.p50 for other in others)
        table.add_row(s.name, *(f"{ms:.2f}" for ms in times), *(f"{x:.2f}x" for x in speedups))
    return table


def _store(result: dict[str, Any], arguments: argparse.Namespace, console: Console) -> None:
    shape = result["shape"]
    size, heads = shape["parameters"] // 10**6, shape["num_key_value_heads"]
    name = f"decode-{size}M-{heads}kv-{shape['dtype']}"
    console.print(f"stored in {save_result(name, result)}", highlight=False)
    if arguments.json == "-":
        sys.stdout.write(json.dumps(result, indent=1) + "\n")
    elif arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump(result, file, indent=1)


if __name__ == "__main__":
    sys.exit(main())
