"""The feed-forward block on some of its neurons: their rows are read where they lie, the rest is not.

    hidden[m, s] = act(x[m] · gate[n]) · (x[m] · up[n])      n = neurons[m, s]        form "top_k"
    hidden[m, n] = gated[m, n] · (x[m] · up[n]) where |gated[m, n]| > threshold, else 0    "threshold"
    out[m]       = epilogue(Σ_s hidden[m, s] · down[n])

Layouts: x [rows, hidden_size]; gate, up and down [intermediate_size, hidden_size], so down is stored
transposed, one contiguous row for each neuron; hidden [rows, budget] for `top_k` and
[rows, intermediate_size] for `threshold`; neurons int32 [rows, budget], -1 = none, the same for every
row at row stride 0. `gated` is the activated gate. The activation is an epilogue on the gate's product.

One program of the first kernel computes `block_s` neurons of one row; lanes of neurons that are not
active are masked and cause no traffic. The second splits the neurons among programs, each of which
adds up `block_n` columns of its part in fp32; a third adds the parts, in a fixed order.
Bytes moved: 2 or 3 rows of weight for each active neuron and row of x.
Sources: https://arxiv.org/abs/2402.01032 (GRIFFIN), https://arxiv.org/abs/2404.08763 (CATS)
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from codegen.epilogue import Epilogue
from codegen.kernel import KernelDescription
from codegen.triton_kernels.checks import float_refusal, one_of, rows_of, same_dtype
from codegen.triton_kernels.generate import Launch, generate, pointer, run
from codegen.triton_kernels.tuned import TunedKernel, config_of_launch
from rewriter.cost.cost import Cost
from rewriter.errors import InputError

__all__ = [
    "DOWN",
    "SUM",
    "UP",
    "GatheredConfig",
    "gathered_down",
    "gathered_down_reference",
    "gathered_mlp_cost",
    "gathered_up",
    "gathered_up_reference",
]

SOURCE_URL = "https://arxiv.org/abs/2402.01032"
FORMS = ("top_k", "threshold")


@dataclass(frozen=True)
class GatheredConfig:
    """Tiles of the three kernels.

    Attributes:
        block_s, block_k: neurons of a program of the first kernel, and inputs of a step.
        block_n, block_r: columns of a program of the second kernel, and neurons of a step.
        num_splits: parts of the neurons in the second kernel.
    """

    block_s: int = 4
    block_k: int = 512
    block_n: int = 128
    block_r: int = 16
    num_splits: int = 16
    num_warps: int = 4
    num_stages: int = 2


CONFIG = GatheredConfig()
"""Chosen so that nothing spills on sm_80, sm_90 and gfx942 and that a hidden size of 4096 gives the
second kernel 512 programs, four for each of an H100's SMs; not timed."""


@triton.jit
def gathered_up_kernel(
    x: tl.tensor,
    gate: tl.tensor,  # [intermediate_size, hidden_size]; of `threshold`: gated [rows, neurons]
    up: tl.tensor,
    neurons: tl.tensor,  # read by `top_k`
    hidden: tl.tensor,
    threshold: tl.tensor,  # fp32, read by `threshold`
    count: int,  # neurons of a row
    hidden_size: int,
    x_row: int,
    gate_row: int,
    up_row: int,
    neurons_row: int,
    out_row: int,
    # +operands
    BLOCK_S: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GATHER: tl.constexpr,
) -> None:
    """See the module."""
    row = tl.program_id(0).to(tl.int64)
    s = tl.program_id(1).to(tl.int64) * BLOCK_S + tl.arange(0, BLOCK_S)[:, None]  # [S, 1]
    k = tl.arange(0, BLOCK_K)[None, :]  # [1, K]
    inside = s < count
    gated = tl.zeros([BLOCK_S, 1], tl.float32)
    if GATHER:
        n = tl.load(neurons + row * neurons_row + s, mask=inside, other=-1).to(tl.int64)
        active = n >= 0
    else:
        n = s
        gated = tl.load(gate + row * gate_row + s, mask=inside, other=0.0).to(tl.float32)
        active = tl.abs(gated) > threshold
    up_sum = tl.zeros([BLOCK_S, BLOCK_K], tl.float32)
    gate_sum = tl.zeros([BLOCK_S, BLOCK_K], tl.float32)
    for start in range(0, hidden_size, BLOCK_K):
        at = start + k
        live = at < hidden_size
        v = tl.load(x + row * x_row + at, mask=live, other=0.0).to(tl.float32)  # [1, K]
        wanted = active & live
        u = tl.load(up + n * up_row + at, mask=wanted, other=0.0)  # [S, K]
        up_sum += u.to(tl.float32) * v
        if GATHER:
            g = tl.load(gate + n * gate_row + at, mask=wanted, other=0.0)  # [S, K]
            gate_sum += g.to(tl.float32) * v
    if GATHER:
        gated = tl.sum(gate_sum, 1, keep_dims=True)  # [S, 1]
        # +epilogue: gated [row, n] mask [inside, active]
    result = tl.where(active, gated * tl.sum(up_sum, 1, keep_dims=True), 0.0)
    tl.store(hidden + row * out_row + s, result.to(hidden.dtype.element_ty), mask=inside)


