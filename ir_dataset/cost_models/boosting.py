"""What all boosted trees of this package have in common: the same rows and seed give the same trees."""

from __future__ import annotations

from typing import Any

__all__ = ["parameters"]


def parameters(seed: int, *, leaves: int, rate: float, **others: Any) -> dict[str, Any]:
    """For `lightgbm.train`.

    Args:
        leaves, rate: of each tree. others: LightGBM's own names, the objective among them.
    """
    return {
        "num_leaves": leaves,
        "learning_rate": rate,
        "bagging_fraction": 0.8,
        "bagging_freq": 1,
        "lambda_l2": 1.0,
        "verbosity": -1,
        "seed": seed,
        "deterministic": True,
        "force_row_wise": True,
        "num_threads": 1,
        **others,
    }
