"""The C++ rotary append against the dialect's rope and scatter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import codegen.cpp_kernels.rotary_append as kernel
from codegen.cpp_kernels.rotary_append import RotaryAppend, reference, rotary_append
from codegen.kernel import KernelDescription
from rewriter.errors import InputError
from tests.codegen.cpp_kernels.running import ISA_CASES, mutate, needs_compiler, poisoned
from tests.codegen.tolerances import assert_near

pytestmark = [needs_compiler, pytest.mark.usefixtures("poisoned")]
__all__ = ["poisoned"]


def describe(form: str = "half", **changes: Any) -> KernelDescription:
    return KernelDescription(operator="rotary_append", form=form, **changes)


def make(
    d: KernelDescription, head_dim: int, value_dim: int, width: int, q_len: int = 1
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(head_dim)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    entry = d.weight_dtype or d.dtype
    angles = normal(2, q_len, width // 2)
    new = {"q": (4, head_dim), "k": (2, head_dim), "v": (2, value_dim)}
    rows = {n: normal(2, q_len, h, w).transpose(1, 2).to(d.dtype) for n, (h, w) in new.items()}
    return {
        **rows,
        "k_cache": normal(2, 2, 12, head_dim).to(entry),
        "v_cache": normal(2, 2, 12, value_dim).to(entry),
        "cos": angles.cos(),
        "sin": angles.sin(),
    }


def check(d: KernelDescription, given: dict[str, Tensor], places: Tensor, **options: Any) -> None:
    mine = {n: t.clone() if "cache" in n else t for n, t in given.items()}
    theirs = {n: t.clone() for n, t in given.items()}
    q = rotary_append(d, **mine, **options)
    expected = reference(**theirs, slots=places, interleaved=d.form == "interleaved")
    assert_near(q, expected)
    for name in ("k_cache", "v_cache"):
        assert_near(mine[name], theirs[name])


@pytest.mark.parametrize(("isa", "entry"), ISA_CASES)
@pytest.mark.parametrize("form", ["half", "interleaved"])
def test_instruction_sets(isa: str, form: str, entry: torch.dtype) -> None:
    d = describe(form, weight_dtype=entry)
    for head_dim, value_dim, width in ((64, 64, 64), (65, 7, 30), (2, 1, 2)):
        for threads in (1, 2, 3):
            given = make(d, head_dim, value_dim, width)
            check(d, given, torch.full((2, 1), 5), offset=5, threads=threads, isa=isa)


@settings(deadline=None, max_examples=30)
@given(
    head_dim=st.integers(1, 80),
    part=st.floats(0, 1),
    q_len=st.integers(0, 4),
    threads=st.integers(1, 4),
    by_slots=st.booleans(),
    form=st.sampled_from(["half", "interleaved"]),
)
def test_shapes(
    head_dim: int, part: float, q_len: int, threads: int, by_slots: bool, form: str
) -> None:
    d = describe(form)
    given = make(d, head_dim, 9, int(part * head_dim / 2) * 2, q_len)
    slots = torch.stack((torch.arange(q_len), torch.arange(q_len).flip(0) + 3))
    if by_slots:
        check(d, given, slots, slots=slots, threads=threads)
    else:
        check(d, given, torch.arange(q_len).expand(2, q_len) + 2, offset=2, threads=threads)


def test_bfloat16_rows() -> None:
    d = describe(dtype=torch.bfloat16)
    check(d, make(d, 32, 32, 16), torch.full((2, 1), 0))


def test_wrong_inputs() -> None:
    given = make(describe(), 8, 8, 8)
    with pytest.raises(InputError, match="below 12"):
        rotary_append(describe(), **given, offset=12)
    with pytest.raises(InputError, match="below 12"):
        rotary_append(describe(), **given, slots=torch.tensor([[-1], [0]]))
    with pytest.raises(InputError, match="cos="):
        rotary_append(describe(), **{**given, "cos": torch.zeros(2, 1, 5)})
    with pytest.raises(InputError, match="v_cache="):
        rotary_append(describe(), **{**given, "v_cache": torch.zeros(2, 2, 12, 9)})
    assert "form" in str(RotaryAppend().supports(describe("neox")))


MUTATIONS = (
    ("store(out + i, a * c - b * s);", "store(out + i, a * c + b * s);"),
    ("for (i = width; i < dim; ++i)", "for (i = width; i < 0; ++i)"),
    ("to_float(x[half + i])", "to_float(x[i])"),
    ("i * shape.table_row", "0 * shape.table_row"),
    ("k_cache.at(b, kv_head, slot(b, i))", "k_cache.at(b, kv_head, slot(b, 0))"),
    ("kv_head = (head - shape.num_heads) / 2", "kv_head = 0"),
)


@pytest.mark.parametrize(("old", "new"), MUTATIONS)
def test_mutations_are_noticed(old: str, new: str, monkeypatch: pytest.MonkeyPatch) -> None:
    d = describe()
    given, slots = make(d, 50, 9, 46, q_len=3), torch.tensor([[4, 2, 7], [0, 1, 2]])
    check(d, given, slots, slots=slots)
    mutate(monkeypatch, kernel, old, new)
    with pytest.raises(AssertionError):
        check(d, given, slots, slots=slots)
    kernel._entry.cache_clear()
