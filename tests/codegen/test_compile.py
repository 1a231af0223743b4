"""Ahead-of-time compilation without a GPU: every shipped configuration compiles and spills nothing."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton comes for Linux alone")

from codegen.compile import TARGETS, Compiled, KernelCompileError, Target, compile_texts
from codegen.epilogue import Epilogue, Operand, Step
from codegen.kernel import KernelDescription, select
from codegen.triton_kernels.gated_activation import ACTIVATIONS, GATED_ACTIVATION
from codegen.triton_kernels.gemv import GEMV
from codegen.triton_kernels.generate import unaligned
from codegen.triton_kernels.table import KERNELS
from rewriter.errors import ConfigError

BF16 = torch.bfloat16
RESIDUAL = Epilogue(
    (Step("add", ("value", "element_0")),), (Operand("element_0", "element", BF16),)
)


def d(operator: str, **fields: Any) -> KernelDescription:
    return KernelDescription(operator=operator, **{"dtype": BF16, **fields})


def attention(head_dim: int) -> list[KernelDescription]:
    """What attention of one width needs."""
    plain: dict[str, Any] = {"head_dim": head_dim, "group_size": 4, "mask": "causal"}
    windowed = {**plain, "mask": "sliding_window", "span": 4096, "softcap": 50.0}
    joined = {**plain, "terms": ("bias", "sinks", "slopes")}
    return [
        d("decode_attention", **plain),
        d("decode_attention", **windowed, layout="paged", page_size=16),
        d("decode_attention", **joined),
        d("decode_attention", **plain, dtype=torch.float32),
        d("prefill_attention", **plain),
        d("prefill_attention", **windowed),
        d("prefill_attention", **joined),
        d("prefill_attention", **plain, dtype=torch.float32),
        d("merge_lse", head_dim=head_dim, weight_dtype=torch.float32, epilogue=RESIDUAL),
        d("shared_prefix_attention", **plain),
        d("page_scores", head_dim=head_dim, group_size=4, page_size=16, layout="paged", form="max"),
        d("column_sums", **plain, form="mean"),
        d("rotary_append", head_dim=head_dim, span=head_dim, form="halves"),
        d("rotary_append", head_dim=head_dim, span=32, form="interleaved"),
        d("token_similarity", head_dim=head_dim, form="match"),
        d("lora_shrink", head_dim=head_dim),
        d("lora_expand", head_dim=head_dim, weight_dtype=torch.float32),
    ]


OTHERS = [
    *(
        d("gemv", form=form, epilogue=RESIDUAL, **dtypes)
        for form in ("row", "rows")
        for dtypes in ({}, {"weight_dtype": torch.int8}, {"dtype": torch.float32})
    ),
    d("gathered_up", form="top_k", epilogue=ACTIVATIONS["silu"]),
    d("gathered_up", form="threshold", dtype=torch.float32),
    d("gathered_down", form="top_k"),
    d("sum_splits", epilogue=RESIDUAL),
    d("rms_norm", head_dim=4096, form="residual"),
    d("rms_norm", head_dim=16384, form="wide", dtype=torch.float32),
    d("gated_activation", epilogue=ACTIVATIONS["gelu_tanh"]),
    d("token_similarity", head_dim=256, form="elu"),
    d("token_merge"),
]
SHIPPED = [*attention(64), *attention(128), *OTHERS]


def texts_of(descriptions: list[KernelDescription]) -> dict[str, str]:
    return {
        f"{i}_{description.operator}": select(description, KERNELS, "triton").kernel.source(
            description
        )
        for i, description in enumerate(descriptions)
    }


def test_every_kernel_is_compiled_here() -> None:
    assert {description.operator for description in SHIPPED} == {k.operator for k in KERNELS}


@pytest.mark.parametrize("target", ["cuda:sm_90", "hip:gfx942"])
def test_shipped_configurations_spill_nothing(target: str) -> None:
    compiled = compile_texts(texts_of(SHIPPED), target)
    described = dict(zip(compiled, SHIPPED, strict=True))
    spilled = {str(described[n]): c.facts for n, c in compiled.items() if c.facts["spilled_bytes"]}
    assert not spilled
    limit = 227 * 1024 if target.startswith("cuda") else 64 * 1024
    for name, result in compiled.items():
        assert 0 < result.facts["registers"] <= 512, name
        assert result.facts["shared_bytes"] <= limit, name
        assert result.facts["scratch_bytes"] == 0, name


def test_the_oldest_target_spills_nothing() -> None:
    some = [*attention(128)[:5], *OTHERS[:2]]
    compiled = compile_texts(texts_of(some), "cuda:sm_80")
    assert [n for n, c in compiled.items() if c.facts["spilled_bytes"]] == []
    assert max(c.facts["shared_bytes"] for c in compiled.values()) <= 163 * 1024


def test_odd_sizes_spill_nothing() -> None:
    texts = {name: unaligned(text) for name, text in texts_of(OTHERS[:6]).items()}
    compiled = compile_texts(texts, "cuda:sm_90")
    assert [n for n, c in compiled.items() if c.facts["spilled_bytes"]] == []
    divisible = {a["divisible_by"] for c in compiled.values() for a in c.facts["arguments"]}
    numbers = [a for c in compiled.values() for a in c.facts["arguments"] if a["type"][0] != "*"]
    assert divisible == {1, 16}
    assert {a["divisible_by"] for a in numbers} == {1}


def test_kernels_compile_as_a_launch_specialises_them() -> None:
    """Numbers that are 1 become constants at a launch, and small ones have 32 bits."""
    texts = texts_of([*attention(128)[-3:], *OTHERS[::2]])
    ones = {f"{n}_1": re.sub(r'"i(32|64)(:16)?"', '"i64:1"', text) for n, text in texts.items()}
    small = {f"{n}_32": re.sub(r'"i64(:16)?"', '"i32"', text) for n, text in texts.items()}
    compiled = compile_texts({**ones, **small}, "cuda:sm_90")
    assert [n for n, c in compiled.items() if c.facts["spilled_bytes"]] == []


@pytest.fixture(scope="module")
def gated() -> Compiled:
    text = GATED_ACTIVATION.source(d("gated_activation", epilogue=RESIDUAL))
    return compile_texts({"gated": text}, "cuda:sm_90")["gated"]


def test_facts_say_how_to_launch(gated: Compiled) -> None:
    facts = gated.facts
    assert facts["entry"] == "gated_activation_kernel"
    assert f".visible .entry {facts['entry']}(" in gated.assembly
    names = [argument["name"] for argument in facts["arguments"]]
    assert (
        names
        == "gate up out width gate_row up_row out_row element_0_ptr element_0_row_stride".split()
    )
    assert facts["constants"] == {"BLOCK": 1024, "element_0_column_stride": 1}
    assert facts["grid"] == ["rows", "cdiv(width, BLOCK)"]
    assert facts["threads"] == 128
    assert gated.binary.startswith(b"\x7fELF")


def test_the_entry_takes_the_arguments_told_and_two_scratch_pointers(gated: Compiled) -> None:
    head = gated.assembly.split(".visible .entry", 1)[1].split(")", 1)[0]
    kinds = re.findall(r"\.param \.(u64|u32|f32|b64|b32)", head)
    assert len(kinds) == len(gated.facts["arguments"]) + len(gated.facts["trailing"])
    assert gated.facts["trailing"] == ["global_scratch", "profile_scratch"]


def test_spills_are_seen() -> None:
    """A tile that cannot fit into registers: the number is read from the binary, not assumed."""
    text = GEMV.source(d("gemv", form="row", dtype=torch.float32))
    huge = text.replace("BLOCK_N: tl.constexpr = 4", "BLOCK_N: tl.constexpr = 16")
    huge = huge.replace('"BLOCK_N": 4', '"BLOCK_N": 16')
    huge = huge.replace('"num_warps": 4', '"num_warps": 1')
    for target in ("cuda:sm_90", "hip:gfx942"):
        compiled = compile_texts({"plain": text, "huge": huge}, target)
        assert compiled["plain"].facts["spilled_bytes"] == 0
        assert compiled["huge"].facts["spilled_bytes"] > 0


def test_text_that_does_not_compile_is_told() -> None:
    text = GATED_ACTIVATION.source(d("gated_activation"))
    with pytest.raises(KernelCompileError, match="cuda:sm_80"):
        compile_texts({"bad": text.replace("live = c < width", "live = c < widht")}, "cuda:sm_80")


def test_unknown_targets_are_refused() -> None:
    for text in ("cuda", "cuda:sm_10", "hip:sm_90", ""):
        with pytest.raises(ConfigError, match="one of cuda:sm_80"):
            Target.parse(text)
    assert Target.parse("hip:gfx942").binary == "hsaco"
    assert set(TARGETS) >= {"cuda:sm_80", "cuda:sm_90", "hip:gfx942"}


def test_unaligned_text_has_its_own_hash() -> None:
    text = GEMV.source(d("gemv", form="row"))
    assert '"i64:16"' in text
    other = unaligned(text)
    assert '"i64:16"' not in other
    assert other != text
    assert unaligned(other) == other
    assert unaligned(GEMV.source(replace(d("gemv", form="row")))) == other
