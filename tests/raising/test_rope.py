"""Rotary embedding in every spelling, and what is not one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rewriter.errors import RewriteError
from rewriter.program import Program
from rewriter.raising.position_tables import clone_positions
from rewriter.raising.rope import raise_rope, rope_tables
from tests.raising.tiny_attention import (
    HEAD_DIM,
    Rotation,
    TinyAttention,
    TinyStack,
    captured,
    inputs,
    same_outputs,
)

ROPE = torch.ops.rewriter.rope.default
ATTENTION = torch.ops.rewriter.attention.default


def _angles(positions: Tensor, width: int = HEAD_DIM) -> Tensor:
    """[batch_size, 1, seq, width / 2]"""
    frequencies = 100.0 ** -(torch.arange(0, width, 2) / width)
    return (positions[:, None, :, None].float() * frequencies).contiguous()


def _half(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def llama(x: Tensor, positions: Tensor) -> Tensor:
    angle = torch.cat([_angles(positions)] * 2, dim=-1)
    return _half(x, angle.cos() * 1.1, angle.sin() * 1.1)  # 1.1: an attention scaling


def halves(x: Tensor, positions: Tensor) -> Tensor:
    cos, sin = _angles(positions).cos(), _angles(positions).sin()
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def interleaved(x: Tensor, positions: Tensor) -> Tensor:
    angle = _angles(positions).repeat_interleave(2, dim=-1)
    turned = torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
    return x * angle.cos() + turned * angle.sin()


def complex_product(x: Tensor, positions: Tensor) -> Tensor:
    angle = _angles(positions)
    turn = torch.polar(torch.ones_like(angle), angle)
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * turn).flatten(3).type_as(x)


def partial(x: Tensor, positions: Tensor) -> Tensor:
    angle = torch.cat([_angles(positions, 4)] * 2, dim=-1)
    rotated = _half(x[..., :4], angle.cos(), angle.sin())
    return torch.cat((rotated, x[..., 4:]), dim=-1)


def at_the_end(x: Tensor, positions: Tensor) -> Tensor:
    angle = torch.cat([_angles(positions, 4)] * 2, dim=-1)
    return torch.cat((x[..., :4], _half(x[..., 4:], angle.cos(), angle.sin())), dim=-1)


def pairs_to_halves(x: Tensor, positions: Tensor) -> Tensor:
    cos, sin = _angles(positions).cos(), _angles(positions).sin()
    even, odd = x[..., ::2], x[..., 1::2]
    return torch.cat((even * cos - odd * sin, odd * cos + even * sin), dim=-1)


def opposite(x: Tensor, positions: Tensor) -> Tensor:
    angle = torch.cat([_angles(positions)] * 2, dim=-1)
    return _half(x, angle.cos(), -angle.sin())


SPELLINGS = [llama, halves, interleaved, complex_product, partial, opposite, pairs_to_halves]


@pytest.fixture(scope="module")
def stack() -> tuple[Program, TinyStack]:
    model = TinyStack(*SPELLINGS, at_the_end)
    program = captured(model, inputs())
    assert raise_rope(program) == []
    return program, model


@pytest.mark.parametrize("rotate", SPELLINGS)
def test_spelling_is_raised(stack: tuple[Program, TinyStack], rotate: Rotation) -> None:
    attention = stack[0].calls(ATTENTION)[SPELLINGS.index(rotate)]
    q, k = attention.args[:2]
    assert q.target is ROPE and k.target is ROPE
    assert q.kwargs["interleaved"] is (rotate in (interleaved, complex_product))


def test_part_at_the_end_stays_a_concatenation(stack: tuple[Program, TinyStack]) -> None:
    attention = stack[0].calls(ATTENTION)[-1]
    assert attention.args[0].target is torch.ops.aten.cat.default
    assert len(stack[0].calls(ROPE)) == 2 * len(SPELLINGS) + 2


@pytest.mark.parametrize("seq", [1, 13])
def test_outputs_stay(stack: tuple[Program, TinyStack], seq: int) -> None:
    same_outputs(*stack, **inputs(3, seq))


def test_rotation_before_the_transpose_moves_behind_it() -> None:
    def rotate(x: Tensor, positions: Tensor) -> Tensor:
        angle = torch.cat([_angles(positions)] * 2, dim=-1).transpose(1, 2)
        return _half(x, angle.cos(), angle.sin())

    model = TinyAttention(rotate, layout="bshd")
    program = captured(model, inputs())
    assert raise_rope(program) == []
    (attention,) = program.calls(ATTENTION)
    assert [n.target for n in attention.args[:2]] == [ROPE, ROPE]
    same_outputs(program, model, **inputs(3, 7))


def test_scaling_by_position_is_a_miss_with_its_node() -> None:
    def scaled(x: Tensor, positions: Tensor) -> Tensor:
        return x * (1 + positions[:, None, :, None].float()).log()

    program = captured(TinyAttention(scaled), inputs())
    misses = raise_rope(program)
    assert len(misses) == 2
    assert misses[0].subject == "raise-rope"
    assert "not a rotation" in misses[0].reason
    assert "in forward" in misses[0].source


def test_wrong_sign_is_not_a_rotation() -> None:
    def reflected(x: Tensor, positions: Tensor) -> Tensor:
        angle = torch.cat([_angles(positions)] * 2, dim=-1)
        first, second = x.chunk(2, dim=-1)
        return x * angle.cos() + torch.cat((second, first), dim=-1) * angle.sin()

    program = captured(TinyAttention(reflected), inputs())
    assert len(raise_rope(program)) == 2
    assert not program.calls(ROPE)


def test_no_positions_no_miss() -> None:
    program = captured(TinyAttention(lambda x, positions: x), inputs())
    assert raise_rope(program) == []


@pytest.mark.parametrize("rotate", [llama, interleaved, complex_product, partial])
def test_tables_on_other_positions(stack: tuple[Program, TinyStack], rotate: Rotation) -> None:
    program = stack[0].clone()
    node = program.calls(ROPE)[2 * SPELLINGS.index(rotate)]
    old = program.placeholder("position_ids")
    with program.graph.inserting_after(program.placeholders()[-1]):
        new = program.graph.placeholder("slots")
    copies = clone_positions(program, rope_tables(node), {old: new}, before=node)
    program.graph.output_node().args = (tuple(copies),)
    program.finish()
    slots = torch.randint(0, 90, (2, 37))
    cos, sin = program(**inputs(2, 5), slots=slots)
    angle = _angles(slots, 2 * cos.shape[-1])
    scale = 1.1 if rotate is llama else 1.0
    torch.testing.assert_close(cos.expand_as(angle), angle.cos() * scale)
    torch.testing.assert_close(sin.expand_as(angle), angle.sin() * scale)


def test_tables_of_counted_positions_cannot_be_cloned() -> None:
    def counted(x: Tensor, positions: Tensor) -> Tensor:
        return llama(x, torch.arange(positions.shape[1])[None] + 0 * positions)

    program = captured(TinyAttention(counted), inputs())
    assert raise_rope(program) == []
    node, old = program.calls(ROPE)[0], program.placeholder("position_ids")
    with pytest.raises(RewriteError, match="counts positions by itself"):
        clone_positions(program, rope_tables(node), {old: old}, before=node)
