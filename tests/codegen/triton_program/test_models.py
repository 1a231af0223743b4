"""Whole language models on generated kernels: the model's logits and tokens, and who ran is told."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from codegen.triton_kernels.product import INTERPRETED
from codegen.triton_program import TritonProgram, program
from rewriter import ConfigError, OptimizedModel, optimize
from rewriter.lowering import lower
from tests.tiny import tiny_causal_lm, token_ids

DEVICE = "cpu" if INTERPRETED.value else "cuda"
ATTENTION = {"rotary_append": 1, "decode_attention": 1, "prefill_attention": 1}
KERNELS = {
    "llama": {"rms_norm": 3, "gemv": 6, "gated_activation": 1, **ATTENTION},
    "qwen3": {"rms_norm": 5, "gemv": 6, "gated_activation": 1, **ATTENTION},
    "gemma2": {"rms_norm": 5, "gemv": 6, "gated_activation": 1, **ATTENTION},
    "gpt_neox": {"gemv": 4, **ATTENTION},
    "mistral": {"rms_norm": 3, "gemv": 6, "gated_activation": 1, **ATTENTION},
}
"""How many sites of one layer and the head run each kernel."""


def lowered(family: str, **changes: int) -> tuple[Any, OptimizedModel]:
    sizes: dict[str, Any] = {
        "num_hidden_layers": 1,
        "hidden_size": 16,
        "intermediate_size": 24,
        **changes,
    }
    model = tiny_causal_lm(family, **sizes).to(DEVICE)
    return model, optimize(model, backend="triton", verify=False)


def ran(opt: OptimizedModel) -> Counter[str]:
    assert isinstance(opt.run, TritonProgram)
    return Counter(operator for _, operator in opt.run.ledger.ran)


@pytest.mark.parametrize("family", KERNELS)
def test_logits_and_tokens_are_the_models(family: str) -> None:
    window = {"sliding_window": 5} if family == "mistral" else {}
    model, opt = lowered(family, **window)
    for q_len in (4, 18):  # few rows, and more than `gemv` and `decode_attention` take
        ids = token_ids(2, q_len).to(DEVICE)
        torch.testing.assert_close(opt(ids).logits, model(ids).logits, atol=2e-5, rtol=1e-5)
    ids = token_ids(1, 6).to(DEVICE)
    told = {"attention_mask": torch.ones_like(ids), "pad_token_id": 0}
    options = {"max_new_tokens": 3, "do_sample": False, **told}
    assert torch.equal(opt.generate(ids, **options), model.generate(ids, **options))
    assert ran(opt) == KERNELS[family]
    assert isinstance(opt.run, TritonProgram)
    assert "products of more than 16 rows" in opt.run.summary()


def test_padding_is_not_seen() -> None:
    model, opt = lowered("llama")
    ids = token_ids(2, 6).to(DEVICE)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    ids[0, :3] = 63
    options = {"max_new_tokens": 2, "do_sample": False, "pad_token_id": 0, "attention_mask": mask}
    assert torch.equal(opt.generate(ids, **options), model.generate(ids, **options))
    assert ran(opt)["decode_attention"] == 1


def test_the_report_tells_what_ran_and_why_the_rest_did_not() -> None:
    model = tiny_causal_lm("gpt_neox", num_hidden_layers=1, hidden_size=16).to(DEVICE)
    report = optimize(model, backend="triton").report
    assert report.backend == "triton"
    assert "gemv at 4" in report.backend_reason  # verification ran it
    left = [miss for miss in report.misses if miss.subject == "triton"]
    assert [miss.node for miss in left] == [f"layer_norm_default{n}" for n in ("", "_1", "_2")]
    assert {miss.reason for miss in left} == {
        "there is no Triton kernel of rewriter.layer_norm.default"
    }


class Pointwise(nn.Module):
    """Products with what can be taken in: a bias, an activation, residuals."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 24), nn.Linear(24, 16, bias=False)
        self.norm = nn.RMSNorm(16, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        inner = torch.sigmoid(self.up(x)) * 2
        return self.norm(x + self.down(inner)) + x


def test_pointwise_neighbours_are_taken_in() -> None:
    torch.manual_seed(0)
    model = Pointwise().to(DEVICE)
    opt = optimize(model, (torch.randn(3, 16, device=DEVICE),), backend="triton", verify=False)
    assert isinstance(opt.run, TritonProgram)
    code = opt.run.run.func.__self__.code  # type: ignore[attr-defined]
    calls = [line.split(" = ")[1].split("(")[0] for line in code.splitlines() if " = " in line]
    assert len(calls) == 3
    assert all("kernel" in call for call in calls)
    for rows in (3, 40):
        x = torch.randn(rows, 16, device=DEVICE)
        torch.testing.assert_close(opt(x), model(x), atol=1e-5, rtol=1e-5)
    assert ran(opt) == {"gemv": 2, "rms_norm": 1}


def test_half_precision_is_as_near_as_eager() -> None:
    model = tiny_causal_lm("llama", num_hidden_layers=1, hidden_size=16, intermediate_size=24)
    wide, ids = model(token_ids()).logits, token_ids().to(DEVICE)
    narrow = model.to(DEVICE, torch.bfloat16)
    errors = []
    for backend in ("eager", "triton"):
        out = optimize(narrow, backend=backend, verify=False)(ids).logits
        errors.append(float((out.float().cpu() - wide).norm() / wide.norm()))
    assert errors[1] < 2 * errors[0] < 0.05  # other roundings of 8 bits


def test_without_a_gpu_the_interpreter_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    _, opt = lowered("llama")
    monkeypatch.setattr(program, "INTERPRETED", type(INTERPRETED)(False))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="a GPU, or TRITON_INTERPRET=1"):
        optimize(Pointwise(), (torch.randn(3, 16),), backend="triton")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ConfigError, match="weights on one GPU, not on cpu"):
        lower(opt.to("cpu").program, "triton")