@triton.jit
def gathered_down_kernel(
    hidden: tl.tensor,
    down: tl.tensor,
    neurons: tl.tensor,  # read where GATHER
    partial: tl.tensor,  # fp32 [num_splits, rows, hidden_size]
    count: int,
    hidden_size: int,
    hidden_row: int,
    down_row: int,
    neurons_row: int,
    rows: int,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    GATHER: tl.constexpr,
) -> None:
    """See the module."""
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(2).to(tl.int64)
    c = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]  # [1, N]
    live = c < hidden_size
    share = tl.cdiv(tl.cdiv(count, BLOCK_R), NUM_SPLITS) * BLOCK_R
    acc = tl.zeros([BLOCK_R, BLOCK_N], tl.float32)
    for start in range(split * share, tl.minimum((split + 1) * share, count), BLOCK_R):
        s = start + tl.arange(0, BLOCK_R)[:, None]  # [R, 1]
        inside = s < count
        h = tl.load(hidden + row * hidden_row + s, mask=inside, other=0.0).to(tl.float32)
        n = s.to(tl.int64)
        if GATHER:
            n = tl.load(neurons + row * neurons_row + s, mask=inside, other=-1).to(tl.int64)
        wanted = inside & (h != 0.0) & (n >= 0) & live
        w = tl.load(down + n * down_row + c, mask=wanted, other=0.0)  # [R, N]
        acc += h * w.to(tl.float32)
    total = tl.sum(acc, 0, keep_dims=True)  # [1, N]
    tl.store(partial + (split * rows + row) * hidden_size + c, total, mask=live)


@triton.jit
def sum_splits_kernel(
    partial: tl.tensor,  # fp32 [num_splits, rows, columns]
    out: tl.tensor,
    rows: int,
    columns: int,
    out_row: int,
    # +operands
    BLOCK_N: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
) -> None:
    """Adds the parts in order, so that the result does not depend on who was first."""
    row = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)  # [N]
    live = c < columns
    acc = tl.zeros([BLOCK_N], tl.float32)
    for split in range(NUM_SPLITS):
        place = (split * rows + row) * columns + c
        acc += tl.load(partial + place, mask=live, other=0.0)
    # +epilogue: acc [row, c] mask [True, live]
    tl.store(out + row * out_row + c, acc.to(out.dtype.element_ty), mask=live)


