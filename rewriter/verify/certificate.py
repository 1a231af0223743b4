"""What is known about one applied, undone or refused rewrite."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from rewriter.cost.cost import Cost
from rewriter.cost.model import Prediction

__all__ = ["Certificate", "Status"]

Status = Literal["applied", "rolled_back", "unverified"]


@dataclass(frozen=True)
class Certificate:
    """One rewrite at one site: what was tried and what came out.

    Attributes:
        spec: the pass as text, e.g. `streaming-llm{num_sink_tokens=4,recent_window=252}`.
        fidelity: "exact", "reassociated" or "approximate".
        site: label for people; key: identifies the site; source: line of the user's model.
        status: whether it is in the program.
        reason: why it was undone; "" when applied.
        scenarios: inputs tried, e.g. `("prefill 1x17", "decode 1x17+6", "padded batch 3x17")`.
        implementation_error: largest |program - reference| relative to the reference's largest value.
        tolerance: what `implementation_error` had to stay below.
        method_error: metrics of reference against the original: `{"relative_l2": ..., "kl_mean": ...}`.
        cost_before, cost_after: predicted cost of one decode step at the site.
        predicted: time of one decode step at the site, inside of `costing`.
        measured_us: measured microseconds of the site, `{"before": ..., "after": ...}`, where measured.
    """

    spec: str
    fidelity: str
    site: str
    key: str
    source: str
    status: Status
    reason: str = ""
    scenarios: tuple[str, ...] = ()
    implementation_error: float | None = None
    tolerance: float | None = None
    method_error: dict[str, float] = field(default_factory=dict)
    cost_before: Cost | None = None
    cost_after: Cost | None = None
    measured_us: dict[str, float] = field(default_factory=dict)
    predicted: Prediction | None = None
