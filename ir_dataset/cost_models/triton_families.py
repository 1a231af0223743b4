"""The project's own Triton kernels on shapes of language models, to be run with any configuration.

On the device "meta" nothing is computed: then `recorded` tells what would be launched, with the kernels'
own launchers, so that everything can be compiled where there is no GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from codegen.kernel import KernelDescription
from codegen.triton_kernels import gathered_mlp as mlp
from codegen.triton_kernels.column_sums import COLUMN_SUMS, column_sums
from codegen.triton_kernels.decode_attention import (
    DECODE_ATTENTION,
    decode_attention,
    even_splits,
)
from codegen.triton_kernels.gated_activation import (
    ACTIVATIONS,
    GATED_ACTIVATION,
    gated_activation,
    gated_activation_reference,
)
from codegen.triton_kernels.gemv import GEMV, gemv, gemv_reference
from codegen.triton_kernels.generate import launched_by
from codegen.triton_kernels.prefill_attention import PREFILL_ATTENTION, prefill_attention
from codegen.triton_kernels.rms_norm import RMS_NORM, rms_norm, rms_norm_reference
from codegen.triton_kernels.tuned import TunedKernel
from codegen.tuning import Problem, Ranked, Tuning, tuning
from rewriter.dialect.attention import attention

__all__ = ["FAMILIES", "Case", "Family", "Recorded", "Shape", "problem", "recorded"]

Shape = Mapping[str, int]
BF16 = torch.bfloat16


@dataclass(frozen=True)
class Case:
    """A kernel's call on the tensors of one shape, and what it should give."""

    run: Callable[[Any], Tensor]
    """With a configuration; None = by the rule of `codegen.tuning`."""
    reference: Callable[[], Tensor]


@dataclass(frozen=True)
class Family:
    """One kernel, or one form of it.

    Attributes:
        description: what its configurations are listed for at a shape.
        make: the case at a shape on a device. tiny: a shape for the interpreter.
    """

    name: str
    kernel: TunedKernel[Any]
    shapes: Sequence[Shape]
    tiny: Shape
    describe: Callable[[Shape], KernelDescription]
    make: Callable[[Shape, torch.device], Case]

    def configurations(self, shape: Shape) -> list[Any]:
        """The default first, then the other candidates."""
        description = self.describe(shape)
        default = self.kernel.config_for(description)
        return [default, *(c for c in self.kernel.candidates(description) if c != default)]


def _randn(device: torch.device, *shape: int) -> Tensor:
    return torch.randn(*shape, device=device).to(BF16)


# --- products ------------------------------------------------------------------------------------

_MATRICES = (
    (1024, 4096), (4096, 4096), (6144, 4096), (14336, 4096), (28672, 4096), (4096, 14336),
    (2048, 2048), (8192, 2048), (2048, 8192), (8192, 8192), (3072, 3072), (32000, 4096),
)  # fmt: skip


def _gemv_description(shape: Shape) -> KernelDescription:
    narrow = torch.int8 if shape["weight_bytes"] == 1 else None
    form = "row" if shape["rows"] == 1 else "rows"
    return KernelDescription(operator="gemv", dtype=BF16, weight_dtype=narrow, form=form)


def _gemv(shape: Shape, device: torch.device) -> Case:
    out_features, in_features = shape["out_features"], shape["in_features"]
    x, scale = _randn(device, shape["rows"], in_features), None
    if shape["weight_bytes"] == 1:
        size = (out_features, in_features)
        weight = torch.randint(-127, 128, size, dtype=torch.int8, device=device)
        scale = torch.rand(out_features, device=device) / 100
    else:
        weight = _randn(device, out_features, in_features)
    return Case(
        lambda config: gemv(x, weight, scale, config=config),
        lambda: gemv_reference(x, weight, scale),
    )


def _products(rows: Sequence[int]) -> list[Shape]:
    return [
        {"rows": r, "out_features": o, "in_features": i, "weight_bytes": b}
        for r in rows
        for o, i in _MATRICES
        for b in (2, 1)
    ]


# --- pointwise -----------------------------------------------------------------------------------


def _rms_norm(shape: Shape, device: torch.device) -> Case:
    x, weight = _randn(device, shape["rows"], shape["width"]), _randn(device, shape["width"])
    residual = torch.randn_like(x) if shape["residual"] else None
    return Case(
        lambda config: rms_norm(x, weight, residual, eps=1e-6, config=config)[0],
        lambda: rms_norm_reference(x, weight, residual, eps=1e-6)[0],
    )


def _rms_description(shape: Shape) -> KernelDescription:
    form = "residual" if shape["residual"] else ""
    return KernelDescription(operator="rms_norm", dtype=BF16, head_dim=shape["width"], form=form)


