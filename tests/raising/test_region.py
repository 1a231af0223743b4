"""Regions are compared on values that can tell hypotheses apart."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rewriter.capture import capture
from rewriter.raising import raise_program
from rewriter.raising.region import close, size_choices


class Strided(nn.Module):
    """A strided convolution leaves nothing of a short sequence; a feed-forward block follows."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv1d(8, 8, kernel_size=12, stride=6)
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        """[batch_size, seq, 8] to a shorter sequence."""
        x = self.convolution(x.transpose(1, 2)).transpose(1, 2)
        return self.down(torch.nn.functional.gelu(self.up(x)))


def test_a_region_behind_a_strided_convolution_is_told_apart() -> None:
    """On an empty tensor the first activation tried would agree."""
    module = Strided()
    program = capture(module, (torch.randn(2, 40, 8),))
    raise_program(program)
    (node,) = program.calls(torch.ops.rewriter.mlp.default)
    assert node.kwargs["activation"] == "gelu"
    (sizes, _) = size_choices([node])
    assert max(sizes.values()) >= 24
    x = torch.randn(3, 64, 8)
    torch.testing.assert_close(program(x=x)[0], module(x))


def test_empty_tensors_are_no_evidence() -> None:
    assert not close(torch.ones(0, 3), torch.ones(0, 3))
    assert close(torch.ones(1, 3), torch.ones(1, 3))
    assert not close(torch.ones(1, 3), torch.ones(1, 3).double())
    assert not close(torch.ones(1, 3) * 1.001, torch.ones(1, 3))
