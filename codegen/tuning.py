"""The one rule by which a kernel's configuration is chosen: the default, a cost model's, or a measured one.

    default    the configuration in the kernel's file; nothing is compiled or run to find it
    model      the first of a cost model's order, unless the model is unsure; nothing is run
    measure    the least of the measured: all candidates, or the model's first `top_k`

The default is always among the measured, and stays unless another is faster by more than the noise. What
was measured is kept for each device, text and shape, so that it is measured once. The rule applies
inside `with tuning(...)`; outside of it every kernel has its default.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from codegen.cache import cached_build, content_hash
from rewriter.errors import ConfigError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

__all__ = [
    "MODES",
    "Choice",
    "Problem",
    "Ranked",
    "Ranker",
    "Tuning",
    "choose",
    "current",
    "prune_configs_by",
    "tuning",
    "tuning_lines",
]

MODES = ("default", "model", "measure")
NOISE = 1.02
"""A configuration has to beat the default by this factor. Two runs of the same one differ by less."""

C = TypeVar("C", bound="DataclassInstance")


@dataclass(frozen=True)
class Problem:
    """What a configuration is chosen for.

    Attributes:
        kernel: its operator and backend, e.g. `gemv cpu`.
        text: of the kernel, or what its text depends on.
        shape: sizes that the time depends on, by name.
        device: where it runs, with its number of threads on a CPU.
    """

    kernel: str
    text: str
    shape: Mapping[str, int]
    device: str

    def key(self, candidates: Sequence[Any]) -> str:
        """Everything that a measured choice depends on."""
        shape = json.dumps(dict(self.shape), sort_keys=True)
        return content_hash("tuned", self.kernel, self.text, shape, self.device, repr(candidates))


@dataclass(frozen=True)
class Ranked:
    """A model's answer.

    Attributes:
        order: candidates' positions, the best first.
        unsure: why the first should not be taken unmeasured, or "".
        unknown: whether even the first few say nothing, as nothing like the problem was learned.
    """

    order: tuple[int, ...]
    unsure: str = ""
    unknown: bool = False


class Ranker(Protocol):
    """A cost model of one or more kernels."""

    def __call__(self, problem: Problem, candidates: Sequence[Any], default: int) -> Ranked | None:
        """The order of the candidates; None where the model knows nothing of such kernels."""
        ...


@dataclass(frozen=True)
class Choice(Generic[C]):
    """The configuration that was taken, and why.

    Attributes:
        seconds: by the text of a configuration, where some were measured.
    """

    problem: Problem
    config: C
    reason: str
    seconds: Mapping[str, float] = field(default_factory=dict)


@dataclass
class Tuning:
    """How configurations are chosen, and the choices made so far.

    Attributes:
        mode: of `MODES`.
        ranker: a cost model; `model` needs one, `measure` measures everything without one.
        top_k: candidates to measure besides the default, unless the problem is unknown to the model.
        choices: made so far. asked: of them those that were asked for, since `tuning_lines` began.

    Raises:
        ConfigError: another mode, `model` without a ranker, or no positive `top_k`.
    """

    mode: str = "default"
    ranker: Ranker | None = None
    top_k: int = 3
    choices: dict[Hashable, Choice[Any]] = field(default_factory=dict)
    asked: dict[Hashable, None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ConfigError("mode", self.mode, f"one of {', '.join(MODES)}")
        if self.mode == "model" and self.ranker is None:
            raise ConfigError("ranker", None, "a cost model, as mode is 'model'")
        if self.top_k < 1:
            raise ConfigError("top_k", self.top_k, "at least 1")

    def chosen(self, problem: Problem, default: C) -> C:
        """What was chosen for a problem so far, else the default."""
        key = _key(problem)
        found = self.choices.get(key)
        if found is not None:
            self.asked[key] = None
        return default if found is None else found.config

    def report(self) -> list[str]:
        """One line for each choice, for a report."""
        return [_line(choice) for choice in self.choices.values()]


_CURRENT: ContextVar[Tuning | None] = ContextVar("tuning", default=None)


def current() -> Tuning | None:
    """The tuning that applies here; None outside of every `with tuning(...)`."""
    return _CURRENT.get()


@contextlib.contextmanager
def tuning(how: Tuning) -> Iterator[Tuning]:
    """Choose configurations so inside of the block."""
    token = _CURRENT.set(how)
    try:
        yield how
    finally:
        _CURRENT.reset(token)


@contextlib.contextmanager
def tuning_lines(into: list[str]) -> Iterator[None]:
    """Append a line for each choice that is asked for in the block, made before or in it.

    Nothing is appended outside of every `with tuning(...)`; where no kernel asked, one line says so.
    """
    how = current()
    if how is None:
        yield
        return
    before, how.asked = how.asked, {}
    try:
        yield
    finally:
        lines = [_line(how.choices[key]) for key in how.asked]
        into += lines or [f"no kernel asked for a configuration (mode {how.mode})"]
        how.asked = before | how.asked


def _line(choice: Choice[Any]) -> str:
    problem = choice.problem
    return f"{problem.kernel} {dict(problem.shape)}: {choice.config}: {choice.reason}"


def choose(
    problem: Problem,
    candidates: Sequence[C],
    default: C,
    measure: Callable[[C], float],
) -> C:
    """The configuration to use for a problem; see the module.

    Args:
        candidates: in any order; the default need not be one of them.
        measure: compiles, checks and times one; seconds. What it raises is passed on.
    """
    how = current()
    if how is None or how.mode == "default":
        return default
    key = _key(problem)
    if key not in how.choices:
        offered = [default, *(c for c in candidates if c != default)]
        how.choices[key] = _choice(how, problem, offered, measure)
    how.asked[key] = None
    return how.choices[key].config


def _key(problem: Problem) -> Hashable:
    return (problem.kernel, problem.text, tuple(problem.shape.items()), problem.device)


def _choice(
    how: Tuning, problem: Problem, offered: Sequence[C], measure: Callable[[C], float]
) -> Choice[C]:
    default = offered[0]
    ranked = None if how.ranker is None else how.ranker(problem, offered, 0)
    if how.mode == "model":
        unsure = "the model does not know this kernel" if ranked is None else ranked.unsure
        if ranked is None or unsure:
            return Choice(problem, default, f"default: {unsure}")
        return Choice(problem, offered[ranked.order[0]], "model: first of its order")
    if ranked is None or ranked.unknown:
        tried, why = list(offered), "all"
        if ranked is not None:
            why = f"all, as the model is unsure ({ranked.unsure})"
    else:
        first = [offered[i] for i in ranked.order if i != 0][: how.top_k]
        tried, why = [default, *first], f"the model's first {len(first)} and the default"
    return _measured(problem, tried, measure, f"{len(tried)} of {len(offered)} measured, {why}")


def _measured(
    problem: Problem, tried: Sequence[C], measure: Callable[[C], float], why: str
) -> Choice[C]:
    def build(place: Any) -> None:
        found = {repr(config): measure(config) for config in tried}
        place.write_text(json.dumps({"problem": asdict(problem), "seconds": found}, sort_keys=True))

    path = cached_build(problem.key(tried), ".json", build)
    seconds: dict[str, float] = json.loads(path.read_text())["seconds"]
    default = tried[0]
    best = min(tried, key=lambda config: seconds[repr(config)])
    gain = seconds[repr(default)] / seconds[repr(best)]
    if gain < NOISE:
        return Choice(problem, default, f"default: {why}; none is faster by 2 %", seconds)
    return Choice(problem, best, f"measured: {gain:.2f}x the default's speed; {why}", seconds)


def prune_configs_by(
    seconds: Callable[[Mapping[str, Any]], float | None],
    default: Mapping[str, Any],
    top_k: int | float = 3,
) -> dict[str, Any]:
    """What `triton.autotune(prune_configs_by=...)` takes, from a cost model.

    Args:
        seconds: estimate from a launch's arguments and a configuration's values, by name; None where
            the model is unsure, which leaves that configuration among the first.
        default: values by which the default configuration is known; it is always measured.
        top_k: how many are measured, or the share of all.

    Raises:
        ConfigError: no positive `top_k`, or a share above 1.
    """
    if not top_k > 0 or (isinstance(top_k, float) and top_k > 1):
        raise ConfigError("top_k", top_k, "a positive number, or a share of at most 1.0")

    def perf_model(**values: Any) -> float:
        if all(values.get(name) == value for name, value in default.items()):
            return -math.inf
        told = seconds(values)
        return 0.0 if told is None else told

    return {"perf_model": perf_model, "top_k": top_k}
