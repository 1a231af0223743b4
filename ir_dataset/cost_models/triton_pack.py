"""Every configuration of the Triton kernels compiled ahead of time, so that a GPU has only to measure.

A pack is a directory: a store with what each text gave (cubin and features) or why it did not compile, and
`points.parquet`, one row for each family, shape and configuration. Compiling goes on where it was stopped;
texts that several points share are compiled once.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import torch

from codegen.compile import Compiled, KernelCompileError, Target, compile_each
from ir_dataset.cost_models.triton_code import features, for_launch
from ir_dataset.cost_models.triton_families import FAMILIES, Family, Recorded, Shape, recorded
from ir_dataset.executor import Outcome, Work, make_executor
from ir_dataset.sources.own_kernels import triton_llvm
from ir_dataset.store import Store, TaskRow
from rewriter.errors import ConfigError

__all__ = ["Pack", "Point", "Shown", "compile_pack", "planned", "point_name", "text_key"]

STAGE = "compile"
BATCH = 12
"""Texts of one task: what importing Triton takes is shared by them."""
TIMEOUT_S = 600.0


@dataclass(frozen=True)
class Point:
    """One configuration of a kernel at a shape.

    Attributes:
        launches: what it launches, the kernel in question first.
        keys: of their texts, as a launch specialises them.
    """

    family: Family
    shape: Shape
    config: Any
    launches: tuple[Recorded, ...]
    keys: tuple[str, ...]

    @property
    def name(self) -> str:
        """The family, the shape and the configuration as text."""
        return point_name(self.family.name, self.shape, self.config)


def point_name(family: str, shape: Shape, config: Any) -> str:
    """By which measurements are joined with features."""
    return f"{family} {json.dumps(dict(shape))} {json.dumps(asdict(config))}"


class Shown(Protocol):
    """What a person sees meanwhile; see `ir_dataset.progress`."""

    def stage(self, name: str, total: int, done: int) -> None:
        """A stage begins."""
        ...

    def advance(self, label: str, failed: bool) -> None:
        """One text is done."""
        ...


def text_key(text: str, target: str) -> str:
    """Of a text, the compiler's version and the target."""
    told = "\0".join((text, target, version("triton")))
    return hashlib.sha256(told.encode()).hexdigest()


