"""Run passes over a program, one after the other, and record what each did."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from rewriter.engine.invariants import check_program, check_replacement
from rewriter.engine.miss import Miss
from rewriter.engine.rewrite_pass import Fidelity, RewritePass
from rewriter.engine.site import Site, sites
from rewriter.errors import ConfigError, RewriteError
from rewriter.program import Program

__all__ = ["Applied", "PipelineResult", "Stage", "apply_passes", "check_conflicts", "ordered"]

Setting = Callable[[RewritePass, Any], RewritePass]
"""Which knobs to use at a site, from the pass asked for and the facts found there."""


@dataclass(frozen=True)
class Applied:
    """One rewrite that was carried out.

    Attributes:
        rewrite: the pass as it was asked for. chosen: with the knobs really used.
        facts: what its check found.
        key, label, source, layer: of the site, see `Site`.
        inputs: names of the nodes whose values the pass's reference takes; None where absent.
        before, after: names of the node that was replaced and of the one in its place.
    """

    rewrite: RewritePass
    chosen: RewritePass
    facts: Any
    key: str
    label: str
    source: str
    layer: int | None
    inputs: tuple[str | None, ...]
    before: str
    after: str

    @property
    def identity(self) -> tuple[str, str]:
        """What `excluded` names: the pass as text and the site."""
        return str(self.rewrite), self.key


@dataclass(frozen=True)
class Stage:
    """The program's code around one pass."""

    spec: str
    code_before: str
    code_after: str


@dataclass
class PipelineResult:
    """A rewritten program and the record of it."""

    program: Program
    applied: list[Applied] = field(default_factory=list)
    misses: list[Miss] = field(default_factory=list)
    failures: dict[tuple[str, str], str] = field(default_factory=dict)
    stages: list[Stage] = field(default_factory=list)


def apply_passes(
    program: Program,
    passes: Sequence[RewritePass],
    *,
    excluded: frozenset[tuple[str, str]] = frozenset(),
    setting: Setting | None = None,
    keep_code: bool = False,
) -> PipelineResult:
    """A copy of the program with every pass tried on every site of its anchor, in order.

    Args:
        excluded: (pass text, site key) pairs to leave alone.
        setting: the knobs to really use at a site; None = as asked for.
        keep_code: record the code before and after each pass.

    Raises:
        ConfigError: passes that conflict.
    """
    check_conflicts(passes)
    result = PipelineResult(program.clone())
    for rewrite in ordered(passes):
        before = result.program.code if keep_code else ""
        _apply(result, rewrite, excluded, setting)
        if keep_code and result.program.code != before:
            result.stages.append(Stage(str(rewrite), before, result.program.code))
    result.program.prune_inputs()
    result.program.module.recompile()
    return result


def ordered(passes: Sequence[RewritePass]) -> list[RewritePass]:
    """Approximate passes first, otherwise as given: they match meaning, the others spell it anew."""
    return sorted(passes, key=lambda p: p.fidelity is not Fidelity.APPROXIMATE)


def check_conflicts(passes: Sequence[RewritePass]) -> None:
    """Raises ConfigError where two passes may not share a layer."""
    for i, first in enumerate(passes):
        for second in passes[i + 1 :]:
            named = second.name in first.conflicts or first.name in second.conflicts
            if named and _overlap(first.layers, second.layers):
                allowed = f"not together with {first} on the same layers"
                raise ConfigError("passes", str(second), allowed)


def _overlap(a: tuple[int, ...] | None, b: tuple[int, ...] | None) -> bool:
    return a is None or b is None or bool(set(a) & set(b))


def _apply(
    result: PipelineResult,
    rewrite: RewritePass,
    excluded: frozenset[tuple[str, str]],
    setting: Setting | None,
) -> None:
    """One pass on all its sites; a site where it fails is left out and the pass run again."""
    if not sites(result.program, rewrite.anchor):
        result.misses.append(Miss(rewrite.name, f"the program has no {rewrite.anchor}"))
        return
    saved, spec = result.program.clone(), str(rewrite)
    while True:
        done = PipelineResult(result.program)
        failure = _apply_to_sites(done, rewrite, excluded, setting) or _malformed(done, rewrite)
        if failure is None:
            break
        key, reason = failure
        result.failures[(spec, key)] = reason
        result.program = saved.clone()
        excluded |= {(spec, key)}
    result.applied += done.applied
    result.misses += done.misses


def _malformed(done: PipelineResult, rewrite: RewritePass) -> tuple[str, str] | None:
    """The last site of a pass that left a malformed program, and what is wrong with it."""
    if not done.applied:
        return None
    last = done.applied[-1]
    try:
        check_program(done.program, str(rewrite))
    except RewriteError as error:
        return last.key, str(error)
    return None


def _apply_to_sites(
    done: PipelineResult,
    rewrite: RewritePass,
    excluded: frozenset[tuple[str, str]],
    setting: Setting | None,
) -> tuple[str, str] | None:
    """Rewrite site after site; the key and error of the first that fails."""
    for site in sites(done.program, rewrite.anchor):
        if rewrite.layers is not None and site.layer not in rewrite.layers:
            continue
        if (str(rewrite), site.key) in excluded:
            continue
        try:
            _apply_at(done, rewrite, setting, site)
        except Exception as error:  # a pass is somebody else's code: whatever it raises is its failure
            return site.key, f"{rewrite} at {site.label}: {type(error).__name__}: {error}"
    return None


def _apply_at(
    done: PipelineResult, rewrite: RewritePass, setting: Setting | None, site: Site
) -> None:
    """Check one site and rewrite it."""
    graph = done.program.graph
    facts = rewrite.check(site)
    if isinstance(facts, Miss):
        done.misses.append(facts)
        return
    chosen = rewrite if setting is None else setting(rewrite, facts)
    inputs = tuple(None if n is None else n.name for n in chosen.reference_inputs(site, facts))
    record = (site.key, site.label, site.source, site.layer, inputs)
    old_nodes = set(graph.nodes)
    users = list(site.node.users) if site.node is not None else []
    chosen.rewrite(graph, site, facts)
    for node in graph.nodes:
        if node not in old_nodes:
            node.meta["rewrite"] = (str(rewrite), site.key)
    before, after = site.node, _replacement(users, old_nodes)
    if before is not None and after is not None:
        check_replacement(before, after, f"{rewrite} at {site.label}")
    name = "" if before is None else before.name
    done.applied.append(Applied(rewrite, chosen, facts, *record, name, name if after is None else after.name))


def _replacement(users: list[fx.Node], old_nodes: set[fx.Node]) -> fx.Node | None:
    """The new node that the old node's users read now."""
    for user in users:
        for source in user.all_input_nodes:
            if source not in old_nodes:
                return source
    return None
