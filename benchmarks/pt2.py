"""A .pt2 beside torch.compile and the Python backends: seconds to the first token, milliseconds a token.

    python benchmarks/pt2.py                                    # 110M shape, fp32
    python benchmarks/pt2.py --shape 1b --dtype bfloat16 --no-decode

Start-up is measured in a fresh process for each candidate, with empty compilation caches, from the
start of the interpreter to the first token behind a prompt; files were read before, so that they come
from the page cache. Decoding is measured in one process in turns (A, B, C, A, B, C, ...), once all gave
the logits of the original. Where other work keeps the machine busy, compare the quickest samples.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peers.llama import SHAPES, write_model
from rich.console import Console
from rich.table import Table
from timing import Samples, machine, save_result, timed
from torch import Tensor

from rewriter import optimize
from rewriter.export.pt2 import export_pt2
from rewriter.export.pt2_model import load_pt2
from rewriter.export.pt2_step import CarriedSteps

ROOM = 1024
MAX_ERROR = {"float32": 1e-3, "bfloat16": 1e-1}
"""Largest |logits - the original's| over the largest |logit|."""
STARTS = ("HF compiled", "rewriter eager", "rewriter cpu", "pt2", "pt2, weights not hashed")

Step = Callable[[Tensor], Tensor]
"""Feeds tokens [1, q_len] behind those fed before; logits of the last."""


def main() -> int:
    """Run, print and store. Returns the exit code."""
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    if arguments.start:
        print(json.dumps(_start(arguments)))
        return 0
    model_dir, artifact = _files(arguments)
    result: dict[str, Any] = {
        "machine": machine(arguments.threads),
        "shape": {"name": arguments.shape, **vars(SHAPES[arguments.shape])},
        "dtype": arguments.dtype,
        "prompt": arguments.prompt,
        "file_bytes": artifact.stat().st_size,
        "start": {name: _started(name, arguments) for name in arguments.starts},
    }
    if not arguments.no_decode:
        result["decode"] = _decode(model_dir, artifact, arguments)
    _print(result)
    print(save_result(f"pt2-{arguments.shape}-{arguments.dtype}", result))
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=tuple(SHAPES), default="110m")
    parser.add_argument("--dtype", choices=tuple(MAX_ERROR), default="float32")
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=6, help="tokens a turn")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--no-decode", action="store_true", help="start-up alone")
    parser.add_argument("--starts", nargs="*", choices=STARTS, default=STARTS)
    parser.add_argument(
        "--work-dir", type=Path, default=Path(tempfile.gettempdir()) / "rewriter-pt2"
    )
    parser.add_argument("--start", choices=STARTS, help=argparse.SUPPRESS)
    return parser.parse_args()


def _files(arguments: argparse.Namespace) -> tuple[Path, Path]:
    """The model and its artifact, made where they are not there."""
    stem = f"{arguments.shape}-{arguments.dtype}"
    model_dir = arguments.work_dir / stem
    artifact = arguments.work_dir / f"{stem}.pt2"
    write_model(model_dir, SHAPES[arguments.shape], getattr(torch, arguments.dtype))
    if not artifact.exists():
        optimized = optimize(model_dir, backend="eager", verify=False)
        summary = export_pt2(optimized, artifact, max_length=ROOM)
        print(f"exported: {', '.join(f'{k} {v:.0f} s' for k, v in summary.seconds.items())}")
    return model_dir, artifact


def _prompt(arguments: argparse.Namespace, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, SHAPES[arguments.shape].vocab_size, (1, count), generator=generator)


# Start-up.


def _started(name: str, arguments: argparse.Namespace) -> dict[str, float]:
    """In a new process with empty caches."""
    with tempfile.TemporaryDirectory() as caches:
        env = os.environ | {
            "TORCHINDUCTOR_CACHE_DIR": f"{caches}/inductor",
            "REWRITER_CACHE": f"{caches}/rewriter",
        }
        begun = time.perf_counter()
        run = subprocess.run(
            [sys.executable, *sys.argv, "--start", name],
            env=env, capture_output=True, text=True, check=True,
        )  # fmt: skip
        told = json.loads(run.stdout.strip().splitlines()[-1])
        return {"process_s": round(time.perf_counter() - begun, 2), **told}


