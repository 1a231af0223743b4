"""Does a split leak: counted from what is published, not from how the split was made."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from ir_dataset.records import Record
from ir_dataset.split import FunctionKey, Split, SplitInput, sets_of
from rewriter.errors import VerificationError

__all__ = ["LeakageAudit", "SetAudit", "audit_split", "require_clean"]


class SetAudit(Record, frozen=True):
    """One set beside the training set."""

    name: str
    modules: int
    functions: int
    """That are of the set."""
    left_out: int
    """That its modules have besides, and that are of no set."""
    same_norm_hash: int
    """Functions of the set whose normalised text the training set has. Has to be 0."""
    same_cluster: int
    """Functions of the set of whose near-duplicate cluster the training set has one. Has to be 0."""
    percent_shared: float
    """Either of both, of the set's functions."""
    same_project: int
    """Projects that both have. Has to be 0, but for a held-out language."""
    percent_instructions_left_out: float
    """Of the set's modules: what a reader of whole modules sees of other sets."""


class LeakageAudit(Record, frozen=True):
    """A split, and a random one of the same modules for comparison."""

    train_modules: int
    train_functions: int
    dropped_modules: int
    """Modules that were left out since most of them is in another set."""
    sets: tuple[SetAudit, ...]
    between: int
    """Functions that two sets other than the training set share. Has to be 0."""
    control: tuple[SetAudit, ...]
    """The random split: what the guard is for."""

    @property
    def clean(self) -> bool:
        """Whether no function of one set is in another."""
        return not self.between and not any(
            one.same_norm_hash or one.same_cluster or (one.same_project and one.name != "ood")
            for one in self.sets
        )


def audit_split(items: Sequence[SplitInput], split: Split, control: Split) -> LeakageAudit:
    """Count what the sets share.

    Args:
        items: as given to the split.
        control: of `assign_randomly` on the same modules.
    """
    functions = sets_of(split, items)
    chosen = [module.split for module in split.modules]
    return LeakageAudit(
        train_modules=chosen.count("train"),
        train_functions=len(functions["train"]),
        dropped_modules=chosen.count(""),
        sets=_sets(items, split),
        between=_between([keys for name, keys in functions.items() if name != "train"]),
        control=_sets(items, control),
    )


def require_clean(audit: LeakageAudit) -> None:
    """Raises:
    VerificationError: sets share functions or projects; says how many.
    """
    if audit.clean:
        return
    told = "; ".join(
        f"{one.name}: {one.same_norm_hash} by norm_hash, {one.same_cluster} by cluster,"
        f" {one.same_project} projects"
        for one in audit.sets
    )
    raise VerificationError(f"the split leaks: {told}; {audit.between} between other sets")


def _sets(items: Sequence[SplitInput], split: Split) -> tuple[SetAudit, ...]:
    functions = sets_of(split, items)
    hashes = {one.norm_hash for one in functions["train"]}
    clusters = {one.cluster for one in functions["train"] if one.cluster >= 0}
    projects = _projects(items, split)
    return tuple(
        _set(name, items, split, functions[name], hashes, clusters, projects)
        for name in ("validation", "test", "ood")
        if any(module.split == name for module in split.modules)
    )


def _set(
    name: str,
    items: Sequence[SplitInput],
    split: Split,
    functions: list[FunctionKey],
    hashes: set[str],
    clusters: set[int],
    projects: dict[str, set[str]],
) -> SetAudit:
    same = [one.norm_hash in hashes for one in functions]
    near = [one.cluster in clusters for one in functions]
    rows = [
        (function.n_instructions, stays)
        for item, module in zip(items, split.modules, strict=True)
        if module.split == name
        for function, stays in zip(item.functions, module.functions, strict=True)
    ]
    whole = sum(number for number, _ in rows)
    out = sum(number for number, stays in rows if not stays)
    return SetAudit(
        name=name,
        modules=sum(module.split == name for module in split.modules),
        functions=len(functions),
        left_out=sum(not stays for _, stays in rows),
        same_norm_hash=sum(same),
        same_cluster=sum(near),
        percent_shared=_percent(sum(map(bool.__or__, same, near)), len(functions)),
        same_project=len(projects[name] & projects["train"]),
        percent_instructions_left_out=_percent(out, whole),
    )


def _percent(part: int, whole: int) -> float:
    return round(100 * part / whole, 4) if whole else 0.0


def _projects(items: Sequence[SplitInput], split: Split) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {"train": set(), "validation": set(), "test": set(), "ood": set()}
    for item, module in zip(items, split.modules, strict=True):
        if module.split:
            found[module.split].add(split.families.get(item.project, item.project))
    return found


def _between(sets: Sequence[list[FunctionKey]]) -> int:
    """Keys that more than one of the sets has."""
    owners: Counter[str | int] = Counter()
    for functions in sets:
        keys: set[str | int] = {one.norm_hash for one in functions}
        keys |= {one.cluster for one in functions if one.cluster >= 0}
        owners.update(keys)
    return sum(number > 1 for number in owners.values())
