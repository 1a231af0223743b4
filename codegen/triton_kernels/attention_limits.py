"""What every kernel of the attention family asks of a description, and of tensors."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from codegen.kernel import Kernel, KernelDescription
from codegen.triton_kernels.checks import float_refusal, one_of
from codegen.triton_kernels.entries import LAYOUTS
from codegen.triton_kernels.score_terms import term_refusal
from codegen.triton_kernels.visibility import MASKS
from rewriter.errors import ConfigError, InputError

__all__ = [
    "MAX_HEAD_DIM",
    "check_cache",
    "check_tensors",
    "config_key",
    "query_positions",
    "refusal",
    "require",
    "stride_type",
    "tile_width",
    "value_width",
    "visible_entries",
]

MAX_HEAD_DIM = 256
"""A wider tile of queries and accumulators does not fit into registers."""


def refusal(
    d: KernelDescription,
    *,
    masks: tuple[str, ...] = MASKS,
    layouts: tuple[str, ...] = LAYOUTS,
    forms: tuple[str, ...] = ("",),
    weight_dtypes: tuple[torch.dtype, ...] = (),
    terms: tuple[str, ...] = (),
    epilogue: bool = False,
) -> str | None:
    """The first thing about `d` that cannot be done, as field, value and what is allowed.

    Args:
        weight_dtypes: allowed beside the dtype of the activations.
    """
    return (
        float_refusal(d)
        or one_of("weight_dtype", d.weight_dtype, (None, d.dtype, *weight_dtypes))
        or one_of("mask", d.mask, masks)
        or one_of("layout", d.layout, layouts)
        or one_of("form", d.form, forms)
        or _out_of_range("head_dim", d.head_dim, 1, MAX_HEAD_DIM)
        or _out_of_range("value_dim", d.value_dim, 0, MAX_HEAD_DIM)
        or _out_of_range("group_size", d.group_size, 1)
        or _out_of_range("span", d.span, 0 if d.mask in ("full", "causal") else 1)
        or _out_of_range("num_sink_tokens", d.num_sink_tokens, 0)
        or _out_of_range("page_size", d.page_size, 1 if d.layout == "paged" else 0)
        or _out_of_range("softcap", d.softcap, 0)
        or term_refusal(d, terms)
        or (None if epilogue or d.epilogue is None else f"epilogue={d.epilogue}, allowed: none")
    )


def _out_of_range(field: str, value: float, least: int, most: float = float("inf")) -> str | None:
    if least <= value <= most:
        return None
    return f"{field}={value}, allowed: {least} to {most}"


def require(kernel: Kernel, description: KernelDescription) -> None:
    """Raises ConfigError unless the kernel supports the description."""
    reason = kernel.supports(description)
    if reason is not None:
        raise ConfigError("description", str(description), reason)


def config_key(description: KernelDescription) -> str:
    """`"16-bit"` or `"float32"`, and 64, 128 or 256 for the widest head, as in `"16-bit 128"`."""
    kind = "float32" if description.dtype == torch.float32 else "16-bit"
    width = max(description.head_dim, description.value_dim)
    return f"{kind} {64 if width <= 64 else 128 if width <= 128 else 256}"


def value_width(description: KernelDescription) -> int:
    """Width of values: that of keys unless it is given."""
    return description.value_dim or description.head_dim


def tile_width(width: int) -> int:
    """A tile's side: a power of two, of at least 16 for tensor cores."""
    return max(16, triton.next_power_of_2(width))


def stride_type(*widths: int) -> str:
    """Of strides in a signature: rows of 16 elements and their multiples start at multiples of 16."""
    return "i64:16" if all(width % 16 == 0 for width in widths) else "i64"


