"""Similar tokens: matching, energy and merging."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from codegen.kernel import KernelDescription
from codegen.triton_kernels.token_merge import (
    TOKEN_SIMILARITY,
    merge_tokens,
    merge_tokens_reference,
    similarity_cost,
    token_energy,
    token_energy_reference,
    token_match,
    token_match_reference,
)
from rewriter.errors import InputError
from tests.codegen.tolerances import assert_near
from tests.codegen.triton_kernels.attention_cases import each_device, mutated, poisoned

MUTATIONS = [
    ("s < num_sources", "s < num_sources - 1"),
    ("tl.maximum(best, peak)", "peak"),
    ("peak > best", "peak < best"),
    ("(start + at)", "at"),
    ("* a_unit", "* 1.0"),
    ("tl.trans(unit(t))", "1.0"),
    ("beyond > 0.0", "beyond < 0.0"),
    ("far * far * -0.5", "far * -0.5"),
    ("total / num_targets", "total"),
    ("== k", "== k + 1"),
    ("acc += tl.sum(heavy[:, None] * v, 0)", "acc += tl.sum(v, 0)"),
    ("weight += tl.sum(heavy, 0)", "weight += 0.0"),
    ("mask=meets, other=0.0)", "mask=meets, other=1.0)"),
    ("d < width", "d < width - 1"),
]


def check(tokens: int, width: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> None:
    """Tokens in random order, a half going into the other; rows have NaN between them."""
    metric = torch.full((2, tokens, width + 1), torch.nan, device=device).to(dtype)[..., :width]
    metric.copy_(torch.randn(2, tokens, width))
    metric[0, 0] = 0
    x = torch.randn(2, tokens, width, device=device).to(dtype)
    size = torch.randint(1, 4, (2, tokens), device=device).float()
    order = torch.stack([torch.randperm(tokens) for _ in range(2)]).int().to(device)
    sources, targets = (half.contiguous() for half in order.tensor_split(2, 1))
    with poisoned():
        best, to = token_match(metric, sources, targets)
        expected, expected_to = token_match_reference(metric, sources, targets)
        merged, sizes = merge_tokens(x, size, targets, sources, expected_to)
        energies = [token_energy(metric, margin=0.3, form=form) for form in ("elu", "gauss")]
    assert_near(best, expected)
    found = _cosines(metric, sources, targets).gather(2, to.long().unsqueeze(2)).squeeze(2)
    assert_near(found, expected)  # another target may be as near
    wanted, wanted_sizes = merge_tokens_reference(x, size, targets, sources, expected_to)
    assert_near(merged, wanted)
    assert_near(sizes, wanted_sizes)
    for form, energy in zip(("elu", "gauss"), energies, strict=True):
        assert_near(energy, token_energy_reference(metric, margin=0.3, form=form))


def _cosines(metric: torch.Tensor, sources: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    batch = torch.arange(len(metric), device=metric.device).unsqueeze(1)
    a, b = metric.float()[batch, sources.long()], metric.float()[batch, targets.long()]
    unit = torch.nn.functional.normalize
    return unit(a, dim=-1) @ unit(b, dim=-1).transpose(1, 2)


@each_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "width"), [(2, 1), (7, 63), (65, 20)])
def test_odd_sizes(tokens: int, width: int, dtype: torch.dtype, device: str) -> None:
    check(tokens, width, dtype, device)


@settings(max_examples=6, deadline=None)
@given(st.integers(2, 40), st.integers(1, 40))
def test_any_shape(tokens: int, width: int) -> None:
    check(tokens, width)


def test_nothing_to_merge_is_the_input() -> None:
    x, size = torch.randn(1, 5, 3), torch.ones(1, 5)
    everyone = torch.arange(5, dtype=torch.int32).unsqueeze(0)
    none = everyone[:, :0].contiguous()
    out, sizes = merge_tokens(x, size, everyone, none, none)
    assert torch.equal(out, x)
    assert torch.equal(sizes, size)
    best, to = token_match(x, none, everyone)
    assert best.numel() == to.numel() == 0


def test_merging_keeps_the_weighted_sum() -> None:
    x, size = torch.randn(2, 12, 8), torch.rand(2, 12) + 0.5
    order = torch.arange(12, dtype=torch.int32).expand(2, -1)
    sources, kept = order[:, ::2].contiguous(), order[:, 1::2].contiguous()
    _, to = token_match(x, sources, kept)
    out, sizes = merge_tokens(x, size, kept, sources, to)
    assert_near((out * sizes.unsqueeze(-1)).sum(1), (x * size.unsqueeze(-1)).sum(1))


@pytest.mark.parametrize(("old", "new"), MUTATIONS)
def test_mutations_are_noticed(old: str, new: str) -> None:
    with mutated(old, new), pytest.raises(AssertionError, match="close"):
        check(70, 20)


def test_what_is_refused() -> None:
    x, ids = torch.randn(1, 4, 3), torch.zeros(1, 2, dtype=torch.int32)
    with pytest.raises(InputError, match="targets: none"):
        token_match(x, ids, ids[:, :0])
    with pytest.raises(InputError, match="sources: contiguous int32"):
        token_match(x, ids.long(), ids)
    with pytest.raises(InputError, match="size: float32"):
        merge_tokens(x, torch.ones(1, 3), ids, ids, ids)
    wide = KernelDescription(operator="token_similarity", form="elu", head_dim=300)
    assert TOKEN_SIMILARITY.supports(wide) == "head_dim=300, allowed: a metric of 1 to 256"


def test_cost() -> None:
    assert similarity_cost(torch.empty(1, 32, 8)).flops == 2 * 32 * 32 * 8
