"""What came out for each candidate, as a table and as a dict for the results."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from timing import Samples

from peers.agreement import Agreement
from peers.candidates import Candidate

__all__ = ["Outcome", "Timed", "as_dict", "phase_table", "table"]


@dataclass
class Timed:
    """One candidate behind one context."""

    agreement: Agreement
    samples: Samples
    prefill_ms: float
    bytes_per_token: int
    floor_ms: float = float("nan")
    phases: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class Outcome:
    """One candidate: its facts and times, or why there are none.

    Attributes:
        status: "timed", "unavailable" (it says so itself), "wrong" (its logits), or "failed".
        group: candidates of one group were in memory together and took turns.
    """

    candidate: Candidate
    status: str = "timed"
    reason: str = ""
    facts: dict[str, Any] = field(default_factory=dict)
    load_s: float = 0.0
    memory_bytes: int = 0
    group: int = 0
    contexts: dict[int, Timed] = field(default_factory=dict)


def as_dict(outcomes: Sequence[Outcome], contexts: Sequence[int]) -> dict[str, Any]:
    """Facts of each candidate, and for each context its times over the floor and the best peer's."""
    return {
        "candidates": {outcome.candidate.name: _facts(outcome) for outcome in outcomes},
        "contexts": [
            {
                "context": context,
                "candidates": {
                    outcome.candidate.name: _times(outcome.contexts[context], outcomes, context)
                    for outcome in outcomes
                    if context in outcome.contexts
                },
            }
            for context in contexts
        ],
    }


def table(outcomes: Sequence[Outcome], context: int, title: str) -> Table:
    """One context, quickest median first."""
    result = Table(title=title, box=SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    result.add_column("candidate", no_wrap=True)
    for header in (
        "min",
        "p50",
        "p90",
        "floor",
        "min/floor",
        "p50/floor",
        "p50/peer",
        "KL",
        "same",
    ):
        result.add_column(header, justify="right", no_wrap=True)
    timed = [outcome for outcome in outcomes if context in outcome.contexts]
    for outcome in sorted(timed, key=lambda o: o.contexts[context].samples.p50):
        times = outcome.contexts[context]
        found = _times(times, timed, context)
        keys = (
            "min_ms p50_ms p90_ms floor_ms min_over_floor p50_over_floor p50_over_best_peer".split()
        )
        cells = [_short(found[key]) for key in keys]
        same = f"{times.agreement.same_tokens}/{times.agreement.rows}"
        name = (
            f"[bold]{outcome.candidate.name}" if outcome.candidate.ours else outcome.candidate.name
        )
        result.add_row(name, *cells, f"{times.agreement.divergence:.0e}", same)
    return result


def _short(number: float | None) -> str:
    if number is None:
        return "-"
    return f"{number:.2f}" if number < 100 else f"{number:.0f}"


def _facts(outcome: Outcome) -> dict[str, Any]:
    if outcome.status != "timed":
        return {"status": outcome.status, "reason": outcome.reason, **outcome.facts}
    memory = {"load_s": round(outcome.load_s, 1), "memory_mib": outcome.memory_bytes >> 20}
    return {"status": "timed", "group": outcome.group, **memory, **outcome.facts}


def _times(times: Timed, outcomes: Sequence[Outcome], context: int) -> dict[str, Any]:
    others = [o for o in outcomes if not o.candidate.ours and context in o.contexts]
    best = min((o.contexts[context].samples.p50 for o in others), default=None)
    samples = times.samples
    return {
        **samples.as_dict(),
        "prefill_ms": round(times.prefill_ms, 1),
        "bytes_per_token": times.bytes_per_token,
        "floor_ms": times.floor_ms,
        "p50_over_floor": samples.p50 / times.floor_ms,
        "min_over_floor": samples.least / times.floor_ms,
        "p50_over_best_peer": samples.p50 / best if best else None,
        "agreement": dataclasses.asdict(times.agreement),
        **({"phases": times.phases} if times.phases else {}),
    }


def phase_table(times: Timed, title: str) -> Table:
    """Where a step's time goes, at what bandwidth, and what part of the floor its bytes are."""
    result = Table(title=title, box=SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    result.add_column("phase", no_wrap=True)
    for header in ("calls", "ms", "waiting", "MB", "GB/s", "of the step", "of the floor"):
        result.add_column(header, justify="right", no_wrap=True)
    whole = sum(phase["ms"] for phase in times.phases)
    for phase in times.phases:
        read, ms = phase["bytes"], phase["ms"]
        speed = f"{read / ms / 1e6:.1f}" if read and ms else "-"
        shares = (f"{ms / whole:.1%}", f"{read / times.bytes_per_token:.1%}")
        cells = (
            str(phase["calls"]),
            f"{ms:.3f}",
            f"{phase['waiting_ms']:.3f}",
            f"{read / 1e6:.1f}",
        )
        result.add_row(phase["phase"], *cells, speed, *shares)
    return result