class GatheredUp(TunedKernel[GatheredConfig]):
    """`form` is `"top_k"` or `"threshold"`; the epilogue is the activation, of the former alone."""

    operator = "gathered_up"
    backend = "triton"

    def supports(self, description: KernelDescription) -> str | None:
        """See `Kernel`."""
        refusal = float_refusal(description) or one_of("form", description.form, FORMS)
        if refusal is None and description.form == "threshold" and description.epilogue:
            return "epilogue is not allowed with form='threshold': the gate is activated already"
        return refusal

    def config_for(self, description: KernelDescription) -> GatheredConfig:
        """See `TunedKernel`."""
        return CONFIG

    def candidates(self, description: KernelDescription) -> tuple[GatheredConfig, ...]:
        """See `TunedKernel`; two tiles of sums, of 1024 to 8192 values each.

        Stages are of products by tensor cores, which none of these kernels uses.
        """
        space = itertools.product((1, 2, 4, 8, 16), (128, 256, 512, 1024, 2048), (2, 4, 8))
        names = ("block_s", "block_k", "num_warps")
        knobs = (dict(zip(names, c, strict=True)) for c in space if 1024 <= c[0] * c[1] <= 8192)
        return tuple(replace(CONFIG, **k) for k in knobs)

    def configured_source(self, description: KernelDescription, config: GatheredConfig) -> str:
        """See `TunedKernel`."""
        wide = pointer(description.dtype)
        sizes = ("hidden_size", "x_row", "gate_row", "up_row")
        return generate(
            gathered_up_kernel,
            description=description,
            source_url=SOURCE_URL,
            signature={
                **dict.fromkeys(("x", "gate", "up", "hidden"), wide),
                "neurons": pointer(torch.int32),
                "threshold": "fp32",
                **dict.fromkeys(sizes, "i64:16"),
                **dict.fromkeys(("count", "neurons_row", "out_row"), "i64"),
            },
            constants={
                "BLOCK_S": config.block_s,
                "BLOCK_K": config.block_k,
                "GATHER": description.form == "top_k",
            },
            launch=Launch(("rows", "cdiv(count, BLOCK_S)"), config.num_warps, config.num_stages),
            epilogue=description.epilogue,
        )


class GatheredDown(TunedKernel[GatheredConfig]):
    """`form` is `"top_k"` or `"threshold"`; gives parts that `SumSplits` adds."""

    operator = "gathered_down"
    backend = "triton"

    def supports(self, description: KernelDescription) -> str | None:
        """See `Kernel`."""
        refusal = float_refusal(description) or one_of("form", description.form, FORMS)
        return refusal or one_of("epilogue", description.epilogue, (None,))

    def config_for(self, description: KernelDescription) -> GatheredConfig:
        """See `TunedKernel`."""
        return CONFIG

    def candidates(self, description: KernelDescription) -> tuple[GatheredConfig, ...]:
        """See `TunedKernel`."""
        space = itertools.product((64, 128, 256), (8, 16, 32), (4, 8, 16, 32), (2, 4, 8))
        names = ("block_n", "block_r", "num_splits", "num_warps")
        return tuple(replace(CONFIG, **dict(zip(names, c, strict=True))) for c in space)

    def configured_source(self, description: KernelDescription, config: GatheredConfig) -> str:
        """See `TunedKernel`."""
        wide = pointer(description.dtype)
        return generate(
            gathered_down_kernel,
            description=description,
            source_url=SOURCE_URL,
            signature={
                **dict.fromkeys(("hidden", "down"), wide),
                "neurons": pointer(torch.int32),
                "partial": pointer(torch.float32),
                **dict.fromkeys(("hidden_size", "down_row"), "i64:16"),
                **dict.fromkeys(("count", "hidden_row", "neurons_row", "rows"), "i64"),
            },
            constants={
                "BLOCK_N": config.block_n,
                "BLOCK_R": config.block_r,
                "NUM_SPLITS": config.num_splits,
                "GATHER": description.form == "top_k",
            },
            launch=Launch(
                ("rows", "cdiv(hidden_size, BLOCK_N)", "NUM_SPLITS"),
                config.num_warps,
                config.num_stages,
            ),
        )


