"""This project: `rewriter.optimize`, with a backend and, for int8, a pass for the weights."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch

import rewriter
from codegen.step import NativeStep
from codegen.step.profile import PhaseTime, profiled
from peers.hugging_face import llama_facts, read_model
from peers.peer import Facts, Unavailable
from rewriter.decoding.state import Session
from rewriter.errors import ConfigError
from rewriter.program import Program

__all__ = ["load"]

INT8_PASS = "int8-weights"


def load(model_dir: Path, dtype: str, threads: int, *, backend: str) -> Rewritten:
    """Raises Unavailable where a backend or a pass is."""
    torch.set_num_threads(threads)
    model = read_model(model_dir)
    passes: Any = ["default", INT8_PASS] if dtype == "int8" else "default"
    try:  # unverified: the logits are compared with the original's before anything is timed
        optimized = rewriter.optimize(model, passes=passes, backend=backend, verify=False)
    except ConfigError as error:
        raise Unavailable(str(error)) from error
    settings = f"passes {passes}" if dtype == "int8" else "passes default"
    return Rewritten(optimized, llama_facts(model, f"{settings}, backend {backend}"))


class Rewritten:
    """An optimized model with a session."""

    def __init__(self, optimized: Any, facts: Facts) -> None:
        self._optimized = optimized
        self.facts = dataclasses.replace(facts, weight_bytes=_weight_bytes(optimized.program))

    def prefill(self, tokens: Sequence[int], capacity: int) -> Any:
        self._session = self._optimized.session(1, capacity=capacity)
        return self._session.run(torch.tensor([tokens]), logits_to_keep=1)[0, -1]

    def step(self, token: int) -> Any:
        return self._session.run(torch.tensor([[token]]), logits_to_keep=1)[0, -1]

    def profile(self, tokens: Sequence[int]) -> list[dict[str, Any]]:
        """Where a step's time goes, phases of one kind together. Raises Unavailable without C++."""
        native = self._optimized.run
        if not isinstance(native, NativeStep):
            raise Unavailable("only steps of the cpu backend are profiled")
        with profiled(native) as profile:
            self.step(tokens[0])  # the text with clocks is compiled, its memory touched
            profile.restart()
            start = time.perf_counter()
            for token in tokens[1:]:
                self.step(token)
            steps = len(tokens) - 1
            ms = (time.perf_counter() - start) * 1e3 / steps
            phases = profile.phases(steps, _state_bytes(self._session))
        return _by_kind(phases, ms)


def _state_bytes(session: Session) -> dict[str, float]:
    """Of each state, what is filled."""
    specs = session.program.decoding
    assert specs is not None
    filled = dict[str, float]()
    for spec in specs.states:
        tensor = session._state[spec.name]
        rows = 1 if spec.bounded else tensor.shape[spec.dims.index("capacity")]
        filled[spec.name] = tensor.nbytes * (1 if spec.bounded else session.entries / rows)
    return filled


def _by_kind(phases: Sequence[PhaseTime], ms: float) -> list[dict[str, Any]]:
    """Longest first; `outside` is what a step takes around its C++."""
    kinds = dict[str, dict[str, Any]]()
    for phase in phases:
        kind = kinds.setdefault(phase.name, {"calls": 0, "ms": 0.0, "waiting_ms": 0.0, "bytes": 0})
        kind["calls"] += 1
        kind["ms"] += phase.ms
        kind["waiting_ms"] += phase.waiting_ms
        kind["bytes"] += round(phase.bytes)
    outside = ms - sum(kind["ms"] for kind in kinds.values())
    kinds["outside"] = {"calls": 1, "ms": outside, "waiting_ms": 0.0, "bytes": 0}
    ordered = sorted(kinds.items(), key=lambda item: -item[1]["ms"])
    return [{"phase": name, **kind} for name, kind in ordered]


def _weight_bytes(program: Program) -> int:
    """Of every tensor that the graph uses, but those that are only looked up in."""
    lookup, used = torch.ops.aten.embedding.default, dict[int, int]()
    for node in program.graph.find_nodes(op="get_attr"):
        if any(user.target is not lookup for user in node.users):
            tensor = attrgetter(str(node.target))(program.module)
            used[tensor.data_ptr()] = tensor.nbytes
    return sum(used.values())