def check_tensors(description: KernelDescription, **tensors: Tensor) -> None:
    """Queries, keys and values must be as described.

    Args:
        tensors: `q` bhsd, `k` and `v` of four dimensions in the described layout; any of them.

    Raises:
        InputError: another dtype, rank or width, or a last dimension that is strided.
    """
    widths = {"v": value_width(description)}
    for name, tensor in tensors.items():
        width = widths.get(name, description.head_dim)
        if tensor.dim() != 4 or tensor.shape[3] != width:
            raise InputError(
                f"{name}: shape {tuple(tensor.shape)}, allowed: 4 dimensions, last {width}"
            )
        if tensor.dtype != description.dtype:
            raise InputError(f"{name}: {tensor.dtype}, allowed: {description.dtype}")
        if tensor.stride(3) != 1:
            raise InputError(f"{name}: last stride {tensor.stride(3)}, allowed: 1")
    q, k = tensors.get("q"), tensors.get("k")
    if q is not None and k is not None and q.shape[1] != k.shape[1] * description.group_size:
        told = f"{q.shape[1]} query heads on {k.shape[1]} KV heads"
        raise InputError(f"{told}, allowed: {description.group_size} times as many")


def check_cache(
    description: KernelDescription,
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    index: Tensor,
    **integers: Tensor,
) -> None:
    """Everything must be there for every request, so that a kernel reads nothing outside.

    Contents are not looked at: lengths must not exceed the capacity, and pages must exist.

    Args:
        q: [batch_size, ...]; index: what the layout calls so.
        integers: of [batch_size] each.

    Raises:
        InputError: a tensor of another shape, or integers that are none.
    """
    batch_size, paged = q.shape[0], description.layout == "paged"
    if v is not None and v.shape[:3] != k.shape[:3]:
        raise InputError(f"v: shape {tuple(v.shape)}, allowed: {tuple(k.shape[:3])} and its width")
    if not paged and k.shape[0] != batch_size:
        raise InputError(f"k: {k.shape[0]} requests, allowed: {batch_size}, as q has")
    if paged and (index.shape[:-1] != (batch_size,) or k.shape[2] != description.page_size):
        told = f"block_table {tuple(index.shape)}, pages of {k.shape[2]}"
        raise InputError(f"{told}, allowed: ({batch_size}, pages), {description.page_size}")
    slots = ((batch_size, k.shape[2]), (batch_size, 1, k.shape[2]), (batch_size, *k.shape[1:3]))
    if description.layout == "slots" and tuple(index.shape) not in slots:
        raise InputError(f"k_positions: shape {tuple(index.shape)}, allowed: one of {slots}")
    for name, tensor in {"index": index, **integers}.items():
        if tensor.dtype not in (torch.int32, torch.int64):
            raise InputError(f"{name}: {tensor.dtype}, allowed: int32 or int64")
    for name, tensor in integers.items():
        if tuple(tensor.shape) != (batch_size,) or not tensor.is_contiguous():
            raise InputError(f"{name}: shape {tuple(tensor.shape)}, allowed: ({batch_size},)")


def query_positions(q: Tensor, given: Tensor | None, kv_len: int) -> Tensor:
    """Contiguous int64 [batch_size, q_len]; None = the queries are the last of kv_len entries.

    Raises:
        InputError: a shape that does not fit the queries.
    """
    shape = (q.shape[0], q.shape[2])
    if given is None:
        last = torch.arange(kv_len - q.shape[2], kv_len, device=q.device)
        return last.expand(shape).contiguous()
    if tuple(given.shape) != shape or given.dtype not in (torch.int32, torch.int64):
        told = f"{given.dtype} {tuple(given.shape)}"
        raise InputError(f"q_positions: {told}, allowed: int32 or int64 {shape}")
    return given.contiguous()


def visible_entries(description: KernelDescription, kv_len: int) -> int:
    """How many of kv_len contiguous entries the last token sees at most."""
    limits = {
        "sliding_window": description.span,
        "chunked": description.span,
        "local": description.span + 1,
        "sinks_window": description.span + description.num_sink_tokens,
    }
    return min(kv_len, limits.get(description.mask, kv_len))
