"""Train, validation and test sets that share no code, and one language that only a test sees.

Whole project families go to one set, by the hash of the seed and the family's name, so that a corpus
that grows moves none that was there. Two projects of which the smaller has more than half of its
functions in common with the other alone are one family, whatever they are called.

That leaves functions that projects took from each other, or from a header that both include. A function
of the validation, test or held-out set whose `norm_hash` or near-duplicate cluster occurs in a set that
goes before it is left out: it is of no set. The order is train, test, held out, validation. What this
means for a module, which is a row of the dataset:

- the table of functions says for each function of which set it is, or that it is of none; a figure per
  function counts the former only, and of those the sets share not one;
- a module outside the training set stays as long as no more than `max_shared` of its instructions are in
  functions that are left out, else it is dropped as a whole. With `max_shared=0` no byte of a function
  that the training set has is published in another.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ir_dataset.records import Record

__all__ = [
    "ORDER",
    "FunctionKey",
    "ModuleSplit",
    "Split",
    "SplitInput",
    "assign",
    "assign_randomly",
]

ORDER = ("train", "test", "ood", "validation")
"""Sets, each of which shares nothing with those before it."""

RELATED = 0.5
"""Share of the smaller project's functions above which two projects are one family; functions that three
projects have are nobody's, they come from headers such as C++'s library."""

RELATED_FUNCTIONS = 10
"""Functions that two projects have to share at least, to be one family."""


@dataclass(frozen=True, slots=True)
class FunctionKey:
    """What a function is compared by."""

    norm_hash: str
    cluster: int
    """-1 for short functions."""
    n_instructions: int


@dataclass(frozen=True)
class SplitInput:
    """A kept module."""

    module: str
    project: str
    language: str
    functions: tuple[FunctionKey, ...]


class ModuleSplit(Record, frozen=True):
    """Where a module and its functions are."""

    module: str
    split: str
    """Empty where the module was dropped."""
    functions: tuple[bool, ...]
    """Whether each function is of this set; those that are not occur in a set before it."""


class Split(Record, frozen=True):
    """All modules, in the order given."""

    modules: tuple[ModuleSplit, ...]
    families: dict[str, str]
    """Project to family, for those whose family is called otherwise."""
    groups: dict[str, str]
    """Family to set."""


def assign(
    items: Sequence[SplitInput],
    *,
    seed: int = 0,
    train: float = 0.8,
    validation: float = 0.1,
    held_out_language: str = "zig",
    max_shared: float = 0.5,
    guard: bool = True,
) -> Split:
    """Split modules by project family.

    Args:
        items: modules after deduplication, in any order.
        train, validation: shares of families; the rest is tested on.
        held_out_language: modules in it are of the set `ood`, whatever their project.
        max_shared: share of a module's instructions that may be in functions left out.
        guard: leave functions out at all; switched off only to show what that costs.
    """
    families = _families(items)
    names = sorted(
        {
            families.get(item.project, item.project)
            for item in items
            if item.language != held_out_language
        }
    )
    groups = _groups(names, seed, train, validation)
    sets = [
        "ood"
        if item.language == held_out_language
        else groups[families.get(item.project, item.project)]
        for item in items
    ]
    modules = (
        _guarded(items, sets, max_shared)
        if guard
        else [
            ModuleSplit(module=item.module, split=name, functions=(True,) * len(item.functions))
            for item, name in zip(items, sets, strict=True)
        ]
    )
    return Split(modules=tuple(modules), families=families, groups=groups)


def assign_randomly(
    items: Sequence[SplitInput], *, seed: int = 0, train: float = 0.8, validation: float = 0.1
) -> Split:
    """The control: modules at random, nothing left out, as if a project were no whole."""
    modules = [
        ModuleSplit(
            module=item.module,
            split=_set(_unit(seed, item.module), train, validation),
            functions=(True,) * len(item.functions),
        )
        for item in items
    ]
    return Split(modules=tuple(modules), families={}, groups={})


def _unit(seed: int, name: str) -> float:
    """A number in [0, 1) that only the seed and the name decide."""
    first = hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8]
    return int.from_bytes(first, "big") / 2**64


def _set(unit: float, train: float, validation: float) -> str:
    if unit < train:
        return "train"
    return "validation" if unit < train + validation else "test"


def _groups(names: Sequence[str], seed: int, train: float, validation: float) -> dict[str, str]:
    """Each family's set. Of three families or more no set is left without one."""
    units = {name: _unit(seed, name) for name in names}
    groups = {name: _set(unit, train, validation) for name, unit in units.items()}
    if len(names) < 3:
        return groups
    for missing in ("train", "test", "validation"):
        if missing in groups.values() or (missing == "validation" and not validation):
            continue
        sizes = Counter(groups.values())
        movable = [name for name in names if sizes[groups[name]] > 1]
        chosen = min(movable, key=lambda name: units[name] if missing == "train" else -units[name])
        groups[chosen] = missing
    return groups


