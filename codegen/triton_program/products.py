"""Products of a program: few rows run `gemv`, many are PyTorch's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from codegen.epilogue import Epilogue
from codegen.triton_kernels.gated_activation import ACTIVATIONS, gated_activation
from codegen.triton_kernels.gemv import MAX_ROWS, gemv
from codegen.triton_program.ledger import Site
from codegen.triton_program.tail import Tail
from rewriter.dialect.linear import linear
from rewriter.dialect.mlp import ACTIVATIONS as REFERENCES

__all__ = ["gated_mlp_site", "linear_site", "mlp_site"]

_MANY = f"products of more than {MAX_ROWS} rows"
_STRIDED = "products with a weight whose rows are not contiguous"


def _product(
    site: Site,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    epilogue: Epilogue,
    operands: Sequence[Tensor],
    otherwise: Callable[..., Tensor],
) -> Tensor:
    """x [..., in] times weight [out, in]ᵀ, then the epilogue; `otherwise(value, *operands)` is the same."""
    rows = x.numel() // max(x.shape[-1], 1)
    reason = _MANY if rows > MAX_ROWS else _STRIDED if weight.stride(1) != 1 else None
    if reason is not None:
        site.passed(reason)
        return otherwise(linear(x, weight, bias), *operands)
    site.ran("gemv")
    if bias is not None:
        epilogue, operands = epilogue.after_bias(bias.dtype), (bias, *operands)
    flat = x.reshape(rows, x.shape[-1])
    out = gemv(flat, weight, epilogue=epilogue or None, operands=operands)
    return out.view(*x.shape[:-1], weight.shape[0])


def linear_site(site: Site, arguments: dict[str, Any], tail: Tail) -> Callable[..., Tensor]:
    """`linear(x, weight, bias)` and what follows it."""

    def run(x: Tensor, weight: Tensor, bias: Tensor | None, *operands: Tensor) -> Tensor:
        return _product(site, x, weight, bias, tail.epilogue, operands, tail.run)

    return run


def mlp_site(site: Site, arguments: dict[str, Any], tail: Tail) -> Callable[..., Tensor]:
    """`mlp`: the activation belongs to the first product."""
    name = arguments["activation"]
    inner, reference = ACTIVATIONS[name], REFERENCES[name]

    def run(
        x: Tensor,
        up: Tensor,
        down: Tensor,
        up_bias: Tensor | None,
        down_bias: Tensor | None,
        *operands: Tensor,
    ) -> Tensor:
        hidden = _product(site, x, up, up_bias, inner, (), reference)
        return _product(site, hidden, down, down_bias, tail.epilogue, operands, tail.run)

    return run


def gated_mlp_site(site: Site, arguments: dict[str, Any], tail: Tail) -> Callable[..., Tensor]:
    """`gated_mlp`: between the products runs `gated_activation`, for any number of rows."""
    activation, plain = ACTIVATIONS[arguments["activation"]] or None, Epilogue()

    def run(
        x: Tensor,
        gate: Tensor,
        up: Tensor,
        down: Tensor,
        gate_bias: Tensor | None,
        up_bias: Tensor | None,
        down_bias: Tensor | None,
        *operands: Tensor,
    ) -> Tensor:
        gated = _product(site, x, gate, gate_bias, plain, (), _same)
        wide = _product(site, x, up, up_bias, plain, (), _same)
        site.ran("gated_activation")
        width = gated.shape[-1]
        flat = gated.reshape(-1, width), wide.reshape(-1, width)
        hidden = gated_activation(*flat, activation=activation).view(gated.shape)
        return _product(site, hidden, down, down_bias, tail.epilogue, operands, tail.run)

    return run


def _same(value: Tensor) -> Tensor:
    return value