def _start(arguments: argparse.Namespace) -> dict[str, float]:
    """Load and decode two tokens; the first step behind the prompt is where decoding is compiled."""
    model_dir, artifact = _files(arguments)
    prompt = _prompt(arguments, arguments.prompt)
    with torch.no_grad():
        step, load_ms = timed(lambda: _candidate(arguments.start, model_dir, artifact))
        logits, first_ms = timed(lambda: step(prompt))
        _, second_ms = timed(lambda: step(logits[:, -1:].argmax(-1)))
    return {
        "load_s": round(load_ms / 1e3, 3),
        "first_token_s": round((load_ms + first_ms) / 1e3, 3),
        "second_token_s": round((load_ms + first_ms + second_ms) / 1e3, 3),
    }


# Decoding.


def _candidate(name: str, model_dir: Path, artifact: Path) -> Step:
    """A fresh session of a candidate."""
    if name.startswith("HF"):
        return _hugging_face(model_dir, compiled=name == "HF compiled")
    if name.startswith("rewriter"):
        model: Any = optimize(model_dir, backend=name.split()[1], verify=False)
    else:
        model = load_pt2(artifact, check_weights="not hashed" not in name)
    if name == "pt2, AOTInductor alone":
        assert isinstance(model.run, CarriedSteps)
        model.run = model.run.fallback
    session = model.session(1, capacity=ROOM)
    return lambda tokens: session.run(tokens, logits_to_keep=1)


def _hugging_face(model_dir: Path, *, compiled: bool) -> Step:
    """As its own generate does it: the prompt eagerly, then a step that may be compiled."""
    from transformers import AutoModelForCausalLM, StaticCache

    model: Any = AutoModelForCausalLM.from_pretrained(model_dir).eval()
    cache = StaticCache(config=model.config, max_cache_len=ROOM)
    step = torch.compile(model.forward, fullgraph=True, dynamic=False) if compiled else model

    def feed(tokens: Tensor) -> Tensor:
        call = step if tokens.shape[1] == 1 else model
        return call(tokens, past_key_values=cache, logits_to_keep=1).logits

    return feed


def _decode(model_dir: Path, artifact: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds a token of each candidate, checked first and in turns."""
    names = ("HF eager", "HF compiled", "rewriter eager", "pt2", "pt2, AOTInductor alone")
    count = arguments.prompt + 2 + arguments.rounds * (arguments.steps + 1)
    tokens = _prompt(arguments, count)
    with torch.no_grad():
        steps = {name: _candidate(name, model_dir, artifact) for name in names}
        at = arguments.prompt
        for part in (tokens[:, :at], tokens[:, at : at + 1], tokens[:, at + 1 : at + 2]):
            expected = steps["HF eager"](part)
            for name in names[1:]:
                error = float((steps[name](part) - expected).abs().max() / expected.abs().max())
                assert error < MAX_ERROR[arguments.dtype], f"{name} is wrong: {error:.2g}"
        samples = {name: Samples(name) for name in names}
        for start in range(at + 2, count, arguments.steps + 1):
            for name in names:
                for i in range(start, start + arguments.steps + 1):
                    _, ms = timed(lambda i=i, name=name: steps[name](tokens[:, i : i + 1]))
                    samples[name].ms += [ms] if i > start else []  # first of a turn: cold caches
    return {name: sample.as_dict() for name, sample in samples.items()}


def _print(result: dict[str, Any]) -> None:
    console = Console()
    table = Table("", "load s", "first token s", "second token s", "process s", title="start-up")
    for name, told in result["start"].items():
        keys = ("load_s", "first_token_s", "second_token_s", "process_s")
        table.add_row(name, *(f"{told[key]:.2f}" for key in keys))
    console.print(table)
    if "decode" in result:
        table = Table("", "min", "p10", "p50", title="milliseconds a token")
        for name, told in result["decode"].items():
            table.add_row(name, *(f"{told[key]:.1f}" for key in ("min_ms", "p10_ms", "p50_ms")))
        console.print(table)


if __name__ == "__main__":
    sys.exit(main())