def _keys(function: FunctionKey) -> tuple[str | int, ...]:
    return (function.norm_hash,) if function.cluster < 0 else (function.norm_hash, function.cluster)


def _families(items: Iterable[SplitInput]) -> dict[str, str]:
    """Projects that are mostly one another's code, under the name of the largest."""
    clusters: dict[str, set[int]] = defaultdict(set)
    for item in items:
        clusters[item.project].update(
            function.cluster for function in item.functions if function.cluster >= 0
        )
    owners: dict[int, list[str]] = defaultdict(list)
    for project in sorted(clusters):
        for cluster in clusters[project]:
            owners[cluster].append(project)
    shared: Counter[tuple[str, str]] = Counter()
    counted: Counter[str] = Counter()
    for projects in owners.values():
        if len(projects) > 2:
            continue  # of a header that everybody includes
        counted.update(projects)
        if len(projects) == 2:
            shared[projects[0], projects[1]] += 1
    root = {project: project for project in clusters}

    def find(project: str) -> str:
        while root[project] != project:
            project = root[project]
        return project

    for (one, two), number in sorted(shared.items()):
        if number >= RELATED_FUNCTIONS and number > RELATED * min(counted[one], counted[two]):
            ends = sorted((find(one), find(two)), key=lambda name: (-len(clusters[name]), name))
            root[ends[1]] = ends[0]
    return {project: find(project) for project in sorted(root) if find(project) != project}


def _guarded(
    items: Sequence[SplitInput], sets: Sequence[str], max_shared: float
) -> list[ModuleSplit]:
    found: list[ModuleSplit | None] = [None] * len(items)
    taken: set[str | int] = set()
    for name in ORDER:
        members = [at for at, one in enumerate(sets) if one == name]
        for at in members:
            found[at] = _without(items[at], name, taken, max_shared)
        for at in members:
            if found[at].split:  # pyright: ignore[reportOptionalMemberAccess]
                taken.update(key for one in items[at].functions for key in _keys(one))
    return [one for one in found if one is not None]


def _without(item: SplitInput, name: str, taken: set[str | int], max_shared: float) -> ModuleSplit:
    """The module less its functions that a set before this one has."""
    flags = tuple(taken.isdisjoint(_keys(function)) for function in item.functions)
    whole = sum(function.n_instructions for function in item.functions)
    out = sum(
        function.n_instructions
        for function, stays in zip(item.functions, flags, strict=True)
        if not stays
    )
    dropped = not any(flags) or out > max_shared * whole
    return ModuleSplit(
        module=item.module,
        split="" if dropped else name,
        functions=(False,) * len(flags) if dropped else flags,
    )


def sets_of(split: Split, items: Sequence[SplitInput]) -> Mapping[str, list[FunctionKey]]:
    """The functions of each set."""
    found: dict[str, list[FunctionKey]] = {name: [] for name in ORDER}
    for item, module in zip(items, split.modules, strict=True):
        if module.split:
            found[module.split].extend(
                one for one, stays in zip(item.functions, module.functions, strict=True) if stays
            )
    return found
