"""The rows and samples of a quality run, and what is measured on them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

from rewriter.errors import ConfigError
from rewriter.optimized import OptimizedModel
from rewriter.quality.accuracy import MODES, Grades, draw_samples, grade
from rewriter.quality.agreement import common_prefixes, greedy_continuations
from rewriter.quality.bootstrap import mean_interval
from rewriter.quality.encoding import Encoding, TokenSample
from rewriter.quality.fidelity import compare
from rewriter.quality.report import Accuracy, Result
from rewriter.quality.retained_mass import RetainedMass, retained_mass
from rewriter.quality.sources import Source, check_task, read_source
from rewriter.quality.summary import summary
from rewriter.quality.tasks import TASKS
from rewriter.quality.variants import Variant

__all__ = ["Settings", "Suite"]

DEFAULT_LENGTH = 1024

HELD = {0.0: "dropped", 1.0: "kept"}
"""Names of the shares of layers that hold something; anything between is "partly"."""

OnProgress = Callable[[str, float], None]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What to measure.

    Attributes:
        tasks: names, for accuracy and, with a context, for fidelity. texts: files, or "sentences".
        length: tokens of a row, and of a context with its questions and answers; None = 1,024, or the
            model's positions where there are fewer.
        rows: of a text, for each seed. samples: contexts of a task, for each seed. questions: of each.
        modes: see `rewriter.quality.accuracy`. seeds: what is drawn is drawn anew for each.
        written: tokens of free-running text, at most half of a row.
        mass: whether to measure retained attention mass.

    Raises:
        ConfigError: an unknown task or mode, a number out of range, or nothing to measure.
    """

    tasks: tuple[str, ...] = ("retrieval", "arithmetic")
    texts: tuple[str | Path, ...] = ()
    length: int | None = None
    rows: int = 2
    samples: int = 8
    questions: int = 4
    modes: tuple[str, ...] = MODES
    seeds: tuple[int, ...] = (0, 1, 2)
    written: int = 64
    mass: bool = True

    def __post_init__(self) -> None:
        if not self.tasks and not self.texts:
            raise ConfigError("tasks", self.tasks, "at least one task or text")
        for task in self.tasks:
            check_task(task)
        for mode in self.modes:
            if mode not in MODES:
                raise ConfigError("modes", mode, f"one of {', '.join(MODES)}")
        least = {"length": 8, "rows": 1, "samples": 1, "questions": 1, "written": 1}
        for name, lowest in least.items():
            value = getattr(self, name)
            if value is not None and value < lowest:
                raise ConfigError(name, value, f"an integer of at least {lowest}")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ConfigError("seeds", self.seeds, "one or more different numbers")


