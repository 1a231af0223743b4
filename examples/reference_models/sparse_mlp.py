"""Accuracy when every MLP computes only its most active neurons, as a mask: no time is saved."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

__all__ = ["keep_active_neurons"]


@contextmanager
def keep_active_neurons(model: nn.Module, density: float) -> Iterator[None]:
    """In each token, only the largest |activated gate| of each layer count.

    Args:
        model: a Llama. density: share of the neurons that is kept, above 0, at most 1.
    """
    mlps = [layer.mlp for layer in model.model.layers]
    kept = max(1, round(density * mlps[0].intermediate_size))

    def forget(_module: nn.Module, _inputs: tuple, gate: Tensor) -> Tensor:
        threshold = gate.abs().topk(kept, dim=-1).values[..., -1:]
        return gate.where(gate.abs() >= threshold, 0)

    hooks = [mlp.act_fn.register_forward_hook(forget) for mlp in mlps]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