def _gated(shape: Shape, device: torch.device) -> Case:
    gate, up = (_randn(device, shape["rows"], shape["width"]) for _ in range(2))
    silu = ACTIVATIONS["silu"]
    return Case(
        lambda config: gated_activation(gate, up, activation=silu, config=config),
        lambda: gated_activation_reference(gate, up, activation=silu),
    )


# --- some neurons --------------------------------------------------------------------------------


def _neurons(shape: Shape, device: torch.device) -> Tensor:
    """An even share of all, in no order."""
    order = torch.randperm(shape["count"] * shape["share"])[: shape["count"]]
    return order.int().unsqueeze(0).to(device)


def _weight(shape: Shape, device: torch.device) -> Tensor:
    size = shape["count"] * shape["share"], shape["hidden_size"]
    return _randn(device, *size) / shape["hidden_size"] ** 0.5


def _gathered_up(shape: Shape, device: torch.device) -> Case:
    gate, up = _weight(shape, device), _weight(shape, device)
    x, neurons, silu = _randn(device, 1, up.shape[1]), _neurons(shape, device), ACTIVATIONS["silu"]
    return Case(
        lambda config: mlp.gathered_up(x, gate, up, neurons, activation=silu, config=config),
        lambda: mlp.gathered_up_reference(x, gate, up, neurons, activation=silu),
    )


def _gathered_down(shape: Shape, device: torch.device) -> Case:
    down, neurons = _weight(shape, device), _neurons(shape, device)
    hidden = _randn(device, 1, shape["count"])
    return Case(
        lambda config: mlp.gathered_down(hidden, down, neurons, config=config),
        lambda: mlp.gathered_down_reference(hidden, down, neurons),
    )


def _gathered_shapes() -> list[Shape]:
    sizes = ((1024, 2048), (2048, 4096), (3584, 4096), (7168, 4096), (2048, 8192), (7168, 8192))
    return [{"count": c, "hidden_size": h, "share": 4} for c, h in sizes]


# --- attention -----------------------------------------------------------------------------------


def _attention_description(operator: str, shape: Shape) -> KernelDescription:
    form = "sum" if operator == "column_sums" else ""
    return KernelDescription(
        operator=operator,
        dtype=BF16,
        head_dim=shape["head_dim"],
        group_size=shape["num_heads"] // shape["num_kv_heads"],
        mask="causal",
        form=form,
    )


def _attended(shape: Shape, device: torch.device) -> tuple[Tensor, Tensor, Tensor, float]:
    batch_size, head_dim = shape["batch_size"], shape["head_dim"]
    q = _randn(device, batch_size, shape["num_heads"], shape["q_len"], head_dim)
    cached = (batch_size, shape["num_kv_heads"], shape["kv_len"], head_dim)
    return q, _randn(device, *cached), _randn(device, *cached), head_dim**-0.5


def _decode(shape: Shape, device: torch.device) -> Case:
    q, k, v, scale = _attended(shape, device)
    d = _attention_description("decode_attention", shape)

    def run(config: Any) -> Tensor:
        if config is not None and device.type == "meta" and not config.num_splits:
            programs = shape["batch_size"] * shape["num_kv_heads"]
            splits = even_splits(shape["kv_len"], programs, config.block_n, _MULTIPROCESSORS)
            config = replace(config, num_splits=splits)
        return decode_attention(d, q, k, v, softmax_scale=scale, config=config)[0]

    return Case(run, lambda: _plain(q, k, v, scale))


_MULTIPROCESSORS = 132
"""Of an H100, for splits that depend on the device where there is none."""


def _prefill(shape: Shape, device: torch.device) -> Case:
    q, k, v, scale = _attended(shape, device)
    d = _attention_description("prefill_attention", shape)
    return Case(
        lambda config: prefill_attention(d, q, k, v, softmax_scale=scale, config=config)[0],
        lambda: _plain(q, k, v, scale),
    )