@dataclass
class Suite:
    """The rows and samples of a run, drawn once, so that all variants see the same.

    Args:
        encoding: the tokenizer.
        max_positions: of the model; None = unbounded.

    Raises:
        ConfigError: a length that the model has no positions for, or too short for a task.
        InputError: a text that cannot be used. ModelError: words that the tokenizer does not know.
    """

    settings: Settings
    encoding: Encoding
    max_positions: int | None
    length: int = field(init=False)
    sources: list[Source] = field(init=False)
    samples: dict[str, list[TokenSample]] = field(init=False)

    def __post_init__(self) -> None:
        chosen, limit = self.settings, self.max_positions
        self.length = chosen.length or min(DEFAULT_LENGTH, limit or DEFAULT_LENGTH)
        if limit is not None and self.length > limit:
            raise ConfigError("length", self.length, f"at most the model's {limit} positions")
        self.samples = {task: self._drawn(task) for task in chosen.tasks}
        names = (*chosen.texts, *(t for t in chosen.tasks if TASKS[t].smallest > 0))
        self.sources = [
            read_source(n, self.encoding, self.length, chosen.rows, chosen.seeds) for n in names
        ]

    def _drawn(self, task: str) -> list[TokenSample]:
        """The samples of every seed, one after another."""
        chosen = self.settings
        self.encoding.check(TASKS[task])
        shape = (self.length, chosen.samples, chosen.questions)
        drawn = (draw_samples(task, self.encoding, *shape, seed) for seed in chosen.seeds)
        return list(chain.from_iterable(drawn))

    def run(
        self, original: OptimizedModel, variants: Sequence[Variant], on_progress: OnProgress
    ) -> list[Result]:
        """Measure all variants: fidelity to the original, accuracies compared with the first one's."""
        results = [
            Result(v.plan.label, v.plan.specs, v.plan.control, v.plan.density, undone=v.undone)
            for v in variants
        ]
        for source in self.sources:
            self._add_fidelity(source, original, variants, results, on_progress)
        for task, samples in self.samples.items():
            self._add_accuracy(task, samples, variants, results, on_progress)
        return results

    def _add_fidelity(
        self,
        source: Source,
        original: OptimizedModel,
        variants: Sequence[Variant],
        results: list[Result],
        on_progress: OnProgress,
    ) -> None:
        models, half = [v.model for v in variants], source.ids.shape[1] // 2
        what = f"reading {source.name}"
        own, *traces = compare(original, models, source.ids, lambda done: on_progress(what, done))
        masses: list[RetainedMass] | None = None
        if self.settings.mass:
            masses = retained_mass(original.program, source.ids, traces)
        prompts = source.ids[:, :half]
        limit = min(self.settings.written, source.ids.shape[1] - half)
        texts = greedy_continuations(original, prompts, limit)
        for index, (model, trace, result) in enumerate(zip(models, traces, results, strict=True)):
            mine = greedy_continuations(model, prompts, limit)
            prefix = common_prefixes(texts, mine)
            mass = None if masses is None else masses[index]
            result.fidelity[source.name] = summary(source, trace, own, prefix, mass)
            result.state_bytes[source.name] = trace.state_bytes

    def _add_accuracy(
        self,
        task: str,
        samples: list[TokenSample],
        variants: Sequence[Variant],
        results: list[Result],
        on_progress: OnProgress,
    ) -> None:
        grades: list[dict[str, Grades]] = []
        for index, (variant, result) in enumerate(zip(variants, results, strict=True)):
            grades.append(grade(variant.model, self.encoding, samples, self.settings.modes))
            result.task_bytes[task] = max(mode.state_bytes for mode in grades[-1].values())
            on_progress(f"answering {task}", (index + 1) / len(variants))
        for by_mode, result in zip(grades, results, strict=True):
            result.accuracy[task] = {
                mode: self._accuracy(mine, grades[0][mode]) for mode, mine in by_mode.items()
            }

    def _accuracy(self, mine: Grades, first: Grades) -> Accuracy:
        pairs = zip(mine.right, first.right, strict=True)
        differences = [[a - b for a, b in zip(*rows, strict=True)] for rows in pairs]
        return Accuracy(
            mean_interval(mine.right),
            mean_interval(differences),
            self._by_seed(mine.right),
            _by_evidence(mine),
        )

    def _by_seed(self, right: list[list[float]]) -> dict[str, float]:
        """Scores of each seed's samples."""
        count = self.settings.samples
        parts = [right[i : i + count] for i in range(0, len(right), count)]
        seeds = zip(self.settings.seeds, parts, strict=True)
        return {str(seed): mean_interval(part).mean for seed, part in seeds}


def _by_evidence(grades: Grades) -> dict[str, tuple[float, int]]:
    """Score and number of questions, by how much the cache held of what the answer needs."""
    found: dict[str, list[float]] = {}
    for held, right in zip(grades.held, grades.right, strict=True):
        for share, score in zip(held, right, strict=True):
            if share is not None:
                found.setdefault(HELD.get(share, "partly"), []).append(score)
    return {name: (sum(scores) / len(scores), len(scores)) for name, scores in found.items()}
