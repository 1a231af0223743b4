"""Does an artifact compute what the optimized program computes? Asked in a process of its own.

    python -m rewriter.export.pt2_check ARTIFACT CASES

CASES is a safetensors file: inputs and what the program makes of them. What differs is printed as JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rewriter.decoding.mixing import probe_tokens
from rewriter.decoding.state import Session
from rewriter.errors import VerificationError
from rewriter.export.pt2_entry import Limits
from rewriter.export.pt2_step import CarriedSteps
from rewriter.optimized import OptimizedModel
from rewriter.verify.compare import relative_error
from rewriter.verify.inputs import whole_scenarios
from rewriter.verify.scenarios import FlatScenario
from rewriter.verify.tolerances import end_to_end_tolerance
from rewriter.verify.verification import Verification

__all__ = ["check_artifact"]

PROMPTS, STEPS = (1, 2, 7, 64), 6
"""Tokens of a prompt, and how many are chosen greedily behind each."""
_TIMEOUT_S = 900


@dataclass(frozen=True)
class Case:
    """Inputs by name, and what came out."""

    name: str
    inputs: dict[str, Tensor]
    outputs: list[Tensor]


def check_artifact(optimized: OptimizedModel, path: Path, limits: Limits | None) -> list[str]:
    """Load the artifact in another process and compare; the names of the cases that agreed.

    Raises:
        VerificationError: it cannot be loaded there, or differs. Says where.
    """
    with torch.no_grad(), tempfile.TemporaryDirectory(prefix="rewriter-") as directory:
        cases = list(_cases(optimized, limits))
        place = Path(directory) / "cases.safetensors"
        save_file(_flat(cases), place)
        told = _run(path, place)
    if told.get("problem"):
        raise VerificationError(f"the artifact differs from the program: {told['problem']}")
    return [case.name for case in cases]


def _run(path: Path, cases: Path) -> dict[str, Any]:
    root = str(Path(__file__).parents[2])
    threads = str(torch.get_num_threads())
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH")))),
        "OMP_NUM_THREADS": threads,
    }
    command = [sys.executable, "-m", "rewriter.export.pt2_check", str(path), str(cases)]
    run = subprocess.run(command, capture_output=True, text=True, env=env, timeout=_TIMEOUT_S)
    lines = run.stdout.strip().splitlines()
    if run.returncode != 0 or not lines:
        told = run.stderr.strip().splitlines() or [f"exit status {run.returncode}"]
        raise VerificationError(f"the artifact cannot be loaded in a new process: {told[-1]}")
    return json.loads(lines[-1])


def _cases(optimized: OptimizedModel, limits: Limits | None) -> Iterator[Case]:
    program = optimized.program
    if limits is None:
        for scenario in whole_scenarios(program, Verification()):
            assert isinstance(scenario, FlatScenario)
            inputs = {name: value.contiguous() for name, value in scenario.inputs.items()}
            yield Case(scenario.name, inputs, list(scenario.candidate(program, optimized.run)))
        return
    room = min(limits.max_length, program.meta.get("max_positions") or limits.max_length)
    for length in PROMPTS:
        length = min(length, room - STEPS)
        ids = probe_tokens(program, limits.batch, length, seed=length)
        yield _decoded(optimized, f"prompt {limits.batch}x{length}", ids, torch.ones_like(ids))
    if limits.batch > 1:
        ids = probe_tokens(program, limits.batch, min(7, room - STEPS), seed=1)
        starts = torch.arange(limits.batch) % ids.shape[1]
        mask = (torch.arange(ids.shape[1]) >= starts[:, None]).long()
        yield _decoded(optimized, f"left padded {limits.batch}x{ids.shape[1]}", ids, mask)


def _decoded(optimized: OptimizedModel, name: str, ids: Tensor, mask: Tensor) -> Case:
    """A prompt, and greedy tokens behind it."""
    session = Session(optimized.program, ids.shape[0], run=optimized.run)
    logits = [_fed(session, ids, mask)]
    tokens = []
    for _ in range(STEPS):
        tokens.append(logits[-1][:, -1:].argmax(-1))
        logits.append(session.run(tokens[-1]))
    inputs = {"input_ids": ids, "attention_mask": mask, "tokens": torch.cat(tokens, dim=1)}
    return Case(name, inputs, [_seen(logits, mask)])


def _fed(session: Session, ids: Tensor, mask: Tensor) -> Tensor:
    return session.run(ids, attention_mask=None if bool(mask.all()) else mask)


def _seen(logits: list[Tensor], mask: Tensor) -> Tensor:
    """Logits [batch, rows, vocab] with those of padding, which mean nothing, at 0."""
    prompt = logits[0].masked_fill((mask == 0).unsqueeze(-1), 0)
    return torch.cat((prompt, *logits[1:]), dim=1)


def _flat(cases: list[Case]) -> dict[str, Tensor]:
    flat: dict[str, Tensor] = {}
    for i, case in enumerate(cases):
        for name, value in case.inputs.items():
            flat[f"{i}.in.{name}"] = value.detach().contiguous().clone()
        for j, value in enumerate(case.outputs):
            flat[f"{i}.out.{j}"] = value.detach().contiguous().clone()
    return flat


def _problem(path: str, cases: str) -> str | None:
    """The first case that comes out otherwise. Runs in the new process."""
    from rewriter.export.pt2_model import BACKEND, load_pt2

    model = load_pt2(path)
    if model.report.backend != BACKEND:
        return model.report.notes[-1]
    flat = load_file(cases)
    with torch.no_grad():
        problem = _difference(model, flat)
        if problem is None and isinstance(model.run, CarriedSteps):  # the entry that they stand for
            model.run = model.run.fallback
            problem = _difference(model, flat)
    return problem


def _difference(model: OptimizedModel, flat: dict[str, Tensor]) -> str | None:
    for i in sorted({int(key.split(".", 1)[0]) for key in flat}):
        inputs = {key.split(".", 2)[2]: v for key, v in flat.items() if key.startswith(f"{i}.in.")}
        for j, output in enumerate(_outputs(model, inputs)):
            expected = flat[f"{i}.out.{j}"]
            error = relative_error(output, expected)
            if not error <= end_to_end_tolerance(expected.dtype):
                shapes = ", ".join(f"{n} {list(v.shape)}" for n, v in inputs.items())
                return f"output {j} for {shapes} has the relative error {error:.2g}"
    return None


def _outputs(model: OptimizedModel, inputs: dict[str, Tensor]) -> list[Tensor]:
    program = model.program
    if program.decoding is None:
        return list(model.run(*[inputs[node.name] for node in program.placeholders()]))
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    session = model.session(ids.shape[0])
    logits = [_fed(session, ids, mask)]
    logits += [session.run(token) for token in inputs["tokens"].split(1, dim=1)]
    return [_seen(logits, mask)]


if __name__ == "__main__":
    print(json.dumps({"problem": _problem(sys.argv[1], sys.argv[2])}))  # noqa: T201
