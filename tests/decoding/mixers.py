"""Language models with one more operator in their last layer, for the analysis of mixing."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from tests.small_lms import small_lm

__all__ = ["with_operator"]


class Beside(nn.Module):
    """A layer and a function of its input, added."""

    def __init__(self, inner: nn.Module, extra: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.inner, self.extra = inner, extra

    def forward(self, hidden: Tensor) -> Tensor:
        return self.inner(hidden) + self.extra(hidden)


def with_operator(extra: Callable[[Tensor], Tensor]) -> Any:
    """A small Llama whose last MLP also adds `extra(hidden)`, hidden [batch_size, seq, 32]."""
    model = copy.deepcopy(small_lm())
    model.model.layers[-1].mlp = Beside(model.model.layers[-1].mlp, extra)
    return model
