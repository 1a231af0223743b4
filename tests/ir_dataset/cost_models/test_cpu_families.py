"""Families give numpy's numbers in every kind of configuration, and their data goes with their text."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from ir_dataset.cost_models import cpu_data
from ir_dataset.cost_models.assembly import FEATURES, busiest_loops, count_loop
from ir_dataset.cost_models.cpu_families import FAMILIES
from ir_dataset.cost_models.cpu_features import NAMES
from ir_dataset.cost_models.cpu_loops import (
    CONFIGURATIONS,
    DEFAULT,
    Configuration,
    Shape,
    body_name,
    source,
)
from ir_dataset.cost_models.measure import Runner, measure
from rewriter.errors import VerificationError
from tests.codegen.cpp_kernels.running import needs_compiler

SOME = (
    DEFAULT,
    Configuration(rows=2, unroll=4, width=8, block=256, prefetch=0, threads=2),
    Configuration(rows=1, unroll=1, width=8, block=0, prefetch=256, threads=1),
)


def test_default_is_one_of_them_and_shapes_have_no_remainders() -> None:
    assert DEFAULT in CONFIGURATIONS and len(set(CONFIGURATIONS)) == 72
    for family in FAMILIES.values():
        assert len(set(family.shapes)) == len(family.shapes) >= 8
        assert all(s.rows % 8 == 0 and s.columns % 64 == 0 for s in family.shapes)


@needs_compiler
@pytest.mark.parametrize("name", ["gather_rows", "softmax", "scan", "stencil"])
def test_numbers(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    from codegen.cpp_kernels.compiler import compile_library, inline_headers

    family = FAMILIES[name]
    library = compile_library(inline_headers(source(family, SOME)))
    runner = Runner(family, Shape(40, 320, 1), library)
    for configuration in SOME:
        runner.check(configuration)
        assert runner.seconds(configuration, 0.0) > 0


@needs_compiler
def test_wrong_numbers_are_never_timed() -> None:
    good = FAMILIES["rank_one"]
    wrong = replace(
        good, shapes=(Shape(8, 64),), reference=lambda t, s: 1.01 * good.reference(t, s)
    )
    with pytest.raises(VerificationError, match=r"rank_one .* error 9.9"):
        list(measure([wrong], passes=1, budget_s=0.0))
    with pytest.raises(VerificationError, match="nan"):
        silent = replace(good, shapes=(Shape(8, 64),), inside="")
        list(measure([silent], passes=1, budget_s=0.0))


def test_loops_of_assembly() -> None:
    text = """
body_r1:
\tpushq\t%rbx
.L2:
\taddq\t$1, %rax
.L3:
\tvmovups\t(%rdi,%rax), %zmm1
\tvfmadd231ps\t(%rsi,%rax), %zmm1, %zmm0
\tvmovaps\t%zmm0, 8(%rsp)
\taddq\t$64, %rax
\tcmpq\t%rax, %rdx
\tjne\t.L3
\tcmpq\t%rcx, %rdx
\tjne\t.L2
\tret
body_r2:
\tret
"""
    loops = busiest_loops(text)
    loop, whole = loops["body_r1"]
    assert len(loop) == 6 and len(whole) == 11 and loops["body_r2"][0] == []
    told = count_loop(loop, whole)
    wanted = {"loop_fma": 1, "loop_loads": 2, "loop_stores": 1, "loop_512": 3, "loop_stack": 1}
    assert {name: told[name] for name in wanted} == wanted
    assert set(FEATURES) == {*told, "mca_cycles", "mca_uops"}


def test_shipped_measurements() -> None:
    pytest.importorskip("pyarrow")
    data = cpu_data.load()
    groups = np.unique(data.groups.groups)
    assert data.groups.features.shape == (len(groups) * len(CONFIGURATIONS), len(NAMES))
    assert np.isfinite(data.groups.features).all() and data.default.sum() == len(groups)
    assert len(data.family_names) >= 8 and len(groups) >= 8 * 8
    half = np.flatnonzero(data.groups.groups % 2 == 0)
    other = np.flatnonzero(data.groups.groups % 2)
    known, asked = data.groups.chosen(half), data.groups.chosen(other)
    train, test = cpu_data.with_priors(known, asked)
    assert train.names[-len(cpu_data.PRIORS) :] == cpu_data.PRIORS and len(test.groups) == len(
        other
    )
    near = test.features[:, -3]
    assert np.corrcoef(near, asked.centred())[0, 1] > 0.5
    assert body_name(DEFAULT) in source(FAMILIES["gemv"])


def test_priors_of_a_group_do_not_see_it() -> None:
    pytest.importorskip("pyarrow")
    data = cpu_data.load().groups
    first = np.flatnonzero(data.groups < 6)
    known = data.chosen(first)
    own = known.groups == 0
    changed = replace(known, seconds=np.where(own, known.seconds[::-1], known.seconds))
    for one, two in zip(
        cpu_data.with_priors(known, known), cpu_data.with_priors(changed, known), strict=True
    ):
        assert np.array_equal(one.features[own], two.features[own], equal_nan=True)
        assert not np.array_equal(one.features[~own], two.features[~own], equal_nan=True)
