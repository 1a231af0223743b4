"""Steps of programs with int8 weights: one segment, and what the program gives."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from codegen.cpp_kernels import compiler
from codegen.step import NativeStep
from codegen.step import native_step as native_step_module
from rewriter import optimize
from rewriter.decoding.state import Session
from rewriter.program import Program
from tests.tiny import tiny_causal_lm

pytestmark = pytest.mark.skipif(compiler.find_compiler() is None, reason="no C++ compiler")

INT8 = "int8-weights{min_elements=1}"
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.04}
"""Over the largest logit. The program rounds each weight to bf16, the step only sums of whole products."""
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": True},
    "qwen2": {},  # with biases
    "gpt_neox": {},  # biases and a plain feed-forward block
}


@functools.cache
def program_of(family: str, dtype: torch.dtype = torch.float32, spec: str = INT8) -> Program:
    model = tiny_causal_lm(family, **FAMILIES[family]).to(dtype)
    return optimize(model, passes=[spec, "default"], backend="eager", verify=False).program


def native_of(program: Program) -> NativeStep:
    """Its prompts run as the program does, so that only steps can differ."""
    states = program.decoding.states  # pyright: ignore[reportOptionalMemberAccess]
    growing = {s.name: s.dims.index("capacity") if "capacity" in s.dims else None for s in states}
    return NativeStep(program.module, growing, program.module)


def worst_difference(program: Program, native: NativeStep, batch_size: int) -> float:
    """Largest difference of logits over some steps behind a prompt, over the largest logit."""
    theirs, ours = (Session(program, batch_size, run=run) for run in (None, native))
    prompt, worst, scale = torch.randint(3, 64, (batch_size, 5)), 0.0, 0.0
    assert torch.equal(theirs.run(prompt), ours.run(prompt))
    with torch.no_grad():
        for _ in range(6):
            token = torch.randint(3, 64, (batch_size, 1))
            expected, got = theirs.run(token), ours.run(token)
            worst = max(worst, (expected - got).abs().max().item())
            scale = max(scale, expected.abs().max().item())
    return worst / scale if worst == worst else float("inf")


@pytest.mark.parametrize(("family", "batch_sizes"), [("llama", (1, 2, 8)), ("qwen2", (3,))])
def test_one_segment_multiplies_with_int8_rows(family: str, batch_sizes: tuple[int, ...]) -> None:
    torch.set_num_threads(2)
    program = program_of(family)
    native = native_of(program)
    for batch_size in batch_sizes:
        assert worst_difference(program, native, batch_size) < TOLERANCE[torch.float32]
    for step in native._steps.values():
        assert step is not None and (step.plan.segments, step.plan.refusals) == (1, {})
        assert "int8_t*" in step.text


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_bf16_activations(family: str) -> None:
    torch.set_num_threads(2)
    program = program_of(family, torch.bfloat16)
    native = native_of(program)
    assert worst_difference(program, native, 2) < TOLERANCE[torch.bfloat16]
    (step,) = native._steps.values()
    assert step is not None and (step.plan.segments, step.plan.refusals) == (1, {})


def test_some_matrices_int8_and_some_not() -> None:
    program = program_of("llama", spec="int8-weights{min_elements=1,skip=up_proj+lm_head+o_proj}")
    assert worst_difference(program, native_of(program), 1) < TOLERANCE[torch.float32]


MUTATIONS = {
    "no scale": (" * rw::to_float(p2[row])", ""),
    "the scale of another row": ("[row])", "[row ^ 1])"),
    "a look-up without its scale": ("rw::to_float(row[i]) *", "rw::to_float(row[i]) + 0 *"),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_mutation_of_the_text_shows(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = MUTATIONS[name]
    compile_library = native_step_module.compile_library

    def mutated(text: str, **options: Any) -> Any:
        assert old in text
        return compile_library(text.replace(old, new), **options)

    monkeypatch.setattr(native_step_module, "compile_library", mutated)
    program = program_of("llama")
    assert worst_difference(program, native_of(program), 1) > TOLERANCE[torch.float32]