class SumSplits(TunedKernel[GatheredConfig]):
    """Adds the parts of `GatheredDown`; `dtype` is the result's without an epilogue."""

    operator = "sum_splits"
    backend = "triton"

    def supports(self, description: KernelDescription) -> str | None:
        """See `Kernel`."""
        return float_refusal(description)

    def config_for(self, description: KernelDescription) -> GatheredConfig:
        """See `TunedKernel`."""
        return CONFIG

    def candidates(self, description: KernelDescription) -> tuple[GatheredConfig, ...]:
        """See `TunedKernel`; it goes with what `GatheredDown` was launched with."""
        return (CONFIG,)

    def configured_source(self, description: KernelDescription, config: GatheredConfig) -> str:
        """See `TunedKernel`."""
        epilogue = description.epilogue
        dtype = epilogue.dtype if epilogue and epilogue.dtype else description.dtype
        return generate(
            sum_splits_kernel,
            description=description,
            source_url=SOURCE_URL,
            signature={
                "partial": pointer(torch.float32),
                "out": pointer(dtype),
                **dict.fromkeys(("columns", "out_row"), "i64:16"),
                "rows": "i64",
            },
            constants={"BLOCK_N": config.block_n, "NUM_SPLITS": config.num_splits},
            launch=Launch(("rows", "cdiv(columns, BLOCK_N)"), config.num_warps, 1),
            epilogue=epilogue,
        )


UP, DOWN, SUM = GatheredUp(), GatheredDown(), SumSplits()


def gathered_up(
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    neurons: Tensor | None = None,
    *,
    threshold: float = 0.0,
    activation: Epilogue | None = None,
    operands: Sequence[Tensor] = (),
    config: GatheredConfig | None = None,
) -> Tensor:
    """The active neurons' values, x [rows, hidden_size].

    Args:
        gate: weight [intermediate_size, hidden_size] with `neurons`; without, the activated gate
            [rows, intermediate_size], of which those above `threshold` in size are active.
        up: [intermediate_size, hidden_size].
        neurons: int32 [rows or 1, budget], -1 = none.
        activation: of the gate's product, with `neurons`. Its columns are neurons.
        config: None = by the rule of `codegen.tuning`.

    Returns:
        [rows, budget] or [rows, intermediate_size], 0 where not active; x's dtype.

    Raises:
        InputError: shapes or dtypes that do not fit.
    """
    rows, hidden_size = rows_of("x", x)
    intermediate_size, width = rows_of("up", up)
    for name, tensor in (("gate", gate), ("up", up)):
        same_dtype(name, tensor, x)
    expected = (rows, intermediate_size) if neurons is None else (intermediate_size, hidden_size)
    if rows_of("gate", gate) != expected or width != hidden_size:
        raise InputError(f"gate {tuple(gate.shape)} and up {tuple(up.shape)} do not fit x")
    count = intermediate_size if neurons is None else _budget(neurons, rows)
    form = "threshold" if neurons is None else "top_k"
    description = KernelDescription(
        operator="gathered_up", dtype=x.dtype, form=form, epilogue=activation
    )
    hidden = x.new_empty((rows, count))
    extra = activation.launch_arguments(operands, rows, intermediate_size) if activation else []
    chosen = hidden if neurons is None else neurons
    strides = (x.stride(0), gate.stride(0), up.stride(0), _row_stride(chosen), hidden.stride(0))
    sizes = (threshold, count, hidden_size, *strides)

    def launch(config: GatheredConfig) -> None:
        grid = (rows, triton.cdiv(count, config.block_s))
        run(UP, description, grid, (x, gate, up, chosen, hidden, *sizes, *extra), config)

    def told() -> dict[str, int]:
        found = {"rows": rows, "count": count, "hidden_size": hidden_size}
        return {**found, "matrices": 1 if neurons is None else 2}

    launch(config or config_of_launch(UP, description, x.device, told, launch))
    return hidden


