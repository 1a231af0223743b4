"""The texts of this project's own kernels, over the configurations that a corpus wants of each.

Every kernel is asked what it supports, over one grid of descriptions; so a kernel that comes later is
there without a line here.
"""

from __future__ import annotations

import importlib
import itertools
import pkgutil
from collections.abc import Iterator, Sequence
from typing import Any

__all__ = ["cpp_texts", "triton_texts"]

_FORMS = (
    *("", "row", "rows", "top_k", "threshold", "residual", "wide", "halves", "half", "interleaved"),
    *(
        "match",
        "elu",
        "max",
        "mean",
        "largest",
        "sum",
        "chosen",
        "rotary",
        "chosen+rotary",
        "2",
        "4",
    ),
    *(
        "silu",
        "gelu_tanh",
        "relu",
        "silu:indices",
        "relu:indices32",
        "silu:top_k",
        "relu:threshold",
    ),
)


def triton_texts(per_operator: int) -> dict[str, str]:
    """Python text of Triton kernels by file name, at most so many of each operator."""
    from codegen.triton_kernels.table import KERNELS

    return dict(_texts(KERNELS, per_operator, ".py"))


def cpp_texts(per_operator: int) -> dict[str, str]:
    """C++ text of CPU kernels, headers inlined, by file name."""
    import codegen.cpp_kernels as folder
    from codegen.kernel import Kernel

    kinds = set()
    for found in pkgutil.iter_modules(folder.__path__):
        module = importlib.import_module(f"{folder.__name__}.{found.name}")
        kinds |= {
            value
            for value in vars(module).values()
            if isinstance(value, type)
            and issubclass(value, Kernel)
            and value.__module__ == module.__name__
        }
    kernels = [kind() for kind in sorted(kinds, key=lambda kind: (kind.operator, kind.__name__))]
    return dict(_texts(kernels, per_operator, ".cpp"))


def _texts(kernels: Sequence[Any], per_operator: int, suffix: str) -> Iterator[tuple[str, str]]:
    for kernel in kernels:
        seen: set[str] = set()
        for description in _spread(
            [one for one in _descriptions(kernel.operator) if kernel.supports(one) is None],
            per_operator,
        ):
            text = kernel.source(description)
            if text not in seen:
                yield f"{kernel.operator}_{len(seen):02d}{suffix}", text
                seen.add(text)


def _descriptions(operator: str) -> list[Any]:
    """The grid. Fields that a kernel has no use for are fixed by `supports` or give the same text."""
    import torch

    from codegen.epilogue import Epilogue, Operand, Step
    from codegen.kernel import KernelDescription
    from codegen.triton_kernels.gated_activation import ACTIVATIONS

    half = torch.bfloat16
    added = Epilogue(
        (Step("add", ("value", "element_0")),), (Operand("element_0", "element", half),)
    )
    attention = "attention" in operator or operator in (
        "page_scores",
        "column_sums",
        "shared_prefix",
    )
    grid = {
        "form": _FORMS,
        "dtype": (half, torch.float32),
        "weight_dtype": (None,) if attention else (None, torch.float32, torch.int8),
        "head_dim": (64, 128, 4096, 16384) if operator == "rms_norm" else (64, 128),
        "group_size": (1, 4) if attention else (1,),
        "mask": ("causal", "sliding_window", "full") if attention else ("full",),
        "layout": ("bhsd", "paged", "slots") if attention else ("bhsd",),
        "softcap": (0.0, 50.0) if attention else (0.0,),
        "terms": ((), ("bias", "sinks", "slopes")) if attention else ((),),
        "epilogue": (None, added, ACTIVATIONS["silu"], ACTIVATIONS["gelu_tanh"]),
    }
    descriptions = []
    for values in itertools.product(*grid.values()):
        fields: dict[str, Any] = dict(zip(grid, values, strict=True))
        span = 4096 if fields["mask"] == "sliding_window" else 0
        if operator == "rotary_append":
            span = fields["head_dim"]
        pages = 16 if fields["layout"] == "paged" or operator == "page_scores" else 0
        descriptions.append(
            KernelDescription(operator=operator, span=span, page_size=pages, **fields)
        )
    return descriptions


def _spread(items: list[Any], count: int) -> list[Any]:
    """At most `count`, from all over the list."""
    step = max(1, len(items) // count)
    return items[::step][:count]
