"""The C++ votes for pages against softmax and pooling in PyTorch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import codegen.cpp_kernels.page_scores as kernel
from codegen.cpp_kernels.page_scores import PageScores, page_scores, reference
from codegen.kernel import KernelDescription
from rewriter.errors import InputError
from tests.codegen.cpp_kernels.running import ISA_CASES, mutate, needs_compiler, poisoned
from tests.codegen.tolerances import assert_near

pytestmark = [needs_compiler, pytest.mark.usefixtures("poisoned")]
__all__ = ["poisoned"]


def describe(**changes: Any) -> KernelDescription:
    told = {"operator": "page_scores", "head_dim": 20, "page_size": 16, "form": "largest"}
    return KernelDescription(**{**told, **changes})


def make(
    batch_size: int, heads: tuple[int, int], kv_len: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(kv_len)
    q = torch.randn(batch_size, heads[0], 20, generator=generator).to(dtype)
    return q, torch.randn(batch_size, heads[1], kv_len, 20, generator=generator).to(dtype)


def check(
    d: KernelDescription,
    q: Tensor,
    k: Tensor,
    *,
    first: int,
    last: int,
    keep: int,
    **options: Any,
) -> None:
    votes, chosen = page_scores(
        d, q, k, keep=keep, first=first, last=last, softmax_scale=0.4, **options
    )
    expected = reference(d, q, k, first=first, last=last, softmax_scale=0.4)
    assert_near(votes, expected)
    best = votes.topk(keep, 1).values.sort(1).values
    assert torch.equal(votes.gather(1, chosen).sort(1).values, best)
    assert (chosen.diff(dim=1) > 0).all()


@pytest.mark.parametrize(("isa", "dtype"), ISA_CASES)
def test_instruction_sets(isa: str, dtype: torch.dtype) -> None:
    for kv_len in (1, 7, 63, 65, 200):
        for threads in (1, 2, 3):
            q, k = make(2, (8, 2), kv_len, dtype)
            check(
                describe(dtype=dtype), q, k, first=0, last=kv_len, keep=1, threads=threads, isa=isa
            )


@settings(deadline=None, max_examples=40)
@given(data=st.data(), form=st.sampled_from(["largest", "sum"]), threads=st.integers(1, 4))
def test_shapes(data: st.DataObject, form: str, threads: int) -> None:
    kv_heads, kv_len = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 300))
    heads = (kv_heads * data.draw(st.sampled_from([1, 4, 6, 8])), kv_heads)
    q, k = make(data.draw(st.integers(1, 3)), heads, kv_len)
    first = data.draw(st.integers(0, kv_len - 1))
    last = data.draw(st.integers(first + 1, kv_len))
    page_size = data.draw(st.sampled_from([1, 5, 16, 64, 100]))
    keep = data.draw(st.integers(0, -(-(last - first) // page_size)))
    d = describe(form=form, page_size=page_size)
    check(d, q, k, first=first, last=last, keep=keep, threads=threads)


def test_equal_votes_choose_the_first() -> None:
    q, k = torch.ones(1, 2, 20), torch.ones(1, 1, 64, 20)
    votes, chosen = page_scores(describe(), q, k, keep=2)
    assert_near(votes, torch.full((1, 4), 2 / 64))
    assert chosen.tolist() == [[0, 1]]


def test_wrong_inputs() -> None:
    q, k = make(1, (4, 2), 40)
    for options, told in (
        ({"keep": 4}, "keep=4"),
        ({"keep": 1, "last": 41}, "entries 0 to 41"),
        ({"keep": 1, "first": 5, "last": 5}, "entries 5 to 5"),
    ):
        with pytest.raises(InputError, match=told):
            page_scores(describe(), q, k, **options)
    with pytest.raises(InputError, match="k="):
        page_scores(describe(), q, k.double(), keep=1)
    with pytest.raises(InputError, match="q="):
        page_scores(describe(), q[..., :8], k, keep=1)
    assert "page_size" in str(PageScores().supports(describe(page_size=0)))


MUTATIONS = (
    ("part[2 * i + 1] * exp_(part[2 * i] - highest)", "part[2 * i + 1]"),
    ("(shape.first + start) * k_entry", "start * k_entry"),
    ("exp_(scores[e] - lse)", "exp_(scores[e])"),
    ("vote[i] > vote[j]", "vote[i] < vote[j]"),
    ("std::sort(mine_order, mine_order + keep);", "std::reverse(mine_order, mine_order + keep);"),
    ("scores = scratch + head * padded + t", "scores = scratch + head * padded"),
    ("head = kv * group + r + i;", "head = kv * group + i;"),
)


@pytest.mark.parametrize(("old", "new"), MUTATIONS)
def test_mutations_are_noticed(old: str, new: str, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k = make(2, (12, 2), 300)

    def compare() -> None:
        check(describe(), q, k, first=30, last=290, keep=7)

    compare()
    mutate(monkeypatch, kernel, old, new)
    with pytest.raises(AssertionError):
        compare()
    kernel._entry.cache_clear()
