"""Run passes over a program, one after the other, and record what each did."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from rewriter.cost.context import current, predict
from rewriter.cost.model import Prediction
from rewriter.engine.invariants import (
    check_known,
    check_outputs,
    check_program,
    check_replacement,
    outputs_of,
)
from rewriter.engine.miss import Miss
from rewriter.engine.rewrite_pass import Fidelity, RewritePass
from rewriter.engine.shapes import ShapeError, Shapes
from rewriter.engine.site import Site, number_sites, sites
from rewriter.errors import ConfigError, RewriteError
from rewriter.program import Program

__all__ = [
    "Applied",
    "PipelineResult",
    "Setting",
    "Stage",
    "apply_passes",
    "check_conflicts",
    "ordered",
]

Setting = Callable[[RewritePass, Any], RewritePass]
"""Which knobs to use at a site, from the pass asked for and the facts found there."""
Identity = tuple[str, str]
"""A pass as text and the key of a site."""


@dataclass(frozen=True)
class Applied:
    """One rewrite that was carried out.

    Attributes:
        rewrite: the pass as it was asked for. chosen: with the knobs really used.
        facts: what its check found.
        key, label, source, layer: of the site, see `Site`.
        inputs: names of the nodes whose values the pass's reference takes; None where absent.
        before, after: names of the node that was replaced and of the one in its place; "" for a pass
            on the whole program.
        added: names of all new nodes.
        prediction: its time, inside of `costing`.
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
    added: tuple[str, ...]
    prediction: Prediction | None = None

    @property
    def identity(self) -> Identity:
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
    """A rewritten program and the record of it.

    Attributes:
        failures: why a rewrite that its own pass or the invariants refused is not in the program.
        stages: code around each pass that changed something, with `keep_code`.
        shapes: fake values of the program's nodes.
    """

    program: Program
    shapes: Shapes
    applied: list[Applied] = field(default_factory=list)
    misses: list[Miss] = field(default_factory=list)
    failures: dict[Identity, str] = field(default_factory=dict)
    stages: list[Stage] = field(default_factory=list)


def apply_passes(
    program: Program,
    passes: Sequence[RewritePass],
    *,
    excluded: frozenset[Identity] = frozenset(),
    setting: Setting | None = None,
    keep_code: bool = False,
    shapes: Shapes | None = None,
) -> PipelineResult:
    """A copy of the program with every pass tried on every site of its anchor.

    A rewrite that raises or leaves the program malformed is left out and listed in `failures`.

    Args:
        excluded: (pass text, site key) pairs to leave alone.
        setting: the knobs to really use at a site; None = as asked for.
        keep_code: record the code before and after each pass.
        shapes: of `program`, when they are known already.

    Raises:
        ConfigError: passes that conflict.
    """
    check_conflicts(passes)
    result = PipelineResult(program.clone(), (shapes or Shapes.of(program)).copy())
    number_sites(result.program)
    code = result.program.code if keep_code else ""
    for rewrite in ordered(passes):
        before, count = code, len(result.applied)
        _apply(result, rewrite, excluded, setting)
        if keep_code and len(result.applied) > count:
            code = result.program.code
            result.stages.append(Stage(str(rewrite), before, code))
    result.program.prune_inputs()
    result.program.module.recompile()
    return result


def ordered(passes: Sequence[RewritePass]) -> list[RewritePass]:
    """Approximate passes first, otherwise as given: they match meaning, the rest spells it anew."""
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
    excluded: frozenset[Identity],
    setting: Setting | None,
) -> None:
    """One pass on all its sites; a site where it fails is left out and the pass run again."""
    if not sites(result.program, rewrite.anchor):
        result.misses.append(Miss(rewrite.name, f"the program has no {rewrite.anchor}"))
        return
    saved, shapes = result.program.clone(), result.shapes
    one_by_one = False
    while True:
        run = _PassRun(result.program, shapes.copy(), rewrite, setting)
        try:
            run.over_sites(excluded, check_each=one_by_one)
            run.check()
        except _SiteFailed as failed:
            result.failures[(str(rewrite), failed.key)] = failed.reason
            excluded |= {(str(rewrite), failed.key)}
        except RewriteError:
            one_by_one = True  # again, to see which site it was
        else:
            break
        result.program = saved.clone()
    result.shapes = run.shapes
    result.applied += run.applied
    result.misses += run.misses


class _SiteFailed(Exception):
    """A rewrite raised, or left the program malformed."""

    def __init__(self, key: str, reason: str) -> None:
        super().__init__(reason)
        self.key, self.reason = key, reason


