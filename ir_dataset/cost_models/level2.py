"""Level 2: one small network for several labels, learned from the corpus; kept only where it beats level 1.

    log(1 + features), scaled → 192 → 64 (the embedding) → one output for each label

Labels that a function lacks do not count. The embedding of other functions can stand among the features
of level 1, which is how what was learned from sizes may help with run times. Whether either helps is
measured by `benchmarks/cost_model.py` and published both ways.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rewriter.errors import InputError

__all__ = ["EMBEDDING", "Network", "NetworkSettings"]

EMBEDDING = 64
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class NetworkSettings:
    """How it learns: L1 of the scaled log labels, AdamW with a cosine of the rate."""

    epochs: int = 12
    batch_size: int = 1024
    rate: float = 2e-3
    weight_decay: float = 1e-2
    dropout: float = 0.1


class Network:
    """What was learned.

    Args:
        trunk, heads: modules. centre, width: of log(1 + features). label_centre, label_width: of labels.
    """

    def __init__(
        self, trunk: nn.Module, heads: nn.Module, features: tuple[Tensor, Tensor], labels: Tensor
    ) -> None:
        self.trunk, self.heads, self.features, self.labels = trunk, heads, features, labels

    @staticmethod
    def fit(
        features: NDArray[np.float32],
        labels: Sequence[Floats],
        settings: NetworkSettings | None = None,
        *,
        seed: int = 0,
    ) -> Network:
        """Learn the logs of positive labels.

        Args:
            features: [rows, columns], not negative. labels: each [rows], NaN where there is none.

        Raises:
            InputError: shapes that do not fit, or a feature below -1.
        """
        if any(len(label) != len(features) for label in labels) or not len(features):
            raise InputError("labels: another number of rows than the features is not allowed")
        settings = settings or NetworkSettings()
        generator = torch.Generator().manual_seed(seed)
        logs = _logs(features)
        centre, width = logs.mean(0), logs.std(0) + 1e-3
        wanted = torch.tensor(np.stack([np.log(label) for label in labels], 1), dtype=torch.float32)
        known = ~wanted.isnan()
        middle = torch.stack([c[k].mean() for c, k in zip(wanted.T, known.T, strict=True)])
        spread = torch.stack([c[k].std() for c, k in zip(wanted.T, known.T, strict=True)]) + 1e-6
        target = torch.where(known, (wanted - middle) / spread, 0.0)
        with torch.random.fork_rng(), torch.enable_grad():
            torch.manual_seed(seed)
            trunk, heads = _modules(logs.shape[1], len(labels), settings)
            _train(trunk, heads, (logs - centre) / width, target, known, settings, generator)
        return Network(trunk, heads, (centre, width), torch.stack([middle, spread]))

    @torch.no_grad()
    def predict(self, features: NDArray[np.float32]) -> Floats:
        """[rows, labels], in the labels' own unit."""
        scaled = self.heads(self._embedded(features)) * self.labels[1] + self.labels[0]
        return scaled.exp().double().numpy()

    @torch.no_grad()
    def embed(self, features: NDArray[np.float32]) -> Floats:
        """[rows, EMBEDDING]."""
        return self._embedded(features).double().numpy()

    def _embedded(self, features: NDArray[np.float32]) -> Tensor:
        centre, width = self.features
        return self.trunk(((_logs(features) - centre) / width).clamp(-8, 8))


def _logs(features: NDArray[np.float32]) -> Tensor:
    if features.ndim != 2 or (features.size and features.min() <= -1):
        raise InputError("features: [rows, columns] above -1 are allowed alone")
    return torch.log1p(torch.from_numpy(np.ascontiguousarray(features, np.float32)))


def _modules(columns: int, labels: int, settings: NetworkSettings) -> tuple[nn.Module, nn.Module]:
    trunk = nn.Sequential(
        nn.Linear(columns, 192),
        nn.GELU(),
        nn.Dropout(settings.dropout),
        nn.Linear(192, EMBEDDING),
        nn.GELU(),
    )
    return trunk, nn.Linear(EMBEDDING, labels)


def _train(
    trunk: nn.Module,
    heads: nn.Module,
    features: Tensor,
    target: Tensor,
    known: Tensor,
    settings: NetworkSettings,
    generator: torch.Generator,
) -> None:
    parameters = [*trunk.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=settings.rate, weight_decay=settings.weight_decay)
    steps = -(-len(features) // settings.batch_size) * settings.epochs
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    trunk.train()
    for _ in range(settings.epochs):
        for rows in torch.randperm(len(features), generator=generator).split(settings.batch_size):
            error = (heads(trunk(features[rows].clamp(-8, 8))) - target[rows]).abs()
            loss = (error * known[rows]).sum() / known[rows].sum().clamp(min=1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    trunk.eval()
