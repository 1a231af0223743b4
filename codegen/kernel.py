"""What a kernel is asked for, what a kernel is, and the one rule by which one is selected."""

from __future__ import annotations

import keyword
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import ClassVar

import torch

from codegen.epilogue import Epilogue
from rewriter.errors import ConfigError

__all__ = ["Kernel", "KernelDescription", "Selection", "dtype_name", "safe_name", "select"]


@dataclass(frozen=True, kw_only=True)
class KernelDescription:
    """Everything a kernel's text is specialised to. What is not in here is an argument at run time.

    Attributes:
        operator: e.g. `"decode_attention"`, `"gemv"`.
        dtype: of activations and outputs.
        weight_dtype: of weights or cached entries, where it differs from `dtype`.
        head_dim, value_dim: widths of keys and of values (the same unless given).
        group_size: query heads on one KV head.
        mask, span: structure of an attention mask, as in `rewriter::attention`; `"sinks_window"` sees
            the first `num_sink_tokens` and the last `span` entries.
        num_sink_tokens: entries at the start that are always visible.
        layout: of cached entries: `"bhsd"`, `"slots"` (any order, positions beside them) or `"paged"`.
        page_size: entries of a page.
        softcap: 0 for none.
        terms: what joins an attention's scores besides its mask: of `"bias"` (added) or `"seen"` (a
            bias of bool, True = visible), `"sinks"` and `"slopes"`.
        form: a variant of the operator, e.g. `"top_k"` or `"threshold"`.
        epilogue: pointwise work on the result before it is stored.
    """

    operator: str
    dtype: torch.dtype = torch.float32
    weight_dtype: torch.dtype | None = None
    head_dim: int = 0
    value_dim: int = 0
    group_size: int = 1
    mask: str = "full"
    span: int = 0
    num_sink_tokens: int = 0
    layout: str = "bhsd"
    page_size: int = 0
    softcap: float = 0.0
    terms: tuple[str, ...] = ()
    form: str = ""
    epilogue: Epilogue | None = None

    def __str__(self) -> str:
        """What differs from the defaults, as `operator{head_dim=64,dtype=bfloat16}`."""
        told = {
            field.name: getattr(self, field.name)
            for field in fields(self)
            if field.name != "operator" and getattr(self, field.name) != field.default
        }
        shown = ",".join(f"{name}={_shown(value)}" for name, value in told.items())
        return f"{self.operator}{{{shown}}}"


class Kernel(ABC):
    """A generator of kernels for one operator on one backend. Stateless; one instance in a table."""

    operator: ClassVar[str]
    backend: ClassVar[str]
    """`"cpu"` or `"triton"`."""

    @abstractmethod
    def supports(self, description: KernelDescription) -> str | None:
        """Why this kernel cannot do what is described, naming field, value and what is allowed; or None."""

    @abstractmethod
    def source(self, description: KernelDescription) -> str:
        """Readable, self-contained text of the kernel; the same description gives the same text."""


@dataclass(frozen=True)
class Selection:
    """The kernel that was taken, and why."""

    kernel: Kernel
    reason: str


def select(
    description: KernelDescription, kernels: Iterable[Kernel], backend: str = "auto"
) -> Selection:
    """One rule: an explicit backend or raise; `auto` takes the first kernel that supports it.

    Raises:
        ConfigError: no kernel can do it; lists what each one said.
    """
    refusals = []
    for kernel in kernels:
        if kernel.operator != description.operator or backend not in ("auto", kernel.backend):
            continue
        refusal = kernel.supports(description)
        if refusal is None:
            asked = "asked for" if backend != "auto" else "auto: the first that supports it"
            return Selection(kernel, f"{kernel.backend}: {asked}")
        refusals.append(f"{kernel.backend}: {refusal}")
    why = "; ".join(refusals) or "there is none of this operator"
    raise ConfigError("backend", backend, f"no kernel for {description}: {why}")


def dtype_name(dtype: torch.dtype) -> str:
    """`float32`, not `torch.float32`."""
    return str(dtype).removeprefix("torch.")


def safe_name(text: str) -> str:
    """A C and Python identifier from any text, so that nothing from a model gets into code.

    Letters, digits and single underscores are kept, at most 60 of them; before a digit and a keyword of
    either language stands `v_`.
    """
    kept = re.sub(r"[^0-9A-Za-z]+", "_", text).strip("_")[:60].rstrip("_")
    taken = keyword.iskeyword(kept) or keyword.issoftkeyword(kept) or kept in _CPP_KEYWORDS
    return kept if kept and not kept[0].isdigit() and not taken else f"v_{kept}"


_CPP_KEYWORDS = frozenset(
    """alignas alignof and and_eq asm auto bitand bitor bool break case catch char char16_t char32_t
    class compl const const_cast constexpr continue decltype default delete do double dynamic_cast else
    enum explicit export extern false float for friend goto if inline int long mutable namespace new
    noexcept not not_eq nullptr operator or or_eq private protected public register reinterpret_cast
    return short signed sizeof static static_assert static_cast struct switch template this thread_local
    throw true try typedef typeid typename union unsigned using virtual void volatile wchar_t while xor
    xor_eq""".split()
)
"""Of C++17, and with them those of C."""


def _shown(value: object) -> str:
    return dtype_name(value) if isinstance(value, torch.dtype) else str(value)
