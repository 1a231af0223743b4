"""Where q, k and v come from."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from rewriter.raising.projections import coverage_of_projections, raise_projections
from tests.raising.tiny_attention import captured


class _Attentions(nn.Module):
    """Fused q, k and v; fused k and v; separate ones; and none."""

    def __init__(self) -> None:
        super().__init__()
        self.all_three, self.two = nn.Linear(8, 24), nn.Linear(8, 16)
        self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        inputs = (
            self.all_three(x).chunk(3, dim=-1),
            (self.q(x), *self.two(x).split(8, dim=-1)),
            (self.q(x), self.k(x), self.v(x)),
            (x, x, x),
        )
        return tuple(self.attend(*qkv) for qkv in inputs)

    def attend(self, *qkv: Tensor) -> Tensor:
        heads = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in qkv)
        return functional.scaled_dot_product_attention(*heads, is_causal=True)


def test_kinds() -> None:
    program = captured(_Attentions(), {"x": torch.randn(2, 5, 8)})
    assert raise_projections(program) == []
    calls = program.calls(torch.ops.rewriter.attention.default)
    kinds = [node.meta["projection"] for node in calls]
    assert kinds == ["fused_qkv", "fused_kv", "separate", "other"]
    coverage = coverage_of_projections(program)
    assert (coverage.raised, coverage.candidates) == (3, 4)
    assert coverage.kinds == ("fused_qkv", "fused_kv", "separate")
