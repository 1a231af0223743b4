"""One of each: modules and functions that are the same are found, and the best copy is kept.

Modules are the same when

1. their bytes are,
2. their `norm_hash` is: they define the same functions under the same names, or
3. LLVM's structural hash is and so are the bodies of all their functions, whatever the names: the same file
   built for a static and for a shared library.

The structural hash is never enough: it leaves out GEP types, alignments and flags. Kept is the copy with
the freest licence, then the first by project, package, path and hash. Functions stay in their modules;
those that came before by `norm_hash` are marked, and all that are nearly the same share a cluster.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ir_dataset.identity import PERMUTATIONS, unpack_minhash
from ir_dataset.license_terms import TIERS
from ir_dataset.near_duplicates import cluster_signatures
from ir_dataset.records import Record, digest
from ir_dataset.verify import ModuleSummary

if TYPE_CHECKING:
    import numpy as np

__all__ = ["Deduplicated", "DroppedModule", "Entry", "KeptModule", "deduplicate"]


@dataclass(frozen=True)
class Entry:
    """One unit that was read, with what decides which copy is kept."""

    summary: ModuleSummary
    project: str
    package: str
    version: str
    source_path: str
    tier: str

    @property
    def order(self) -> tuple[int | str, ...]:
        """The least is kept."""
        place = (self.project, self.package, self.version, self.source_path)
        return (TIERS.index(self.tier), *place, self.summary.module)


class KeptModule(Record, frozen=True):
    """A module that stays, and its functions in the order of its summary."""

    module: str
    entry: int
    """Position of the copy that was kept."""
    dup_count: int
    """How many units are this module, itself among them."""
    duplicate: tuple[bool, ...]
    """Whether a function with the same `norm_hash` came before."""
    cluster: tuple[int, ...]
    """Number of the near-duplicate cluster; -1 where a function is too short for one."""


class DroppedModule(Record, frozen=True):
    """A unit that is a copy of a kept one, unread, or empty."""

    entry: int
    kept: str
    """The module that it is a copy of; empty where it is none."""
    level: str
    """`exact`, `norm`, `structural`; `unread` or `empty`."""


class Deduplicated(Record, frozen=True):
    """What stays of all units, in the order in which copies are preferred."""

    modules: tuple[KeptModule, ...]
    dropped: tuple[DroppedModule, ...]
    """In the order of the entries."""
    counts: dict[str, int]
    """Units, modules and functions after each level."""


def deduplicate(entries: Sequence[Entry]) -> Deduplicated:
    """Find the copies. The result depends on the entries' contents and not on their order, but for
    the positions in it."""
    order = sorted(range(len(entries)), key=lambda at: entries[at].order)
    kept: list[int] = []
    copies: Counter[str] = Counter()
    dropped: list[DroppedModule] = []
    known: dict[tuple[str, str], str] = {}
    for at in order:
        summary = entries[at].summary
        if not summary.reader_ok or summary.empty:
            level = "empty" if summary.reader_ok else "unread"
            dropped.append(DroppedModule(entry=at, kept="", level=level))
            continue
        names = _names(summary)
        found = next((name for name in names if name in known), None)
        first = known[found] if found else summary.module
        for name in names:
            known.setdefault(name, first)
        copies[first] += 1
        if found:
            dropped.append(DroppedModule(entry=at, kept=first, level=found[0]))
        else:
            kept.append(at)
    summaries = [entries[at].summary for at in kept]
    duplicates = _duplicates(summaries)
    clusters = _clusters(summaries)
    modules = tuple(
        KeptModule(
            module=summary.module,
            entry=at,
            dup_count=copies[summary.module],
            duplicate=flags,
            cluster=numbers,
        )
        for at, summary, flags, numbers in zip(kept, summaries, duplicates, clusters, strict=True)
    )
    return Deduplicated(
        modules=modules,
        dropped=tuple(sorted(dropped, key=lambda one: one.entry)),
        counts=_counts(entries, modules, dropped),
    )


def _names(summary: ModuleSummary) -> list[tuple[str, str]]:
    """What a module is known by; one in common makes two the same."""
    names = [("exact", summary.module), ("norm", summary.norm_hash)]
    if summary.struct_hash:
        bodies = sorted(function.norm_hash for function in summary.functions)
        names.append(("structural", digest(summary.struct_hash, bodies)))
    return names


def _duplicates(summaries: Sequence[ModuleSummary]) -> list[tuple[bool, ...]]:
    seen: set[str] = set()
    found = []
    for summary in summaries:
        flags = []
        for function in summary.functions:
            flags.append(function.norm_hash in seen)
            seen.add(function.norm_hash)
        found.append(tuple(flags))
    return found


def _clusters(summaries: Sequence[ModuleSummary]) -> list[tuple[int, ...]]:
    import numpy as np

    packed = [function.minhash for summary in summaries for function in summary.functions]
    long = [at for at, text in enumerate(packed) if text]
    rows = np.empty((len(long), PERMUTATIONS), np.uint16)
    for row, at in enumerate(long):
        rows[row] = unpack_minhash(packed[at])
    numbers = np.full(len(packed), -1, np.int64)
    numbers[long] = _dense(cluster_signatures(rows))
    listed = numbers.tolist()
    found, start = [], 0
    for summary in summaries:
        stop = start + len(summary.functions)
        found.append(tuple(listed[start:stop]))
        start = stop
    return found


def _dense(labels: np.ndarray) -> np.ndarray:
    """Numbers from 0 in place of first positions; the order stays."""
    import numpy as np

    return np.unique(labels, return_inverse=True)[1].ravel()


def _counts(
    entries: Sequence[Entry], modules: Sequence[KeptModule], dropped: Sequence[DroppedModule]
) -> dict[str, int]:
    levels = Counter(one.level for one in dropped)
    read = [entry.summary for entry in entries if entry.summary.reader_ok]
    flags = [flag for module in modules for flag in module.duplicate]
    clusters = {number for module in modules for number in module.cluster if number >= 0}
    short = sum(
        number < 0 and not flag
        for module in modules
        for number, flag in zip(module.cluster, module.duplicate, strict=True)
    )
    units = len(entries)
    return {
        "units": units,
        "units_unread": levels["unread"],
        "units_empty": levels["empty"],
        "modules_exact": units - levels["unread"] - levels["empty"] - levels["exact"],
        "modules_kept": len(modules),
        "functions_read": sum(summary.n_functions for summary in read),
        "functions_kept": len(flags),
        "functions_unique": flags.count(False),
        "functions_clustered": len(clusters) + short,
    }
