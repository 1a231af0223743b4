"""The normal form computes the same with one spelling, and what only looks neutral stays."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from rewriter.capture import capture
from rewriter.program import Program
from rewriter.raising.normal_form import normalize

aten = torch.ops.aten


def normal(module: nn.Module, *example: Tensor) -> Program:
    """The module in normal form; checks that it computes the same at another size."""
    program = capture(module.eval(), example)
    normalize(program)
    inputs = [torch.randn(5, *x.shape[1:]) for x in example]
    names = [node.name for node in program.placeholders()]
    outputs = program(**dict(zip(names, inputs, strict=True)))
    torch.testing.assert_close(outputs[0], module(*inputs))
    return program


def operators(program: Program) -> list[object]:
    """Targets of all calls, sizes left out."""
    calls = program.graph.find_nodes(op="call_function", target=aten.sym_size.int)
    sizes = set(calls)
    return [n.target for n in program.graph.nodes if n.op == "call_function" and n not in sizes]


class Identities(nn.Module):
    """Everything here returns its input."""

    def forward(self, x: Tensor) -> Tensor:
        """Like x."""
        x = functional.dropout(x[:, :].clone().contiguous() * 1.0 + 0.0, 0.1, self.training)
        return (x.to(x.dtype).expand(x.shape[0], -1, -1).transpose(1, 2).transpose(1, 2) / 1).relu()


def test_operators_that_return_their_input_go() -> None:
    assert operators(normal(Identities(), torch.randn(3, 4, 6))) == [aten.relu.default]


class Neutral(nn.Module):
    """Almost identities: every one of them changes something."""

    def forward(self, x: Tensor) -> Tensor:
        """[batch_size, 2, 6]."""
        x = x[:, 1:3].double() * 1.0001
        return x.float() + 1.0


def test_what_changes_something_stays() -> None:
    left = operators(normal(Neutral(), torch.randn(3, 4, 6)))
    wanted = [aten.slice.Tensor, aten._to_copy.default, aten.mul.Tensor, aten._to_copy.default]
    assert left == [*wanted, aten.add.Tensor]


def test_times_one_that_promotes_the_dtype_stays() -> None:
    class Promote(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x > 0).long() * 1.0

    program = normal(Promote(), torch.randn(3, 4, 6))
    assert aten.mul.Tensor in operators(program)


class Repeated(nn.Module):
    """Two layers that each build the same mask and table."""

    def forward(self, x: Tensor) -> Tensor:
        """Like x."""
        for _ in range(2):
            mask = torch.arange(x.shape[0])[:, None] >= torch.arange(x.shape[0])[None, :]
            x = mask.float() @ x.flatten(1).view(x.shape[0], -1) + 1
            x = x.reshape(x.shape[0], 4, 6)
        return x


def test_equal_calls_are_merged() -> None:
    left = operators(normal(Repeated(), torch.randn(3, 4, 6)))
    assert left.count(aten.arange.default) == left.count(aten.ge.Tensor) == 1
    assert left.count(aten.matmul.default) == 2
    assert aten.view.default not in left and aten._unsafe_view.default not in left


def test_random_calls_and_different_literals_are_not_merged() -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x + 1) * (x + 1.5) * (x + True) + 0 * (torch.rand_like(x) - torch.rand_like(x))

    left = operators(normal(Two(), torch.randn(3, 4, 6)))
    assert left.count(aten.rand_like.default) == 2
    assert left.count(aten.add.Tensor) == 4


def test_einsum_becomes_a_product() -> None:
    class Product(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return torch.einsum("bqhd,bkhd->bhqk", x, y)

    left = operators(normal(Product(), torch.randn(3, 4, 2, 6), torch.randn(3, 5, 2, 6)))
    assert aten.matmul.default in left and aten.einsum.default not in left


def test_an_einsum_that_is_no_product_stays() -> None:
    class Trace(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return torch.einsum("bij,bij->b", x, y)

    left = operators(normal(Trace(), torch.randn(3, 4, 6), torch.randn(3, 4, 6)))
    assert aten.einsum.default in left


def test_the_work_is_linear() -> None:
    """Doubling the layers at most doubles the nodes: nothing is duplicated."""

    def nodes(layers: int) -> int:
        stack = nn.Sequential(
            *(nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.1)) for _ in range(layers))
        )
        return len(normal(stack, torch.randn(3, 4, 6)).graph.nodes)

    assert nodes(8) - nodes(4) == nodes(12) - nodes(8)
