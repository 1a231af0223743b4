"""int8-weights on whole models: what becomes int8, what it costs in accuracy, what it saves."""

from __future__ import annotations

import copy
import functools
import gc
import weakref
from typing import Any

import pytest
import torch
from torch import nn

from passes.int8_weights import Int8Weights
from passes.streaming_llm import StreamingLLM
from rewriter import load, optimize
from rewriter.dialect import OPS
from rewriter.dialect.int8 import Int8Matrix, quantize_rows
from rewriter.dialect.linear import linear
from rewriter.errors import ConfigError, InputError
from rewriter.lowering import lower
from tests.passes.derived import derived, model_of, prepared, rewritten, run

TOKENS = torch.arange(40).remainder(61).view(2, 20)
ALL = Int8Weights(min_elements=1)


def wide_weights(program: Any) -> list[str]:
    """Paths of fp32 matrices that a program still has."""
    return [
        n for n, t in program.module.state_dict().items() if t.dim() == 2 and t.dtype != torch.int8
    ]


def kl(expected: torch.Tensor, found: torch.Tensor) -> float:
    a, b = expected.double().log_softmax(-1), found.double().log_softmax(-1)
    return float((a.exp() * (a - b)).sum(-1).mean())


def fake_quantized(model: nn.Module) -> nn.Module:
    """The model with weights rounded to what int8 can say; a formula of its own."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2 and "embed" not in name:
                step = weight.abs().amax(dim=1, keepdim=True) / 127
                weight.copy_(torch.round(weight / step) * step)
    return model


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_is_the_model_with_rounded_weights(family: str) -> None:
    model, program = prepared(family)
    result = rewritten(program, ALL)
    assert not result.misses and not result.failures
    assert [n for n in wide_weights(result.program) if "embed" not in n] == []
    with torch.no_grad():
        expected, original = fake_quantized(model)(TOKENS).logits, model(TOKENS).logits
    for chunks in ([20], [7, 1, 12]):
        found = run(result.program, TOKENS, chunks)
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)
    assert 0 < kl(original, found) < 2e-2


@functools.cache
def tied() -> Any:
    """A model whose table of embeddings is its last matrix."""
    return model_of("llama", tie_word_embeddings=True)


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_backends_multiply_with_int8_rows(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    program = rewritten(prepared("llama")[1], ALL).program
    lowered: Any = lower(program, backend)
    module = lowered.func.__self__ if backend == "eager" else lowered._orig_mod
    assert len(module.graph.find_nodes(op="call_function", target=Int8Matrix)) == 15
    given = {s.name: torch.zeros(2, 2, 16, 8) for s in program.decoding.states}  # pyright: ignore
    given |= {"input_ids": TOKENS[:, :1], "position_ids": torch.zeros(2, 1, dtype=torch.int64)}
    given |= {"kv_offset": 0, "logits_to_keep": 0}
    names = [node.name for node in program.placeholders()]
    with torch.no_grad():
        expected = program.module(*(copy.deepcopy(given.get(name)) for name in names))
        found = lowered(*(given.get(name) for name in names))
    torch.testing.assert_close(found[0], expected[0], atol=2e-5, rtol=1e-4)


def test_tied_embeddings_share_one_int8_table() -> None:
    model = tied()
    program = rewritten(derived(model), ALL).program
    assert wide_weights(program) == []
    assert len(program.calls(OPS["int8_embedding"].overload)) == 1
    rounded = fake_quantized(model)
    table = rounded.get_parameter("model.embed_tokens.weight")
    with torch.no_grad():
        step = table.abs().amax(dim=1, keepdim=True) / 127
        table.copy_((table / step).round() * step)
        expected = rounded(TOKENS).logits
    torch.testing.assert_close(run(program, TOKENS, [20]), expected, atol=2e-5, rtol=1e-4)


def test_transposed_weights_of_gpt2() -> None:
    result = rewritten(derived(model_of("gpt2", n_inner=48)), ALL)
    assert len(result.applied) == 3  # two feed-forward blocks and the last matrix
    left = wide_weights(result.program)
    assert left and all("attn" in name or "wpe" in name for name in left)


def test_memory_shrinks_in_the_program_and_on_disk(tmp_path: Any) -> None:
    model = model_of("llama", tie_word_embeddings=True, hidden_size=64, intermediate_size=256)
    watched = weakref.ref(model.get_parameter("model.layers.0.mlp.up_proj.weight"))
    before = sum(p.nbytes for p in model.parameters())
    original = model(TOKENS).logits.detach()
    opt = optimize(model, passes=[str(ALL), "default"], backend="eager", strict=True)
    after = sum(t.nbytes for t in opt.program.module.state_dict().values())
    assert after < 0.32 * before
    opt.save(tmp_path / "saved")
    assert (tmp_path / "saved" / "weights.safetensors").stat().st_size < 0.34 * before
    del model
    gc.collect()
    assert watched() is None  # nothing of what was optimized holds the original
    again = load(tmp_path / "saved")
    logits = opt(TOKENS).logits
    assert torch.equal(again(TOKENS).logits, logits)
    assert 0 < kl(original, logits) < 2e-2


def test_certificates_declare_the_error() -> None:
    model, _ = prepared("llama")
    report = optimize(model, passes=[str(ALL)], backend="eager").report
    assert len(report.certificates) == 2 * 5 + 1
    for certificate in report.certificates:
        assert certificate.status == "applied"
        assert 1e-3 < certificate.method_error["relative_l2"] < 3e-2
        assert certificate.cost_after.bytes_moved < certificate.cost_before.bytes_moved  # pyright: ignore
    assert 0 < report.end_to_end["kl_mean"] < 2e-2
    assert report.end_to_end["top1_agreement"] > 0.9


def test_a_wrong_scale_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    """What ships is held against the reference, not only against itself."""
    model, _ = prepared("llama")
    honest = Int8Weights.rewrite

    def seeded(self: Any, graph: Any, site: Any, facts: Any) -> None:
        honest(self, graph, site, facts)
        for name, buffer in site.program.module.named_buffers():
            if name.endswith("q_proj.weight_scale"):
                buffer.mul_(1.01)

    monkeypatch.setattr(Int8Weights, "rewrite", seeded)
    certificates = optimize(model, passes=[str(ALL)], backend="eager").report.certificates
    undone = [c for c in certificates if c.status == "rolled_back"]
    assert undone and all("differs from its reference" in c.reason for c in undone)


@pytest.mark.parametrize("first", [True, False])
def test_composes_with_a_bounded_cache(first: bool) -> None:
    model, program = prepared("llama")
    streaming = StreamingLLM(num_sink_tokens=2, recent_window=6)
    passes = (ALL, streaming) if first else (streaming, ALL)
    both = rewritten(program, *passes)
    assert len(both.applied) == 11 + 2 and not both.failures
    alone = rewritten(derived(fake_quantized(model)), streaming).program  # pyright: ignore
    found, expected = (run(p, TOKENS, [5, 1, 1, 5, 5, 3]) for p in (both.program, alone))
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


def test_knobs() -> None:
    _, program = prepared("llama")
    left = rewritten(program, Int8Weights(max_error=0.0, min_elements=1)).program
    assert torch.equal(run(left, TOKENS, [20]), run(program, TOKENS, [20]))
    skipped = rewritten(program, Int8Weights(min_elements=1, skip="lm_head+down_proj"))
    kept = [n for n in wide_weights(skipped.program) if "embed" not in n]
    assert len(kept) == 3 and all("lm_head" in n or "down_proj" in n for n in kept)
    assert [m.reason for m in skipped.misses] == [
        "lm_head.weight is among those to skip: lm_head+down_proj"
    ]
    small = rewritten(program, Int8Weights(min_elements=1500))
    assert {site.label.split()[-1] for site in small.applied} == {"gated_mlp", "#8"}
    one = rewritten(program, Int8Weights(min_elements=1, layers=(1,)))
    assert {applied.layer for applied in one.applied} == {1}
    for wrong in ({"max_error": 1.5}, {"min_elements": 0}):
        with pytest.raises(ConfigError):
            Int8Weights(**wrong)  # pyright: ignore


def test_outliers_keep_a_matrix_wide() -> None:
    model = model_of("llama")
    with torch.no_grad():
        model.get_parameter("model.layers.0.mlp.down_proj.weight")[:, 0] = 40.0
    program = rewritten(derived(model), ALL).program
    kept = [n for n in wide_weights(program) if "embed" not in n]
    assert kept == ["model.layers.0.mlp.down_proj.weight"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 5, 40])
@pytest.mark.parametrize(("out_size", "in_size"), [(7, 65), (1025, 1024), (2048, 672)])
def test_products_of_int8_rows(dtype: torch.dtype, rows: int, out_size: int, in_size: int) -> None:
    torch.manual_seed(0)
    weight, scale = quantize_rows(torch.randn(out_size, in_size))
    x, bias = torch.randn(rows, in_size).to(dtype), torch.randn(out_size).to(dtype)
    expected = x.double() @ (weight.double() * scale.double()[:, None]).T + bias.double()
    found = linear(x, Int8Matrix(weight, scale), bias)
    assert found.dtype == dtype
    worst = (found.double() - expected).abs().max() / expected.abs().max()
    assert worst < (1e-6 if dtype == torch.float32 else 8e-3)


def test_rows_that_cannot_be_quantized() -> None:
    rows, scale = quantize_rows(torch.tensor([[0.0, 0.0], [-254.0, 127.0]]))
    assert rows.tolist() == [[0, 0], [-127, 64]] and scale.tolist() == [1.0, 2.0]
    with pytest.raises(InputError, match="finite"):
        quantize_rows(torch.tensor([[float("nan")]]))
