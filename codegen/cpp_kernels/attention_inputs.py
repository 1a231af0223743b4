"""Tensors of an attention over cached entries, checked and told as the arguments of the C entry point."""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor

from codegen.kernel import KernelDescription, dtype_name
from rewriter.dialect.attention import MASKS
from rewriter.errors import InputError

__all__ = ["AttentionInputs", "element_type", "refuse", "unsupported", "value_width"]

_ELEMENTS = {torch.float32: "float", torch.bfloat16: "rw::bf16"}
Values = dict[str, Tensor | float | None]


def element_type(dtype: torch.dtype) -> str:
    """The name of a dtype in C++."""
    return _ELEMENTS[dtype]


def value_width(description: KernelDescription) -> int:
    """Width of values: that of keys unless told."""
    return description.value_dim or description.head_dim


def unsupported(description: KernelDescription) -> str | None:
    """Why these dtypes, widths, layout or mask cannot be had on a CPU; None where they can."""
    d = description
    for field, dtype in (("dtype", d.dtype), ("weight_dtype", d.weight_dtype)):
        if dtype is not None and dtype not in _ELEMENTS:
            return f"{field}={dtype_name(dtype)}: float32 or bfloat16"
    for field, width in (("head_dim", d.head_dim), ("value_dim", value_width(d))):
        if not 1 <= width <= 1024:
            return f"{field}={width}: from 1 to 1024"
    if d.layout not in ("bhsd", "slots", "paged"):
        return f"layout={d.layout!r}: bhsd, slots or paged"
    if d.mask not in (*MASKS, "sinks_window"):
        return f"mask={d.mask!r}: one of {', '.join((*MASKS, 'sinks_window'))}"
    if d.epilogue is not None:
        return "epilogue: none"
    return None


def refuse(name: str, tensor: Tensor, allowed: str) -> NoReturn:
    """Raise InputError for a tensor, told by shape and dtype."""
    told = f"{tuple(tensor.shape)} {dtype_name(tensor.dtype)} on {tensor.device}"
    raise InputError(f"{name}={told} is not allowed: {allowed}")