def gathered_down(
    hidden: Tensor,
    down: Tensor,
    neurons: Tensor | None = None,
    *,
    epilogue: Epilogue | None = None,
    operands: Sequence[Tensor] = (),
    config: GatheredConfig | None = None,
) -> Tensor:
    """Σ_s hidden[:, s] · down[neurons[:, s]], then the epilogue on [rows, hidden_size].

    Args:
        hidden: [rows, budget], or [rows, intermediate_size] without `neurons`; zeros are skipped.
        down: [intermediate_size, hidden_size], one row for each neuron.
        neurons: as for `gathered_up`.
        config: None = by the rule of `codegen.tuning`.

    Raises:
        InputError: shapes or dtypes that do not fit.
    """
    rows, count = rows_of("hidden", hidden)
    intermediate_size, hidden_size = rows_of("down", down)
    same_dtype("down", down, hidden)
    wanted = intermediate_size if neurons is None else _budget(neurons, rows)
    if count != wanted:
        raise InputError(f"hidden: {count} neurons where {wanted} are expected")
    form = "threshold" if neurons is None else "top_k"
    description = KernelDescription(operator="gathered_down", dtype=hidden.dtype, form=form)
    adding = KernelDescription(operator="sum_splits", dtype=hidden.dtype, epilogue=epilogue)
    chosen = hidden if neurons is None else neurons
    strides = (hidden.stride(0), down.stride(0), _row_stride(chosen))
    dtype = epilogue.dtype if epilogue and epilogue.dtype else hidden.dtype
    out = hidden.new_empty((rows, hidden_size), dtype=dtype)
    extra = epilogue.launch_arguments(operands, rows, hidden_size) if epilogue else []

    def launch(config: GatheredConfig) -> None:
        splits, blocks = config.num_splits, triton.cdiv(hidden_size, config.block_n)
        partial = hidden.new_empty((splits, rows, hidden_size), dtype=torch.float32)
        arguments = (hidden, down, chosen, partial, count, hidden_size, *strides, rows)
        run(DOWN, description, (rows, blocks, splits), arguments, config)
        arguments = (partial, out, rows, hidden_size, out.stride(0), *extra)
        run(SUM, adding, (rows, blocks), arguments, config)

    def told() -> dict[str, int]:
        return {"rows": rows, "count": count, "hidden_size": hidden_size}

    launch(config or config_of_launch(DOWN, description, hidden.device, told, launch))
    return out


def gathered_up_reference(
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    neurons: Tensor | None = None,
    *,
    threshold: float = 0.0,
    activation: Epilogue | None = None,
) -> Tensor:
    """The same in plain PyTorch, for activations without operands."""
    rising = x.float() @ up.float().T
    if neurons is None:
        return torch.where(gate.abs() > threshold, gate.float() * rising, 0.0).to(x.dtype)
    gated = x.float() @ gate.float().T
    gated = gated if activation is None else activation.reference(gated).float()
    chosen = neurons.expand(x.shape[0], -1).long()
    picked = (gated * rising).gather(1, chosen.clamp(min=0))
    return torch.where(chosen >= 0, picked, 0.0).to(x.dtype)


def gathered_down_reference(
    hidden: Tensor,
    down: Tensor,
    neurons: Tensor | None = None,
    *,
    epilogue: Epilogue | None = None,
    operands: Sequence[Tensor] = (),
) -> Tensor:
    """The same in plain PyTorch."""
    if neurons is None:
        out = hidden.float() @ down.float()
    else:
        chosen = neurons.expand(hidden.shape[0], -1).long()
        rows = torch.where(chosen[..., None] >= 0, down[chosen.clamp(min=0)].float(), 0.0)
        out = torch.einsum("ms,msh->mh", hidden.float(), rows)
    out = epilogue.reference(out, operands) if epilogue else out
    return out if epilogue and epilogue.dtype else out.to(hidden.dtype)


def gathered_mlp_cost(rows: int, active: int, hidden_size: int, element_size: int) -> Cost:
    """Both halves with gate, up and down gathered, `active` neurons for each row."""
    read = 3.0 * rows * active * hidden_size
    return Cost(2.0 * read, read * element_size, 3)


def _budget(neurons: Tensor, rows: int) -> int:
    if neurons.dtype != torch.int32 or neurons.dim() != 2 or neurons.shape[0] not in (1, rows):
        raise InputError(f"neurons: int32 [{rows} or 1, budget] is expected")
    return rows_of("neurons", neurons)[1]


def _row_stride(neurons: Tensor) -> int:
    return 0 if neurons.shape[0] == 1 else neurons.stride(0)