class _PassRun:
    """One pass going over the sites of a program that may be spoiled."""

    def __init__(
        self, program: Program, shapes: Shapes, rewrite: RewritePass, setting: Setting | None
    ) -> None:
        self.program, self.shapes = program, shapes
        self.rewrite, self.setting = rewrite, setting
        self.applied: list[Applied] = []
        self.misses: list[Miss] = []
        self.outputs = outputs_of(program, shapes)

    def over_sites(self, excluded: frozenset[Identity], *, check_each: bool) -> None:
        """Rewrite site after site. Raises _SiteFailed for the first that does not work."""
        layers = self.rewrite.layers
        for site in sites(self.program, self.rewrite.anchor):
            other_layer = layers is not None and site.layer not in layers
            if other_layer or (str(self.rewrite), site.key) in excluded:
                continue
            try:
                self._at(site)
                if check_each:
                    self.check()
            except (
                Exception
            ) as error:  # a pass is somebody else's code: what it raises is its failure
                what = f"{self.rewrite} at {site.label}"
                text = str(error) if isinstance(error, RewriteError) else _named(what, error)
                raise _SiteFailed(site.key, text) from error

    def check(self) -> None:
        """The invariants of the whole program. Raises RewriteError."""
        if not self.applied:
            return
        what = f"{self.rewrite} at {self.applied[-1].label}"
        check_program(self.program, what)
        try:
            self.shapes.learn(self.program, self.program.graph.nodes)
        except ShapeError as error:
            raise RewriteError(f"{what} broke {error}") from error
        check_outputs(self.program, self.outputs, self.shapes, what)

    def _at(self, site: Site) -> None:
        """Check one site and rewrite it."""
        facts = self.rewrite.check(site)
        if isinstance(facts, Miss):
            self.misses.append(facts)
            return
        prediction = _predicted(self.rewrite, facts)
        if prediction is not None and _leave(self.rewrite, prediction):
            self.misses.append(_slower(site, self.rewrite, prediction))
            return
        chosen = self.rewrite if self.setting is None else self.setting(self.rewrite, facts)
        inputs = tuple(n and n.name for n in chosen.reference_inputs(site, facts))
        old, users = (
            set(self.program.graph.nodes),
            [] if site.node is None else list(site.node.users),
        )
        chosen.rewrite(self.program.graph, site, facts)
        new = [node for node in self.program.graph.nodes if node not in old]
        after = _replacement(users, old)
        self._check_new(site, new, after)
        before = "" if site.node is None else site.node.name
        names = (before, before if after is None else after.name, tuple(n.name for n in new))
        record = (site.key, site.label, site.source, site.layer, inputs)
        self.applied.append(Applied(self.rewrite, chosen, facts, *record, *names, prediction))

    def _check_new(self, site: Site, new: Sequence[fx.Node], after: fx.Node | None) -> None:
        """Mark the new nodes as this rewrite's, and look at what they compute."""
        what = f"{self.rewrite} at {site.label}"
        for node in new:
            node.meta["rewrite"] = (str(self.rewrite), site.key)
            check_known(node, what)
        try:
            self.shapes.learn(self.program, new)
        except ShapeError as error:
            raise RewriteError(f"{what} put in {error}") from error
        if site.node is not None and after is not None:
            check_replacement(site.node, after, self.shapes, what)


def _predicted(rewrite: RewritePass, facts: Any) -> Prediction | None:
    """Of one site; describing its work costs something, so outside of `costing` nobody is asked."""
    if current() is None:
        return None
    return predict(rewrite.original_work(facts), rewrite.work(facts))


def _leave(rewrite: RewritePass, prediction: Prediction) -> bool:
    """Whether a rewrite does not pay; who asks for an approximate one gets it."""
    return rewrite.fidelity is not Fidelity.APPROXIMATE and prediction.slower


def _slower(site: Site, rewrite: RewritePass, prediction: Prediction) -> Miss:
    reason = f"predicted to be slower by {prediction.model}: {prediction}"
    if site.node is None:
        return Miss(rewrite.name, reason)
    return Miss.at(site.node, rewrite.name, reason, site=site.label)


def _named(what: str, error: Exception) -> str:
    return f"{what}: {type(error).__name__}: {error}"


def _replacement(users: list[fx.Node], old_nodes: set[fx.Node]) -> fx.Node | None:
    """The new node that the old node's users read now."""
    for user in users:
        for source in user.all_input_nodes:
            if source not in old_nodes:
                return source
    return None
