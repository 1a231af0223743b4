"""This project: `rewriter.optimize`, with a backend and, for int8, a pass for the weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch

import rewriter
from peers.hugging_face import llama_facts, read_model
from peers.peer import Facts, Unavailable
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


def _weight_bytes(program: Program) -> int:
    """Of every tensor that the graph uses, but those that are only looked up in."""
    lookup, used = torch.ops.aten.embedding.default, dict[int, int]()
    for node in program.graph.find_nodes(op="get_attr"):
        if any(user.target is not lookup for user in node.users):
            tensor = attrgetter(str(node.target))(program.module)
            used[tensor.data_ptr()] = tensor.nbytes
    return sum(used.values())
