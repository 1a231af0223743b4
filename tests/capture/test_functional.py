"""Rewriting nodes gives what tracing again with `run_decompositions({})` gives."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from rewriter.capture import capture
from rewriter.capture.functional import functionalize


class Function(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        self.register_buffer("table", torch.arange(6.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def in_place_on_fresh(x: Tensor) -> Tensor:
    y = x * 2
    z = y + 1
    y.add_(z)
    return y * z


def in_place_on_sole_view(x: Tensor) -> Tensor:
    y = torch.bmm(x, x.transpose(1, 2))[:, 0].squeeze(1)
    y.add_(3)
    return y


def in_place_seen_through_view(x: Tensor) -> Tensor:
    y = x * 2
    row = y[:, 0]
    y.add_(1)
    return y + row.unsqueeze(1)


def assigned_slice(x: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    y[:, 1:] = x[:, :-1]
    return y


def in_place_through_view(x: Tensor) -> Tensor:
    y = x * 2
    y[..., 0].mul_(5)
    return y


def shapes(x: Tensor) -> Tensor:
    y = x.transpose(1, 2).contiguous().view(x.shape[0], -1).unflatten(1, (6, -1)).flatten(1)
    first, second = y.chunk(2, dim=0) if y.shape[0] == 2 else (y, y)
    return first.expand_as(second).to(torch.float64).type_as(x) + x.T.T.flatten(1)[:1].sum()


def dropped(x: Tensor) -> Tensor:
    return nn.functional.dropout(x.to(x.dtype), 0.5, training=False).reshape(-1, 6)


EASY = (in_place_on_fresh, in_place_on_sole_view, dropped)
HARD = (in_place_seen_through_view, assigned_slice, in_place_through_view)


def exported(function: Callable[[Tensor], Tensor]) -> torch.fx.GraphModule:
    program = torch.export.export(Function(function), (torch.randn(3, 4, 6),), strict=False)
    return program.module(check_guards=False)


@pytest.mark.parametrize("function", [*EASY, *HARD])
def test_values_are_those_of_the_function(function: Callable[[Tensor], Tensor]) -> None:
    program = capture(Function(function), (torch.randn(3, 4, 6),))
    for batch_size, length in ((3, 4), (5, 7)):
        x = torch.randn(batch_size, length, 6)
        assert torch.equal(program(x=x)[0], function(x.clone()))


@pytest.mark.parametrize("function", EASY)
def test_usual_operators_need_no_second_trace(function: Callable[[Tensor], Tensor]) -> None:
    graph = exported(function).graph
    assert functionalize(graph)
    written = [
        n for n in graph.nodes if getattr(getattr(n.target, "_schema", None), "is_mutable", 0)
    ]
    assert written == []


@pytest.mark.parametrize("function", HARD)
def test_shared_memory_is_left_to_torch(function: Callable[[Tensor], Tensor]) -> None:
    assert not functionalize(exported(function).graph)


@pytest.mark.filterwarnings("ignore:The use of `x.T`")
def test_composite_shapes() -> None:
    x = torch.randn(3, 4, 6)
    program = capture(Function(shapes), (x,))
    torch.testing.assert_close(program(x=x)[0], shapes(x))
    assert not program.calls(torch.ops.aten.view.default)


def test_active_dropout_is_not_dropped() -> None:
    graph = exported(lambda x: nn.functional.dropout(x, 0.5, training=True)).graph
    assert not functionalize(graph)
