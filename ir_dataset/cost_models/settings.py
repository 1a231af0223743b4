"""How the models that come with the package were learned; chosen on seeds that no figure is from."""

from __future__ import annotations

from ir_dataset.cost_models.cpu_features import KERNEL
from ir_dataset.cost_models.ranking import Settings

__all__ = ["CPU"]

CPU = Settings(members=3, trees=200, leaves=24, ranker_weight=0.5, kernel_features=KERNEL)