class AttentionInputs:
    """Queries and a cache that fit each other; gives C arguments, and keeps alive what they point to.

    Raises:
        InputError: a tensor of another shape, dtype or device than described.
    """

    def __init__(
        self,
        description: KernelDescription,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        block_table: Tensor | None,
        index: Tensor | None,
    ) -> None:
        self.paged = description.layout == "paged"
        chosen = description.form.startswith("chosen")
        entry = description.weight_dtype or description.dtype
        self.q = _checked("q", q, description.dtype, description.head_dim)
        self.k = _checked("k", k, entry, description.head_dim)
        self.v = _checked("v", v, entry, value_width(description))
        self.batch_size, num_heads, self.q_len, _ = q.shape
        self.num_heads, self.num_kv_heads = num_heads, k.shape[1]
        if k.shape[:3] != v.shape[:3]:
            refuse("v", v, f"batch, heads and entries of k, {tuple(k.shape[:3])}")
        other_batch = not self.paged and k.shape[0] != self.batch_size
        if num_heads % max(self.num_kv_heads, 1) or other_batch:
            refuse("k", k, f"batch_size {self.batch_size} and a divisor of {num_heads} heads")
        self.group_size = num_heads // max(self.num_kv_heads, 1)
        self.index = block_table if self.paged else index
        name = "block_table" if self.paged else "index"
        if (self.index is None) == (self.paged or chosen):
            raise InputError(f"{name} is not allowed: one with pages or form chosen, none without")
        self.kv_len = k.shape[2]
        if self.index is not None:
            heads = () if self.paged else (self.num_kv_heads,)
            chosen = _numbers(name, self.index, (self.batch_size, *heads), None)
            _check_range(name, chosen, k.shape[0] if self.paged else k.shape[2])
            self.index = chosen
            self.kv_len = chosen.shape[-1] * (k.shape[2] if self.paged else 1)

    def cache(self) -> Values:
        """q, k, v, what chooses their entries, and their shapes and strides."""
        self.wide = self.q.float().contiguous()
        k, v, at = self.k.stride(), self.v.stride(), self.index
        shape = {
            "batch_size": self.batch_size,
            "num_kv_heads": self.num_kv_heads,
            "group_size": self.group_size,
            "q_len": self.q_len,
            "kv_len": self.kv_len,
            "page_size": self.k.shape[2],
        }
        strides = {
            **{f"k_{n}": s for n, s in zip(("batch", "head", "entry"), k[:3], strict=True)},
            **{f"v_{n}": s for n, s in zip(("batch", "head", "entry"), v[:3], strict=True)},
        }
        chosen: Values = {}
        if at is not None:
            chosen = {"index": at, "index_batch": at.stride(0)}
            if not self.paged:
                chosen["index_head"] = at.stride(1)
        return {"q": self.wide, "k": self.k, "v": self.v, **shape, **strides, **chosen}

    def positions(
        self,
        q_positions: Tensor | None,
        k_positions: Tensor | None,
        kv_lens: Tensor | None,
        distance: Tensor | None,
    ) -> Values:
        """Where queries and entries stand."""
        values: Values = {}
        if kv_lens is not None and q_positions is None:
            raise InputError("kv_lens is not allowed: only with q_positions")
        if q_positions is not None:
            at = _numbers("q_positions", q_positions, (self.batch_size,), self.q_len)
            values |= {"q_positions": at, "q_positions_batch": at.stride(0)}
        if k_positions is not None:
            if k_positions.dim() == 2:
                k_positions = k_positions.unsqueeze(1)
            lead = (self.batch_size, self.num_kv_heads)
            at = _numbers("k_positions", k_positions, lead, self.kv_len)
            values |= {
                "k_positions": at,
                "k_positions_batch": at.stride(0),
                "k_positions_head": at.stride(1),
            }
        if kv_lens is not None:
            values["kv_lens"] = _numbers("kv_lens", kv_lens, (), self.batch_size)
            _check_range("kv_lens", kv_lens, self.kv_len + 1)
        if distance is not None:
            at = _numbers("distance", distance, (self.batch_size, self.q_len), self.kv_len)
            values |= {
                "distance": at,
                "distance_batch": at.stride(0),
                "distance_row": at.stride(1),
            }
        return values

    def score_terms(
        self, bias: Tensor | None, sinks: Tensor | None, slopes: Tensor | None
    ) -> Values:
        """What is added to scores, and to their softmax."""
        values: Values = {}
        if bias is not None:
            name = "seen" if bias.dtype == torch.bool else "bias"
            bias = bias if name == "seen" else bias.float()
            try:
                bias = bias.expand(self.batch_size, self.num_heads, self.q_len, self.kv_len)
            except RuntimeError:
                refuse("bias", bias, "what broadcasts to [batch_size, num_heads, q_len, kv_len]")
            strides = zip(("batch", "head", "row", "entry"), bias.stride(), strict=True)
            values |= {name: bias, **{f"{name}_{n}": s for n, s in strides}}
        for name, tensor in (("sinks", sinks), ("slopes", slopes)):
            if tensor is not None:
                if tensor.shape != (self.num_heads,):
                    refuse(name, tensor, f"[{self.num_heads}], one number for each head")
                values[name] = tensor.float().contiguous()
        return values

    def tables(self, rotary: tuple[Tensor, Tensor] | None) -> Values:
        """cos and sin of the entries."""
        if rotary is None:
            return {}
        cos, sin = rotary
        if cos.shape != sin.shape or cos.dtype != torch.float32 or cos.shape[-2] != self.kv_len:
            refuse("rotary", cos, f"cos and sin alike, fp32 [.., {self.kv_len}, width / 2]")
        cos, sin = (t.contiguous().expand(self.batch_size, *t.shape[1:]) for t in (cos, sin))
        return {
            "cos": cos,
            "sin": sin,
            "table_batch": cos.stride(0),
            "table_entry": cos.stride(-2),
            "rotary_width": 2 * cos.shape[-1],
        }


def _checked(name: str, tensor: Tensor, dtype: torch.dtype, width: int) -> Tensor:
    """The tensor, copied only where its rows are not contiguous."""
    if tensor.dim() != 4 or tensor.dtype != dtype or tensor.shape[3] != width:
        refuse(name, tensor, f"four dimensions, the last one {width}, of {dtype_name(dtype)}")
    if tensor.device.type != "cpu":
        refuse(name, tensor, "on the CPU")
    return tensor if tensor.stride(3) == 1 or width == 1 else tensor.contiguous()


def _numbers(name: str, tensor: Tensor, lead: tuple[int, ...], last: int | None) -> Tensor:
    """int64 numbers with adjacent last dimension, the leading ones broadcast."""
    good = tensor.dtype == torch.int64 and tensor.dim() == len(lead) + 1
    good = good and last in (None, tensor.shape[-1])
    good = good and all(n in (1, m) for n, m in zip(tensor.shape, lead, strict=False))
    if not good or tensor.device.type != "cpu":
        shape = ", ".join(map(str, (*lead, last or "any")))
        refuse(name, tensor, f"int64 [{shape}] on the CPU")
    tensor = tensor if tensor.stride(-1) == 1 else tensor.contiguous()
    return tensor.expand(*lead, tensor.shape[-1])


def _check_range(name: str, tensor: Tensor, end: int) -> None:
    """Numbers below `end`: what lies beyond would be read all the same."""
    if tensor.numel() and not 0 <= int(tensor.min()) <= int(tensor.max()) < end:
        raise InputError(f"{name} in [{tensor.min()}, {tensor.max()}] is not allowed: [0, {end})")
