"""Triton kernels ask the one rule for configurations, and give the same numbers with any."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from codegen.kernel import KernelDescription
from codegen.triton_kernels.column_sums import COLUMN_SUMS, column_sums
from codegen.triton_kernels.decode_attention import DECODE_ATTENTION, decode_attention
from codegen.triton_kernels.gated_activation import (
    ACTIVATIONS,
    GATED_ACTIVATION,
    ActivationConfig,
    gated_activation,
)
from codegen.triton_kernels.gathered_mlp import (
    DOWN,
    UP,
    gathered_down,
    gathered_down_reference,
    gathered_up,
    gathered_up_reference,
)
from codegen.triton_kernels.gemv import GEMV, GemvConfig, gemv, gemv_reference
from codegen.triton_kernels.generate import launched_by
from codegen.triton_kernels.prefill_attention import (
    PREFILL_ATTENTION,
    PrefillConfig,
    prefill_attention,
)
from codegen.triton_kernels.rms_norm import RMS_NORM, NormConfig, rms_norm, rms_norm_reference
from codegen.triton_kernels.table import KERNELS
from codegen.triton_kernels.tuned import TunedKernel, config_of_launch, device_name
from codegen.tuning import Problem, Ranked, Tuning, tuning
from rewriter.dialect.attention import attention
from rewriter.errors import InputError
from tests.codegen.tolerances import assert_near

ATTENTION: dict[str, Any] = {"head_dim": 16, "group_size": 2, "mask": "causal"}


class Fixed:
    """Takes one configuration, and keeps what it was asked."""

    def __init__(self, config: Any) -> None:
        self.config, self.asked = config, []

    def __call__(self, problem: Problem, offered: Sequence[Any], default: int) -> Ranked:
        self.asked.append(problem)
        return Ranked((list(offered).index(self.config),))


def attended(operator: str) -> tuple[Tensor, Tensor, Tensor, KernelDescription]:
    q, k, v = torch.randn(1, 4, 3, 16), torch.randn(1, 2, 40, 16), torch.randn(1, 2, 40, 16)
    return q, k, v, KernelDescription(operator=operator, **ATTENTION)


def decoded() -> tuple[Tensor, Tensor]:
    q, k, v, d = attended("decode_attention")
    wanted = attention.reference(q, k, v, softmax_scale=0.25, mask="causal")
    return decode_attention(d, q, k, v, softmax_scale=0.25)[0], wanted


def prefilled() -> tuple[Tensor, Tensor]:
    q, k, v, d = attended("prefill_attention")
    wanted = attention.reference(q, k, v, softmax_scale=0.25, mask="causal")
    return prefill_attention(d, q, k, v, softmax_scale=0.25)[0], wanted


def summed() -> tuple[Tensor, Tensor]:
    q, k, _, d = attended("column_sums")
    d = replace(d, form="sum")
    hidden = torch.ones(3, 40).triu(38).bool()
    scores = (q @ k.repeat_interleave(2, 1).mT * 0.25).masked_fill(hidden, -torch.inf)
    wanted = scores.softmax(-1).sum(2).unflatten(1, (2, 2)).sum(2)
    return column_sums(d, q, k, scores.logsumexp(-1), softmax_scale=0.25), wanted


def multiplied() -> tuple[Tensor, Tensor]:
    x, weight = torch.randn(1, 67), torch.randn(37, 67)
    return gemv(x, weight), gemv_reference(x, weight)


def normed() -> tuple[Tensor, Tensor]:
    x, weight = torch.randn(3, 67), torch.randn(67)
    return rms_norm(x, weight, eps=1e-6)[0], rms_norm_reference(x, weight, eps=1e-6)[0]


def gated() -> tuple[Tensor, Tensor]:
    gate, up = torch.randn(2, 300), torch.randn(2, 300)
    out = gated_activation(gate, up, activation=ACTIVATIONS["silu"])
    return out, torch.nn.functional.silu(gate) * up


def raised() -> tuple[Tensor, Tensor]:
    x, gate, up = torch.randn(1, 67), torch.randn(37, 67), torch.randn(37, 67)
    neurons = torch.tensor([[3, 36, -1, 0]], dtype=torch.int32)
    return gathered_up(x, gate, up, neurons), gathered_up_reference(x, gate, up, neurons)


def lowered() -> tuple[Tensor, Tensor]:
    hidden, down = torch.randn(1, 37), torch.randn(37, 67)
    return gathered_down(hidden, down), gathered_down_reference(hidden, down)


CALLS: dict[TunedKernel[Any], Callable[[], tuple[Tensor, Tensor]]] = {
    DECODE_ATTENTION: decoded,
    PREFILL_ATTENTION: prefilled,
    COLUMN_SUMS: summed,
    GEMV: multiplied,
    RMS_NORM: normed,
    GATED_ACTIVATION: gated,
    UP: raised,
    DOWN: lowered,
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REWRITER_CACHE", str(tmp_path))


def described(kernel: TunedKernel[Any]) -> KernelDescription:
    """What the call above asks of it."""
    if kernel in (DECODE_ATTENTION, PREFILL_ATTENTION, COLUMN_SUMS):
        form = "sum" if kernel is COLUMN_SUMS else ""
        return KernelDescription(operator=kernel.operator, form=form, **ATTENTION)
    form = {GEMV: "row", UP: "top_k", DOWN: "threshold"}.get(kernel, "")
    width = 67 if kernel is RMS_NORM else 0
    activation = ACTIVATIONS["silu"] if kernel is GATED_ACTIVATION else None
    return KernelDescription(
        operator=kernel.operator, head_dim=width, form=form, epilogue=activation
    )


def test_every_tuned_kernel_is_called_here() -> None:
    tuned = {k for k in KERNELS if isinstance(k, TunedKernel) and k.operator != "sum_splits"}
    assert set(CALLS) == tuned


@pytest.mark.parametrize("kernel", CALLS, ids=lambda k: k.operator)
def test_other_configurations_give_the_same_numbers(kernel: TunedKernel[Any]) -> None:
    torch.manual_seed(0)
    description = described(kernel)
    candidates = kernel.candidates(description)
    assert len(set(candidates)) == len(candidates) >= 6
    default = kernel.config_for(description)
    others = [c for c in candidates if c != default]
    assert len({kernel.configured_source(description, c) for c in others}) > 4
    for config in (others[0], others[len(others) // 2]):
        ranker = Fixed(config)
        with tuning(Tuning("model", ranker)) as how:
            actual, wanted = CALLS[kernel]()
        assert_near(actual, wanted)
        (problem,) = ranker.asked
        assert problem.kernel == f"{kernel.operator} triton" and problem.device == "interpreter"
        assert problem.text == kernel.source(description)
        assert [c.config for c in how.choices.values()] == [config]


@pytest.mark.parametrize("kernel", CALLS, ids=lambda k: k.operator)
def test_outside_of_tuning_the_shipped_text_is_launched(kernel: TunedKernel[Any]) -> None:
    launched: list[str] = []
    with launched_by(lambda text, grid, arguments: launched.append(text)):
        CALLS[kernel]()
        with tuning(Tuning()):
            CALLS[kernel]()
    half = len(launched) // 2
    assert launched[:half] == launched[half:]
    assert launched[0] == kernel.source(described(kernel))


def test_a_configuration_changes_what_is_launched() -> None:
    launched: list[tuple[str, tuple[int, ...]]] = []
    x, weight = torch.empty(1, 64, device="meta"), torch.empty(40, 64, device="meta")
    with launched_by(lambda text, grid, arguments: launched.append((text, grid))):
        gemv(x, weight)
        gemv(x, weight, config=GemvConfig(8, 256, num_warps=2))
    assert [grid for _, grid in launched] == [(10,), (5,)]
    assert '"BLOCK_N": 8' in launched[1][0] and '"num_warps": 2' in launched[1][0]


def test_splits_of_a_configuration() -> None:
    q, k, v, d = attended("decode_attention")
    config = replace(DECODE_ATTENTION.config_for(d), num_splits=5, block_n=16)
    grids: list[tuple[int, ...]] = []
    with launched_by(lambda text, grid, arguments: grids.append(grid)):
        decode_attention(d, q, k, v, softmax_scale=0.25, config=config)
        decode_attention(d, q, k, v, softmax_scale=0.25, config=config, num_splits=2)
    assert [grid[-1] for grid in grids if len(grid) == 3] == [5, 2]
    out = decode_attention(d, q, k, v, softmax_scale=0.25, config=config)[0]
    assert_near(out, attention.reference(q, k, v, softmax_scale=0.25, mask="causal"))


def test_tiles_of_a_block_mask_are_not_tuned() -> None:
    q, k, v, d = attended("prefill_attention")
    d = replace(d, form="block_mask")
    plain = PREFILL_ATTENTION.config_for(d)
    tiles = {(c.block_m, c.block_n) for c in PREFILL_ATTENTION.candidates(d)}
    assert tiles == {(plain.block_m, plain.block_n)}
    mask = torch.ones(1, -(-40 // plain.block_n), dtype=torch.bool)
    other = PrefillConfig(plain.block_m * 2, plain.block_n)
    with pytest.raises(InputError, match="config: tiles of"):
        prefill_attention(d, q, k, v, softmax_scale=0.25, block_mask=mask, config=other)


def test_what_does_not_fit_is_never_chosen() -> None:
    errors = pytest.importorskip("triton.runtime.errors")
    kept, fits, asked = ActivationConfig(), ActivationConfig(256, 1), []

    def launch(config: ActivationConfig) -> None:
        asked.append(config)
        if config != fits:
            raise errors.OutOfResources(99, 9, "shared memory")

    d = KernelDescription(operator="gated_activation")
    with tuning(Tuning("measure", lambda p, offered, default: Ranked((2, offered.index(fits))), 2)):
        found = config_of_launch(
            GATED_ACTIVATION, d, torch.device("cpu"), lambda: {"rows": 1}, launch
        )
    assert found == fits and len(asked) == 3 and asked[0] == kept


def test_measured_choices_name_the_device() -> None:
    with tuning(Tuning("measure", lambda p, offered, default: Ranked((1,)), 1)) as how:
        rms_norm(torch.randn(2, 64), torch.randn(64), eps=1e-6)
    (choice,) = how.choices.values()
    assert choice.problem.device == device_name(torch.device("cpu")) == "interpreter"
    told = {"head_dim": 64, "value_dim": 64, "element_bytes": 4, "weight_bytes": 4}
    assert choice.problem.shape == {"rows": 2, "width": 64, "tensors": 2, **told}
    assert len(choice.seconds) == 2 and isinstance(choice.config, NormConfig)
