"""Milliseconds per decoded token of a whole Llama, beside other runtimes, in one run.

    python benchmarks/whole_model.py --shape 110m --dtype float32 --peers-python PEERS/bin/python
    python benchmarks/whole_model.py --shape 1b --dtype int8 --contexts 128,2048 --threads 2
    python benchmarks/whole_model.py --shape 110m --only "rewriter cpu" --profile

The weights are random, the same for all: `110m`, `110m-gqa` (4 KV heads), or `1b` (the shape of
Llama 3.2 1B with its 128,256 tokens); the embeddings are tied. Every candidate runs in a process of
its own with the same number of threads, is stopped while it is not its turn, and takes turns with
the others (A, B, C, A, B, C, ...); where memory is short, in groups. All decode the same tokens, batch
of one. Nothing is timed before its logits are those of Hugging Face in float32 on the same weights;
a candidate that is wrong or cannot run is reported with the reason.

A candidate's floor is what reading its weights (with the scales of int8) and its keys and values once
takes, at the best bandwidth that plain loops over as many bytes reached between the turns of this run.

The other runtimes need packages that pin versions of their own, so they are best installed apart:

    python -m venv PEERS
    PEERS/bin/pip install -c constraints.txt torch transformers rich onnx onnxruntime
    PEERS/bin/pip install -c constraints.txt -r benchmarks/requirements-peers.txt
    CXXFLAGS="-fno-tree-dse -fno-dse" CMAKE_ARGS="-DGGML_NATIVE=ON" \\
        PEERS/bin/pip install --no-binary llama-cpp-python llama-cpp-python

(GCC 12 drops stores that llama.cpp's AMX code needs: without these flags, int8 crashes on processors
with AMX.)
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cpu_kernels.read import read_candidates
from peers.agreement import agreement
from peers.candidates import CANDIDATES, REFERENCE, Candidate
from peers.client import Client, Failed, room_for_more
from peers.llama import SHAPES, write_model
from peers.outcome import Outcome, Timed, as_dict, phase_table, table
from rich.console import Console
from timing import Samples, machine, save_result, timed
from torch import Tensor

CHECKED_STEPS = 8
"""Tokens behind the prompt whose logits are compared; what compiles does it there."""
UNTIMED = 1
"""First tokens of a turn: the process was stopped, its caches hold other weights."""
MOST_READ_MIB = 1024
"""Bandwidth is measured on as many bytes as a token reads, but not on more: beyond, it is the same."""


@dataclass
class Run:
    """What all steps of a run need to know."""

    arguments: argparse.Namespace
    model_dir: Path
    console: Console
    bandwidth: dict[int, float]  # MiB read -> best bytes a second so far
    begun: float

    def tell(self, what: str) -> None:
        self.console.print(f"{time.perf_counter() - self.begun:4.0f} s  {what}", highlight=False)

    @property
    def work_dir(self) -> Path:
        return self.model_dir.parent

    def client(self, candidate: Candidate) -> Client:
        python = self.arguments.peers_python if candidate.installed_apart else sys.executable
        name = candidate.name.replace(" ", "-").lower()
        log = self.work_dir / f"{name}-{self.arguments.dtype}.log"
        return Client(python, self.arguments.threads, log)

    def tokens(self, context: int) -> list[int]:
        """A prompt of `context` tokens, those that are checked, and those that are timed."""
        a = self.arguments
        turns = a.rounds + a.profile
        count = context + CHECKED_STEPS + turns * (UNTIMED + a.steps)
        generator = torch.Generator().manual_seed(context)
        vocab_size = SHAPES[a.shape].vocab_size
        return torch.randint(3, vocab_size, (count,), generator=generator).tolist()


@dataclass
class Runner:
    """A candidate in memory."""

    outcome: Outcome
    client: Client

    def give_up(self, status: str, reason: str) -> None:
        """It is out of the race, and of the memory."""
        self.outcome.status, self.outcome.reason = status, reason
        self.client.close()


def main() -> int:
    """Run, print and store. Returns the exit code: 1 where a candidate was wrong or failed."""
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    stored = "bfloat16" if arguments.dtype == "bfloat16" else "float32"
    directory = Path(arguments.work_dir) / f"{arguments.shape}-{stored}" / "model"
    model_dir = write_model(directory, SHAPES[arguments.shape], getattr(torch, stored))
    console = Console(stderr=True)
    console.width = max(console.width, 100)
    run = Run(arguments, model_dir, console, {}, time.perf_counter())
    described = machine(arguments.threads)
    references = {context: _reference(run, context) for context in arguments.contexts}
    outcomes = _measure_all(run, references)
    for context in arguments.contexts:
        title = f"{arguments.shape} {arguments.dtype}, {context} tokens of context, ms per token"
        console.print(table(outcomes, context, title))
        for outcome in outcomes:
            if context in outcome.contexts and (times := outcome.contexts[context]).phases:
                console.print(phase_table(times, f"{outcome.candidate.name}, {context} tokens"))
    for outcome in outcomes:
        if outcome.status != "timed":
            console.print(f"{outcome.candidate.name}: {outcome.status}: {outcome.reason}")
    result = {
        "machine": described,
        "shape": {"name": arguments.shape, **vars(SHAPES[arguments.shape])},
        "dtype": arguments.dtype,
        "batch_size": 1,
        "rounds": arguments.rounds,
        "steps_per_turn": arguments.steps,
        "read_gb_s": {f"{mib} MiB": round(b / 1e9, 2) for mib, b in run.bandwidth.items()},
        "seconds": round(time.perf_counter() - run.begun),
        **as_dict(outcomes, arguments.contexts),
    }
    _store(result, arguments, console)
    return int(any(outcome.status in ("wrong", "failed") for outcome in outcomes))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=tuple(SHAPES), default="110m")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "int8"), default="float32")
    parser.add_argument("--contexts", type=_numbers, default=[128, 2048], metavar="TOKENS,...")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, help="turns of every candidate")
    parser.add_argument("--steps", type=int, help="timed tokens a turn")
    parser.add_argument("--only", type=_names, metavar="NAME,...", help="candidates by name")
    parser.add_argument(
        "--peers-python", default=sys.executable, help="interpreter of other runtimes"
    )
    parser.add_argument(
        "--profile", action="store_true", help="where steps of `cpu` spend their time"
    )
    parser.add_argument("--work-dir", default=str(Path(tempfile.gettempdir()) / "whole-model"))
    parser.add_argument("--json", default="", help="print the result instead of storing it: -")
    arguments = parser.parse_args()
    large = arguments.shape == "1b"
    arguments.rounds = arguments.rounds or (4 if large else 10)
    arguments.steps = arguments.steps or (4 if large else 8)
    return arguments


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def _names(text: str) -> list[str]:
    known = [candidate.name for candidate in CANDIDATES]
    names = text.split(",")
    if unknown := [name for name in names if name not in known]:
        raise argparse.ArgumentTypeError(f"{unknown} not among {known}")
    return names


def _reference(run: Run, context: int) -> np.ndarray:
    """Logits behind the prompt and the checked tokens, [1 + CHECKED_STEPS, vocab_size] fp32."""
    path = run.work_dir / f"reference-{context}-{CHECKED_STEPS}.npy"
    if not path.exists():
        client = run.client(REFERENCE)
        try:
            _load(run, client, REFERENCE)
            logits, _ = _prompted(run, client, context)
        finally:
            client.close()
        np.save(path, logits)
    return np.load(path)


def _measure_all(run: Run, references: dict[int, np.ndarray]) -> list[Outcome]:
    """Groups of as many candidates as memory holds, one after the other."""
    only = run.arguments.only
    chosen = [c for c in CANDIDATES if only is None or c.name in only]
    outcomes = [Outcome(candidate) for candidate in chosen]
    waiting = deque(outcome for outcome in outcomes if _prepared(run, outcome))
    number = 0
    while waiting:
        number += 1
        runners = _group(run, waiting)
        try:
            for runner in runners:
                runner.outcome.group = number
            for context in run.arguments.contexts:
                _measure(run, runners, context, references[context])
        finally:
            for runner in runners:
                runner.client.close()
    for times in (times for outcome in outcomes for times in outcome.contexts.values()):
        times.floor_ms = times.bytes_per_token / _bandwidth(run, times) * 1e3
    return outcomes


def _prepared(run: Run, outcome: Outcome) -> bool:
    """Convert files, in a process that leaves no memory behind. False where it cannot."""
    if not outcome.candidate.installed_apart:
        return True
    client = run.client(outcome.candidate)
    try:
        client.call("prepare", **_what(run, outcome.candidate))
    except Failed as error:
        outcome.status, outcome.reason = _status(error), str(error)
    finally:
        client.close()
    return outcome.status == "timed"


def _what(run: Run, candidate: Candidate) -> dict[str, Any]:
    return {
        "module": candidate.module,
        "model_dir": str(run.model_dir),
        "dtype": run.arguments.dtype,
    }


def _status(error: Failed) -> str:
    return "unavailable" if error.unavailable else "failed"


def _group(run: Run, waiting: deque[Outcome]) -> list[Runner]:
    """Start candidates until the next may not fit: loading can take twice the weights."""
    stored = sum(path.stat().st_size for path in run.model_dir.glob("*.safetensors"))
    runners = list[Runner]()
    while waiting:
        room = room_for_more([runner.client for runner in runners])
        if runners and room < 2.2 * stored + 2**30:
            break
        outcome = waiting.popleft()
        run.tell(f"{outcome.candidate.name}: load")
        runner = Runner(outcome, run.client(outcome.candidate))
        start = time.perf_counter()
        try:
            outcome.facts = _load(run, runner.client, outcome.candidate)
        except Failed as error:
            runner.give_up(_status(error), str(error))
            continue
        outcome.load_s = time.perf_counter() - start
        runners.append(runner)
    return runners


def _load(run: Run, client: Client, candidate: Candidate) -> dict[str, Any]:
    options, threads = dict(candidate.options), run.arguments.threads
    return client.call("load", **_what(run, candidate), threads=threads, options=options)


def _measure(run: Run, runners: list[Runner], context: int, reference: np.ndarray) -> None:
    """Prompt and check every candidate, then take turns."""
    for runner in runners:
        if runner.outcome.status == "timed":
            _check(run, runner, context, reference)
    racing = [runner for runner in runners if context in runner.outcome.contexts]
    tokens, turn = run.tokens(context), UNTIMED + run.arguments.steps
    start = context + CHECKED_STEPS
    sizes = {_mebibytes(runner.outcome.contexts[context]) for runner in racing}
    buffer = torch.ones(2**18 * max(sizes, default=0))
    run.tell(f"{len(racing)} take turns")
    for first in range(start, start + run.arguments.rounds * turn, turn):
        for runner in racing:
            if runner.outcome.status == "timed":
                _take_turn(runner, context, tokens[first : first + turn])
        for mebibytes in sizes:
            _read(run, buffer[: 2**18 * mebibytes], mebibytes)
    for runner in racing:
        if runner.outcome.status != "timed":
            runner.outcome.contexts.clear()
        elif run.arguments.profile and runner.outcome.candidate.options.get("backend") == "cpu":
            reply = runner.client.call("profile", tokens=tokens[-turn:])
            runner.outcome.contexts[context].phases = reply["phases"]


def _check(run: Run, runner: Runner, context: int, reference: np.ndarray) -> None:
    outcome = runner.outcome
    run.tell(f"{outcome.candidate.name}: prompt of {context} tokens")
    try:
        logits, prefill_ms = _prompted(run, runner.client, context)
    except Failed as error:
        runner.give_up(_status(error), str(error))
        return
    found = agreement(logits, reference)
    if objection := found.objection(run.arguments.dtype):
        runner.give_up("wrong", f"at {context} tokens of context {objection}")
        return
    outcome.memory_bytes = runner.client.memory_bytes()
    read = outcome.facts["weight_bytes"] + context * outcome.facts["entry_bytes"]
    samples = Samples(outcome.candidate.name)
    outcome.contexts[context] = Timed(found, samples, prefill_ms, read)


def _prompted(run: Run, client: Client, context: int) -> tuple[np.ndarray, float]:
    """Logits behind a prompt and behind each checked token, and the prompt's milliseconds."""
    tokens, path = run.tokens(context), run.work_dir / "logits.npy"
    prompt, checked = tokens[:context], tokens[context : context + CHECKED_STEPS]
    reply = client.call("prefill", tokens=prompt, capacity=len(tokens), logits=str(path))
    first = np.load(path)
    client.call("step", tokens=checked, untimed=0, logits=str(path))
    return np.concatenate([first, np.load(path)]), reply["ms"]


