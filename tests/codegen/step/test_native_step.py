"""A step in C++ gives what the program gives, for every kind of model, batch and state."""

from __future__ import annotations

import threading

import pytest
import torch

from codegen.cpp_kernels import compiler
from codegen.step import NativeStep
from codegen.step import native_step as native_step_module
from rewriter import optimize
from rewriter.decoding.state import Session
from rewriter.lowering import lower
from tests.small_lms import small_lm

pytestmark = pytest.mark.skipif(compiler.find_compiler() is None, reason="no C++ compiler")

WHOLE = ("llama", "qwen3", "gemma3_text", "gpt_neox", "bloom", "mistral")
"""Families of which nothing is left to PyTorch."""
PARTLY = ("gpt2", "qwen3_moe")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.03}
"""Over the largest logit: sums in another order, and with a rounding to bf16 after each operator."""


def program_of(family="llama", dtype=torch.float32, passes="default"):
    return optimize(small_lm(family).to(dtype), passes=passes, verify=False).program


def worst_difference(program, native, batch_size, *, mask=None, steps=60):
    """Largest difference of logits over a prompt and many steps, over the largest logit."""
    theirs, ours = (Session(program, batch_size, run=run) for run in (None, native))
    prompt, worst, scale = torch.randint(3, 128, (batch_size, 7)), 0.0, 0.0
    given = {} if mask is None else {"attention_mask": mask}
    assert torch.equal(theirs.run(prompt, **given), ours.run(prompt, **given))
    for _ in range(steps):
        token = torch.randint(3, 128, (batch_size, 1))
        expected, got = theirs.run(token), ours.run(token)
        worst = max(worst, (expected - got).abs().max().item())
        scale = max(scale, expected.abs().max().item())
    return worst / scale if worst == worst else float("inf")


def planned(native):
    return [step.plan for step in native._steps.values()]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("family", WHOLE)
def test_whole_steps(family, threads):
    torch.set_num_threads(threads)
    program = program_of(family)
    native = lower(program, "cpu")
    batch_size = 1 if threads == 1 else 3
    assert worst_difference(program, native, batch_size) < TOLERANCE[torch.float32]
    (plan,) = planned(native)
    assert plan.segments == 1
    assert plan.refusals == {}


@pytest.mark.parametrize("family", PARTLY)
def test_what_has_no_cpp_runs_in_pytorch(family):
    program = program_of(family)
    native = lower(program, "cpu")
    assert worst_difference(program, native, 2, steps=10) < TOLERANCE[torch.float32]
    (plan,) = planned(native)
    assert plan.refusals
    assert "left to PyTorch" in native.summary()


def test_bf16_rounds_where_the_graph_does():
    torch.set_num_threads(2)
    model = small_lm("llama")
    program = optimize(type(model)(model.config).eval().to(torch.bfloat16), verify=False).program
    native = lower(program, "cpu")
    assert worst_difference(program, native, 1) < TOLERANCE[torch.bfloat16]
    assert planned(native)[0].refusals == {}


def test_padded_batches():
    program = program_of("gemma3_text")
    native = lower(program, "cpu")
    mask = torch.ones(3, 7, dtype=torch.int64)
    mask[0, :4] = 0
    mask[2, :1] = 0
    assert worst_difference(program, native, 3, mask=mask) < TOLERANCE[torch.float32]
    assert any(plan.refusals == {} for plan in planned(native))


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_streaming_attention(family):
    torch.set_num_threads(2)
    program = program_of(
        family, passes=["streaming-llm{num_sink_tokens=2,recent_window=9}", "default"]
    )
    native = lower(program, "cpu")
    assert worst_difference(program, native, 2) < TOLERANCE[torch.float32]
    (plan,) = planned(native)
    assert not any("streaming_attention" in name for name in plan.refusals)


def test_prompts_and_large_batches_fall_back():
    program = program_of()
    calls = []

    def fallback(*args):
        calls.append(args)
        return program.module(*args)

    native = NativeStep(program.module, {"layer0_keys": 2}, fallback)
    Session(program, 1, run=native).run(torch.randint(3, 128, (1, 5)))
    Session(program, 9, run=native).run(torch.randint(3, 128, (9, 1)))
    assert len(calls) == 2


def test_equal_layers_share_their_functions():
    program = program_of()
    native = lower(program, "cpu")
    worst_difference(program, native, 1, steps=1)
    text = next(iter(native._steps.values())).text
    layers = len([s for s in program.decoding.states if s.role == "keys"])
    assert layers > 1
    assert text.count("static __attribute__((noinline)) void gate_up") == 1
    assert text.count("  // gated_mlp_default") == 2 * layers


def test_sessions_in_threads_do_not_mix():
    program = program_of()
    native = lower(program, "cpu")
    tokens = torch.randint(3, 128, (2, 1, 30))
    expected = [_fed(program, None, row) for row in tokens]
    results: list[torch.Tensor | None] = [None, None]

    def work(i):
        results[i] = _fed(program, native, tokens[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for got, want in zip(results, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def _fed(program, run, row):
    session = Session(program, 1, run=run)
    return torch.cat([session.run(row[:, i : i + 1]) for i in range(row.shape[1])], dim=1)


MUTATIONS = {
    "no residual": ("x0 + value", "value"),
    "a key is not written": ("(entries + row)", "(entries + row + 1)"),
    "a head too few": ("rw::share(4, thread", "rw::share(3, thread"),
    "angles the other way": ("first * c - second * s", "first * c + second * s"),
    "an entry is not seen": ("(entries + 1))", "(entries))"),
    "no activation": ("rw::silu(value)", "value"),
    "another norm": ("/ 32 +", "/ 33 +"),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_mutation_of_the_text_shows(name, monkeypatch):
    old, new = MUTATIONS[name]
    compile_library = native_step_module.compile_library

    def mutated(text, **options):
        assert old in text
        return compile_library(text.replace(old, new), **options)

    monkeypatch.setattr(native_step_module, "compile_library", mutated)
    program = program_of()
    with torch.no_grad():
        difference = worst_difference(program, lower(program, "cpu"), 1, steps=8)
    assert difference > TOLERANCE[torch.float32]


def test_names_of_a_model_stay_out_of_the_text():
    program = program_of().clone()
    for node in program.calls(torch.ops.aten.linear.default):
        node.name = 'a\n"); system("ls"); //'
        break
    native = lower(program, "cpu")
    worst_difference(program, native, 1, steps=1)
    text = next(iter(native._steps.values())).text
    assert "system(" not in text