def planned(
    target: str, families: Sequence[Family] | None = None, limit: int | None = None
) -> Iterator[tuple[Point, dict[str, str]]]:
    """Points, and for each the texts to compile by key.

    Args:
        limit: points in all, evenly from every family.

    Raises:
        ConfigError: an unknown target, or one that is not NVIDIA's.
    """
    if Target.parse(target).backend != "cuda":
        raise ConfigError("target", target, "cuda:sm_80, cuda:sm_86, cuda:sm_89 or cuda:sm_90")
    chosen = list(families or FAMILIES.values())
    share = None if limit is None else max(1, limit // len(chosen))
    for family in chosen:
        for shape, config in _even(family, share):
            case = family.make(shape, torch.device("meta"))
            launches = tuple(recorded(case, config)[0])
            texts = [for_launch(one.text, one.arguments) for one in launches]
            keys = tuple(text_key(text, target) for text in texts)
            yield Point(family, shape, config, launches, keys), dict(zip(keys, texts, strict=True))


def _even(family: Family, share: int | None) -> list[tuple[Shape, Any]]:
    every = [(shape, c) for shape in family.shapes for c in family.configurations(shape)]
    if share is None or share >= len(every):
        return every
    return [every[at * len(every) // share] for at in range(share)]


# --- compiling -----------------------------------------------------------------------------------


def compile_batch(store: Store, payload: bytes) -> str:
    """In a worker: compile texts; one that does not compile leaves the others."""
    asked = json.loads(payload)
    found = _compiled(store, asked["texts"], asked["target"])
    return store.put(json.dumps(found, sort_keys=True).encode())


def _compiled(store: Store, texts: dict[str, str], target: str) -> dict[str, dict[str, Any]]:
    """What each text gave, or `reason`."""
    begun = time.perf_counter()
    found: dict[str, dict[str, Any]] = {}
    for key, one in compile_each(texts, target).items():
        failed = isinstance(one, KernelCompileError)
        found[key] = {"reason": str(one)[-1500:]} if failed else _stored(store, one)
    taken = (time.perf_counter() - begun) / len(texts)
    return {key: {**told, "seconds": taken} for key, told in found.items()}


def _stored(store: Store, compiled: Compiled) -> dict[str, Any]:
    told = features(compiled, triton_llvm())
    values = {name: value for name, value in told.values.items() if not math.isnan(value)}
    cubin = store.put(compiled.binary)
    return {"cubin": cubin, "facts": compiled.facts, "values": values, "unread": told.reason}


class Pack:
    """A directory that `compile_pack` wrote.

    Raises:
        ConfigError: the directory is a file, or cannot be written to.
    """

    def __init__(self, root: Path | str, target: str = "cuda:sm_90") -> None:
        self.store, self.target = Store(root), target

    def row(self, key: str) -> dict[str, Any] | None:
        """What is kept of a text: `cubin`, `facts`, `values` and `unread`, or `reason`; None = not yet."""
        task = self.store.task(key)
        if task is None:
            return None
        if task.status == "failed":
            return {"reason": f"{task.error_kind}: {task.error}" if task.error_kind else task.error}
        return json.loads(self.store.get(task.output))

    def binary(self, key: str) -> tuple[bytes, dict[str, Any]] | None:
        """Cubin and facts; None where there is none."""
        row = self.row(key)
        if row is None or "cubin" not in row:
            return None
        return self.store.get(row["cubin"]), row["facts"]

    def record(self, key: str, label: str, row: dict[str, Any]) -> None:
        """Keep what a text gave."""
        if "reason" in row:
            self.store.record(TaskRow(key, STAGE, label, "failed", error=row["reason"]))
            return
        output = self.store.put(json.dumps(row, sort_keys=True).encode())
        self.store.record(TaskRow(key, STAGE, label, "done", output, wall_s=row["seconds"]))


def compile_pack(pack: Pack, texts: dict[str, tuple[str, str]], jobs: int, shown: Shown) -> None:
    """Compile what the pack does not have yet, in processes of their own.

    Args:
        texts: label and text by key.
        jobs: how many compilers at a time.
    """
    waiting = [key for key in texts if pack.row(key) is None]
    shown.stage(STAGE, len(texts), len(texts) - len(waiting))
    batches = [waiting[at : at + BATCH] for at in range(0, len(waiting), BATCH)]
    lost = _send(pack, texts, batches, jobs, shown)
    for key, why in _send(pack, texts, [[key] for key in lost], jobs, shown).items():
        pack.record(key, texts[key][0], {"reason": why})
        shown.advance(texts[key][0], True)


def _send(
    pack: Pack, texts: dict[str, tuple[str, str]], batches: list[list[str]], jobs: int, shown: Shown
) -> dict[str, str]:
    """Compile batches; returns the texts of those whose worker died or was late, and why."""
    lost: dict[str, str] = {}

    def done(at: int, outcome: Outcome) -> None:
        if outcome.error_kind:
            lost.update(dict.fromkeys(batches[at], f"{outcome.error_kind}: {outcome.error}"))
            return
        for key, row in json.loads(pack.store.get(outcome.output)).items():
            pack.record(key, texts[key][0], row)
            shown.advance(texts[key][0], "reason" in row)

    payloads = [
        json.dumps({"target": pack.target, "texts": {k: texts[k][1] for k in batch}}).encode()
        for batch in batches
    ]
    work = Work(compile_batch, pack.store.root, payloads, TIMEOUT_S)
    executor = make_executor("local", jobs)
    executor.run(work, done)
    executor.close()
    return lost