def _take_turn(runner: Runner, context: int, tokens: Sequence[int]) -> None:
    try:
        reply = runner.client.call("step", tokens=list(tokens), untimed=UNTIMED, logits="")
    except Failed as error:
        runner.give_up(_status(error), str(error))
        return
    runner.outcome.contexts[context].samples.ms.extend(reply["ms"])


def _read(run: Run, buffer: Tensor, mebibytes: int) -> None:
    """The best bandwidth so far of only adding up this many bytes, in each of several ways."""
    for read in read_candidates(buffer, run.arguments.threads).values():
        ms = min(timed(read)[1] for _ in range(2))
        found = buffer.nbytes / ms * 1e3
        run.bandwidth[mebibytes] = max(found, run.bandwidth.get(mebibytes, 0.0))


def _mebibytes(times: Timed) -> int:
    """Read by one token, rounded up to a multiple of 32, so that candidates share what is measured."""
    return min(MOST_READ_MIB, 32 * math.ceil(times.bytes_per_token / 2**25))


def _bandwidth(run: Run, times: Timed) -> float:
    """Bytes a second of reading as much as one token does: no less than where more was read."""
    least = _mebibytes(times)
    return max(found for mebibytes, found in run.bandwidth.items() if mebibytes >= least)


def _store(result: dict[str, Any], arguments: argparse.Namespace, console: Console) -> None:
    if arguments.json == "-":
        sys.stdout.write(json.dumps(result, indent=1) + "\n")
        return
    path = save_result(f"whole-model-{arguments.shape}-{arguments.dtype}", result)
    console.print(f"stored in {path}", highlight=False)


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    sys.exit(main())
