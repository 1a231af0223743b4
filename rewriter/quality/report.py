"""The result of a quality run: numbers by variant, as data."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from rewriter.quality.bootstrap import Interval
from rewriter.quality.retained_mass import RetainedMass

__all__ = ["Accuracy", "Fidelity", "QualityReport", "Result"]


@dataclass(frozen=True)
class Fidelity:
    """Distance from the original on one source.

    Attributes:
        kl_mean, kl_p99: nats, teacher forced. agreement: share of equal most likely tokens.
        perplexity, original_perplexity: of the rows, streamed token by token.
        common_prefix: tokens of greedy text until it leaves the original's, mean.
        mass: of the attention that is kept; None where it was not measured.
        by_position: upper bound of the positions -> (mean KL, agreement).
        by_distance: tokens since the last eviction, by upper bound; "before" = nothing evicted yet.
        by_seed: mean KL of each seed's rows.
    """

    kl_mean: float
    kl_p99: float
    agreement: float
    perplexity: float
    original_perplexity: float
    common_prefix: float
    mass: RetainedMass | None
    by_position: dict[str, tuple[float, float]]
    by_distance: dict[str, tuple[float, float]]
    by_seed: dict[str, float]


@dataclass(frozen=True)
class Accuracy:
    """Share of right answers on one task in one mode.

    Attributes:
        score: over all samples. difference: to the variant it is compared with, paired by sample.
        by_seed: score of each seed's samples.
        by_evidence: score, and number of questions, by whether the cache still held what the answer
            needs of the context when it was asked: "kept", "partly" (by some layers or heads) or
            "dropped"; empty where a task has no such thing.
    """

    score: Interval
    difference: Interval
    by_seed: dict[str, float]
    by_evidence: dict[str, tuple[float, int]]


@dataclass
class Result:
    """Everything measured on one variant.

    Attributes:
        label: its passes. control: name of the control it is, or "". density: what was asked for.
        state_bytes: of one row, by source. task_bytes: the same, by task.
        fidelity: by source. accuracy: by task, then mode.
        undone: rewrites that verification left out.
    """

    label: str
    specs: tuple[str, ...]
    control: str
    density: float | None
    state_bytes: dict[str, int] = field(default_factory=dict)
    task_bytes: dict[str, int] = field(default_factory=dict)
    fidelity: dict[str, Fidelity] = field(default_factory=dict)
    accuracy: dict[str, dict[str, Accuracy]] = field(default_factory=dict)
    undone: tuple[str, ...] = ()


@dataclass
class QualityReport:
    """Results of all variants, the one they are compared with first.

    Attributes:
        settings: what was asked for, enough to run it again. versions: of what ran it.
    """

    model: str
    settings: dict[str, Any]
    versions: dict[str, str]
    results: list[Result]

    def to_json(self) -> dict[str, Any]:
        """Plain lists, dicts, strings and numbers."""
        return dataclasses.asdict(self)
