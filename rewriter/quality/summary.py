"""From what was traced, token by token, to the numbers of a report."""

from __future__ import annotations

from torch import Tensor

from rewriter.quality.fidelity import NEVER, Trace
from rewriter.quality.report import Fidelity
from rewriter.quality.retained_mass import RetainedMass
from rewriter.quality.sources import Source

__all__ = ["summary"]

POSITION_BINS = 8
DISTANCES = (0, 7, 31, 127)
"""Upper bounds of the bins of the distance since the last eviction, but for the last bin."""


def summary(
    source: Source,
    trace: Trace,
    original: Trace,
    common_prefix: list[int],
    mass: RetainedMass | None,
) -> Fidelity:
    """All measures of one variant on one source.

    Args:
        original: the original's own trace of the same rows. common_prefix: tokens, for each row.
    """
    kl = trace.kl
    seeds = {seed: [i for i, s in enumerate(source.seeds) if s == seed] for seed in source.seeds}
    return Fidelity(
        kl_mean=float(kl.mean()),
        kl_p99=float(kl.flatten().quantile(0.99)),
        agreement=float(trace.agrees.double().mean()),
        perplexity=float(trace.nll.double().mean().exp()),
        original_perplexity=float(original.nll.double().mean().exp()),
        common_prefix=sum(common_prefix) / len(common_prefix),
        mass=mass,
        by_position=_by_position(trace),
        by_distance=_by_distance(trace),
        by_seed={str(seed): float(kl[rows].mean()) for seed, rows in seeds.items()},
    )


def _by_position(trace: Trace) -> dict[str, tuple[float, float]]:
    """Bins of equal width, named by their last position."""
    length = trace.kl.shape[1]
    ends = [length * (i + 1) // POSITION_BINS for i in range(POSITION_BINS)]
    starts = [0, *ends[:-1]]
    bins = zip(starts, ends, strict=True)
    return {
        str(end - 1): _means(trace.kl[:, start:end], trace.agrees[:, start:end])
        for start, end in bins
    }


def _by_distance(trace: Trace) -> dict[str, tuple[float, float]]:
    """Bins that have tokens, named by their largest distance."""
    ago = trace.evicted_ago
    bins = {"before": ago == NEVER}
    lower = 0
    for upper in DISTANCES:
        bins[str(upper)] = (ago >= lower) & (ago <= upper)
        lower = upper + 1
    bins["more"] = ago >= lower
    return {
        name: _means(trace.kl[where], trace.agrees[where])
        for name, where in bins.items()
        if bool(where.any())
    }


def _means(kl: Tensor, agrees: Tensor) -> tuple[float, float]:
    return float(kl.mean()), float(agrees.double().mean())
