"""The pointwise middle of a gated feed-forward block, in one pass.

    out = act(gate) · up

Layouts: gate, up and out [rows, width], any row strides, columns contiguous, so that both halves of a
fused gate-up product are views of it. The activation is an epilogue on the gate; `ACTIVATIONS` has
those of the dialect. One program computes `block` values of one row in fp32. Bytes moved: three rows.
Source: https://arxiv.org/abs/2002.05202
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from codegen.epilogue import Epilogue, Step
from codegen.kernel import KernelDescription
from codegen.triton_kernels.checks import float_refusal, rows_of, same_dtype
from codegen.triton_kernels.generate import Launch, generate, pointer, run
from codegen.triton_kernels.tuned import TunedKernel, config_of_launch
from rewriter.cost.cost import Cost
from rewriter.errors import InputError

__all__ = [
    "ACTIVATIONS",
    "GATED_ACTIVATION",
    "ActivationConfig",
    "gated_activation",
    "gated_activation_cost",
    "gated_activation_reference",
]


@dataclass(frozen=True)
class ActivationConfig:
    """Values of one program, and its warps."""

    block: int = 1024
    num_warps: int = 4


CONFIG = ActivationConfig()
"""Eight values for each thread, one 16-byte load in bf16; not timed."""

ACTIVATIONS: dict[str, Epilogue] = {
    "silu": Epilogue((Step("silu", ("value",)),)),
    "gelu": Epilogue((Step("gelu", ("value",)),)),
    "gelu_tanh": Epilogue((Step("gelu_tanh", ("value",)),)),
    "quick_gelu": Epilogue(
        (
            Step("mul", ("value", 1.702)),
            Step("sigmoid", ("t0",)),
            Step("mul", ("value", "t1")),
        )
    ),
    "relu": Epilogue((Step("relu", ("value",)),)),
    "relu_squared": Epilogue((Step("relu", ("value",)), Step("mul", ("t0", "t0")))),
    "sigmoid": Epilogue((Step("sigmoid", ("value",)),)),
    "tanh": Epilogue((Step("tanh", ("value",)),)),
    "identity": Epilogue(),
}
"""The dialect's activations by name."""


@triton.jit
def gated_activation_kernel(
    gate: tl.tensor,
    up: tl.tensor,
    out: tl.tensor,
    width: int,
    gate_row: int,
    up_row: int,
    out_row: int,
    # +operands
    BLOCK: tl.constexpr,
) -> None:
    """See the module."""
    row = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [W]
    live = c < width
    acc = tl.load(gate + row * gate_row + c, mask=live, other=0.0).to(tl.float32)
    # +epilogue: acc [row, c] mask [True, live]
    acc *= tl.load(up + row * up_row + c, mask=live, other=0.0).to(tl.float32)
    tl.store(out + row * out_row + c, acc.to(out.dtype.element_ty), mask=live)


class GatedActivation(TunedKernel[ActivationConfig]):
    """The epilogue is the activation; None is the identity."""

    operator = "gated_activation"
    backend = "triton"

    def supports(self, description: KernelDescription) -> str | None:
        """See `Kernel`."""
        return float_refusal(description)

    def config_for(self, description: KernelDescription) -> ActivationConfig:
        """See `TunedKernel`."""
        return CONFIG

    def candidates(self, description: KernelDescription) -> tuple[ActivationConfig, ...]:
        """See `TunedKernel`; 2 to 64 values for each thread."""
        space = itertools.product((256, 512, 1024, 2048, 4096, 8192), (1, 2, 4, 8, 16))
        return tuple(ActivationConfig(*c) for c in space if 2 <= c[0] // (32 * c[1]) <= 64)

    def configured_source(self, description: KernelDescription, config: ActivationConfig) -> str:
        """See `TunedKernel`."""
        wide = pointer(description.dtype)
        return generate(
            gated_activation_kernel,
            description=description,
            source_url="https://arxiv.org/abs/2002.05202",
            signature={
                **dict.fromkeys(("gate", "up", "out"), wide),
                **dict.fromkeys(("width", "gate_row", "up_row", "out_row"), "i64:16"),
            },
            constants={"BLOCK": config.block},
            launch=Launch(("rows", "cdiv(width, BLOCK)"), config.num_warps, 1),
            epilogue=description.epilogue,
        )


GATED_ACTIVATION = GatedActivation()


def gated_activation(
    gate: Tensor,
    up: Tensor,
    *,
    activation: Epilogue | None,
    operands: Sequence[Tensor] = (),
    config: ActivationConfig | None = None,
) -> Tensor:
    """act(gate) · up of two [rows, width] of one dtype.

    Args:
        config: None = by the rule of `codegen.tuning`.

    Raises:
        InputError: shapes or dtypes that do not fit.
    """
    rows, width = rows_of("gate", gate)
    same_dtype("up", up, gate)
    if rows_of("up", up) != (rows, width):
        raise InputError(f"up: {tuple(up.shape)} beside gate {tuple(gate.shape)}")
    description = KernelDescription(
        operator="gated_activation", dtype=gate.dtype, epilogue=activation
    )
    out = torch.empty((rows, width), dtype=gate.dtype, device=gate.device)
    extra = activation.launch_arguments(operands, rows, width) if activation else []
    strides = (gate.stride(0), up.stride(0), out.stride(0))

    def launch(config: ActivationConfig) -> None:
        grid = (rows, triton.cdiv(width, config.block))
        run(GATED_ACTIVATION, description, grid, (gate, up, out, width, *strides, *extra), config)

    def told() -> dict[str, int]:
        return {"rows": rows, "width": width}

    launch(config or config_of_launch(GATED_ACTIVATION, description, gate.device, told, launch))
    return out


def gated_activation_reference(
    gate: Tensor, up: Tensor, *, activation: Epilogue | None, operands: Sequence[Tensor] = ()
) -> Tensor:
    """The same in plain PyTorch."""
    gated = gate.float() if activation is None else activation.reference(gate, operands).float()
    return (gated * up.float()).to(gate.dtype)


def gated_activation_cost(gate: Tensor) -> Cost:
    """Two reads and a write."""
    return Cost(8.0 * gate.numel(), 3.0 * gate.numel() * gate.element_size(), 1)
