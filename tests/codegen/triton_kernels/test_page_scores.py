"""Votes of heads on pages against whole softmaxes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from codegen.kernel import KernelDescription
from codegen.triton_kernels.page_scores import (
    PAGE_SCORES,
    page_scores,
    page_scores_cost,
    page_scores_reference,
    top_pages,
)
from rewriter.errors import InputError
from tests.codegen.tolerances import assert_near
from tests.codegen.triton_kernels.attention_cases import (
    DEVICE,
    cached,
    each_device,
    mutated,
    poisoned,
    queries,
)

PLAIN = KernelDescription(
    operator="page_scores", head_dim=16, group_size=2, mask="full", form="sum", page_size=4
)


def check(
    d: KernelDescription,
    kv_lens: list[int],
    device: str = DEVICE,
    *,
    num_kv_heads: int = 2,
    num_splits: int = 1,
    per_kv_head: bool = False,
    start: int = 2,
    local: int = 3,
) -> None:
    """The first `start` and the last `local` entries of each request are no candidates."""
    cache = cached(d, kv_lens, num_kv_heads, device)
    lens = torch.tensor(kv_lens, device=device)
    q, _ = queries(d, len(kv_lens), num_kv_heads, lens, 1)
    starts, stops = torch.full_like(lens, start), (lens - local).clamp_min(0)
    given_tensors = (d, q[:, :, 0], cache.k)
    options = {
        "softmax_scale": 0.7,
        "starts": starts,
        "stops": stops,
        "per_kv_head": per_kv_head,
    }
    with poisoned():
        pages = page_scores(
            *given_tensors,
            num_splits=num_splits,
            k_positions=cache.k_positions,
            block_table=cache.block_table,
            **options,  # type: ignore[arg-type]
        )
    assert_near(pages, page_scores_reference(*given_tensors, index=cache.index, **options))  # type: ignore[arg-type]


@each_device
@pytest.mark.parametrize("kv_len", [1, 7, 63, 65])
@pytest.mark.parametrize("group_size", [1, 4, 8])
def test_odd_lengths_and_groups(kv_len: int, group_size: int, device: str) -> None:
    check(replace(PLAIN, group_size=group_size), [kv_len], device)


@each_device
@pytest.mark.parametrize("layout", ["bhsd", "slots", "paged"])
@pytest.mark.parametrize("form", ["max", "sum"])
@pytest.mark.parametrize("per_kv_head", [False, True])
def test_layouts_and_forms(layout: str, form: str, per_kv_head: bool, device: str) -> None:
    d = replace(PLAIN, layout=layout, form=form, page_size=5)
    check(d, [66, 30, 0], device, num_splits=3, per_kv_head=per_kv_head)


@each_device
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits(dtype: torch.dtype, device: str) -> None:
    check(replace(PLAIN, dtype=dtype, page_size=16), [150, 7], device, num_splits=2)


@each_device
def test_entries_are_pages_of_one(device: str) -> None:
    check(replace(PLAIN, page_size=1, softcap=0.5, head_dim=40), [300], device, num_kv_heads=1)


@settings(max_examples=8, deadline=None)
@given(
    lens=st.lists(st.integers(0, 70), min_size=1, max_size=2),
    group_size=st.sampled_from([1, 3, 8]),
    layout=st.sampled_from(["bhsd", "slots", "paged"]),
    page_size=st.sampled_from([1, 3, 4, 16]),
    form=st.sampled_from(["max", "sum"]),
    splits=st.integers(1, 4),
    start=st.integers(0, 9),
    local=st.integers(0, 9),
)
def test_any_shape(
    lens: list[int],
    group_size: int,
    layout: str,
    page_size: int,
    form: str,
    splits: int,
    start: int,
    local: int,
) -> None:
    d = replace(PLAIN, group_size=group_size, layout=layout, page_size=page_size, form=form)
    check(d, lens, num_kv_heads=1, num_splits=splits, start=start, local=local)


def test_top_pages_are_those_of_the_reference() -> None:
    q, k = torch.randn(2, 4, 16, device=DEVICE), torch.randn(2, 2, 40, 16, device=DEVICE)
    options = {
        "softmax_scale": 1.0,
        "starts": torch.tensor([4, 38], device=DEVICE),
        "stops": torch.tensor([36, 40], device=DEVICE),
    }
    pages = top_pages(page_scores(PLAIN, q, k, **options), 3)  # type: ignore[arg-type]
    expected = page_scores_reference(PLAIN, q, k, index=options["starts"], **options)  # type: ignore[arg-type]
    assert pages[0].tolist() == expected[0].topk(3).indices.tolist()
    assert pages[1].tolist() == [[9, -1, -1]]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("head = (kv_head * GROUP_SIZE + g)", "head = (kv_head + g)"),
        ("(j < end_position)", "(j <= end_position)"),
        ("total * shrink", "total"),
        ("vote += tl.exp2(found - base)", "vote += tl.exp2(found)"),
        ("row = ballot * num_voters + voter", "row = ballot * num_voters"),
        ("mask=split < num_splits", "mask=split < num_splits - 1"),
        ("result = tl.sum(vote, 1)", "result = tl.max(vote, 1)"),
        (") * softmax_scale", ")"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mutations_are_noticed(old: str, new: str, dtype: torch.dtype) -> None:
    d = replace(PLAIN, dtype=dtype, layout="slots")
    with mutated(old, new), pytest.raises(AssertionError, match="close"):
        check(d, [270, 190], num_splits=2)


def test_what_does_not_fit_is_refused() -> None:
    q, k = torch.zeros(1, 2, 16), torch.zeros(1, 1, 4, 16)
    ends = torch.zeros(1, dtype=torch.int64)
    with pytest.raises(InputError, match="num_splits=65"):
        page_scores(PLAIN, q, k, softmax_scale=1.0, starts=ends, stops=ends, num_splits=65)
    assert "page_size=2000" in (PAGE_SCORES.supports(replace(PLAIN, page_size=2000)) or "")


def test_cost_reads_keys_once() -> None:
    d = replace(PLAIN, head_dim=128, group_size=4, dtype=torch.bfloat16)
    assert page_scores_cost(d, 1, 32, 1000).bytes_moved < 1.3 * 8 * 128 * 2 * 1000