def _plain(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Head by head, as whole scores of long sequences fill a GPU."""
    group = q.shape[1] // k.shape[1]
    heads = []
    for head in range(q.shape[1]):
        at = slice(head // group, head // group + 1)
        part = (q[:, head : head + 1].float(), k[:, at].float(), v[:, at].float())
        heads.append(attention.reference(*part, softmax_scale=scale, mask="causal"))
    return torch.cat(heads, 1)


def _column_sums(shape: Shape, device: torch.device) -> Case:
    q, k, _, scale = _attended(shape, device)
    d = _attention_description("column_sums", shape)
    group, q_len, kv_len = d.group_size, shape["q_len"], shape["kv_len"]
    hidden = torch.ones(q_len, kv_len, device=device).triu(kv_len - q_len + 1).bool()

    def scores() -> Tensor:
        wide = k.repeat_interleave(group, 1).float()
        return (q.float() @ wide.mT * scale).masked_fill(hidden, -torch.inf)

    lse = scores().logsumexp(-1)
    return Case(
        lambda config: column_sums(d, q, k, lse, softmax_scale=scale, config=config),
        lambda: scores().softmax(-1).sum(2).unflatten(1, (-1, group)).sum(2),
    )


def _heads(head_dim: int) -> dict[str, int]:
    return {"num_heads": 32, "num_kv_heads": 8, "head_dim": head_dim}


_TINY = {"batch_size": 1, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16}

FAMILIES = {
    family.name: family
    for family in (
        Family(
            "gemv_row",
            GEMV,
            _products((1,)),
            {"rows": 1, "out_features": 40, "in_features": 65, "weight_bytes": 1},
            _gemv_description,
            _gemv,
        ),
        Family(
            "gemv_rows",
            GEMV,
            _products((4, 16))[::2],
            {"rows": 3, "out_features": 40, "in_features": 65, "weight_bytes": 2},
            _gemv_description,
            _gemv,
        ),
        Family(
            "rms_norm",
            RMS_NORM,
            [
                {"rows": r, "width": w, "residual": int(r > 1)}
                for w in (1024, 2048, 4096, 8192)
                for r in (1, 16, 512, 4096)
            ],
            {"rows": 2, "width": 65, "residual": 1},
            _rms_description,
            _rms_norm,
        ),
        Family(
            "gated_activation",
            GATED_ACTIVATION,
            [
                {"rows": r, "width": w}
                for w in (4096, 8192, 14336, 28672)
                for r in (1, 16, 512, 4096)
            ],
            {"rows": 2, "width": 300},
            lambda _: KernelDescription(
                operator="gated_activation", dtype=BF16, epilogue=ACTIVATIONS["silu"]
            ),
            _gated,
        ),
        Family(
            "gathered_up",
            mlp.UP,
            _gathered_shapes(),
            {"count": 9, "hidden_size": 65, "share": 2},
            lambda _: KernelDescription(
                operator="gathered_up", dtype=BF16, form="top_k", epilogue=ACTIVATIONS["silu"]
            ),
            _gathered_up,
        ),
        Family(
            "gathered_down",
            mlp.DOWN,
            _gathered_shapes(),
            {"count": 33, "hidden_size": 65, "share": 2},
            lambda _: KernelDescription(operator="gathered_down", dtype=BF16, form="top_k"),
            _gathered_down,
        ),
        Family(
            "decode_attention",
            DECODE_ATTENTION,
            [
                {"batch_size": b, "q_len": 1, "kv_len": n, **_heads(d)}
                for d in (64, 128)
                for b, n in ((1, 1024), (1, 4096), (1, 32768), (4, 4096), (16, 4096), (64, 2048))
            ],
            {**_TINY, "q_len": 1, "kv_len": 70},
            lambda shape: _attention_description("decode_attention", shape),
            _decode,
        ),
        Family(
            "prefill_attention",
            PREFILL_ATTENTION,
            [
                {"batch_size": b, "q_len": n, "kv_len": n, **_heads(d)}
                for d in (64, 128)
                for b, n in ((1, 512), (1, 2048), (1, 8192), (4, 1024), (16, 512))
            ],
            {**_TINY, "q_len": 20, "kv_len": 40},
            lambda shape: _attention_description("prefill_attention", shape),
            _prefill,
        ),
        Family(
            "column_sums",
            COLUMN_SUMS,
            [
                {"batch_size": 1, "q_len": q, "kv_len": n, **_heads(128)}
                for q, n in ((32, 4096), (64, 8192), (64, 32768), (512, 4096), (2048, 2048))
            ],
            {**_TINY, "q_len": 5, "kv_len": 40},
            lambda shape: _attention_description("column_sums", shape),
            _column_sums,
        ),
    )
}
"""By name."""


# --- what would be launched ----------------------------------------------------------------------


@dataclass(frozen=True)
class Recorded:
    """One launch: generated text, grid and arguments in the order of the text's parameters."""

    text: str
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]


def recorded(case: Case, config: Any) -> tuple[list[Recorded], Tensor]:
    """What the case launches with a configuration, and the result that this would fill; nothing runs."""
    found: list[Recorded] = []
    with launched_by(lambda text, grid, given: found.append(Recorded(text, grid, tuple(given)))):
        result = case.run(config)
    return found, result


def problem(case: Case) -> Problem:
    """What the kernel's launcher asks a configuration for."""
    asked: list[Problem] = []

    def keep(problem: Problem, candidates: Sequence[Any], default: int) -> Ranked:
        asked.append(problem)
        return Ranked((default,))

    with tuning(Tuning("model", keep)), launched_by(lambda *_: None):
        case.run(None)
    return asked[0]
