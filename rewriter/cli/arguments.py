"""Arguments of the commands that need more than a type."""

from __future__ import annotations

import contextlib
import importlib.util
import tempfile
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rewriter.errors import ConfigError

if TYPE_CHECKING:  # commands that need no PyTorch start without it
    import torch
    from torch import Tensor

__all__ = ["check_file", "costed", "examples", "parse_dtype", "parse_ids"]

COSTS = ("none", "roofline", "learned")
DTYPES = ("float32", "bfloat16", "float16")


def check_file(path: Path, field: str = "html") -> None:
    """A file that can be written, before the long work starts. Raises ConfigError."""
    parent = path.absolute().parent
    if path.is_dir() or not parent.is_dir():
        raise ConfigError(field, str(path), "a file in an existing directory")
    try:
        with tempfile.TemporaryDirectory(dir=parent):
            return
    except OSError as error:
        raise ConfigError(field, str(path), f"a writable file ({error.strerror})") from error


def costed(name: str) -> AbstractContextManager[Any]:
    """`rewriter.cost.costing` with the model of this name, or nothing for "none". Raises ConfigError."""
    if name not in COSTS:
        raise ConfigError("cost", name, f"one of {', '.join(COSTS)}")
    if name == "none":
        return contextlib.nullcontext()
    from rewriter.cost import costing

    if name == "roofline":
        from rewriter.cost.roofline import Roofline

        return costing(Roofline())
    if importlib.util.find_spec("lightgbm") is None:
        raise ConfigError(
            "cost", name, "none or roofline; learned needs pip install 'rewriter[ir]'"
        )
    from ir_dataset.cost_models.alternatives import LearnedModel

    return costing(LearnedModel.load())


def examples(shapes: list[str] | None) -> tuple[Tensor, ...] | None:
    """Random fp32 inputs of shapes like `1x3x224x224`. Raises ConfigError."""
    if not shapes:
        return None
    return tuple(_example(text) for text in shapes)


def _example(text: str) -> Tensor:
    parts = text.lower().split("x")
    if not all(part.isdecimal() and int(part) for part in parts):
        raise ConfigError("input-shape", text, "positive integers joined by x, e.g. 1x3x224x224")
    import torch

    return torch.randn(*(int(part) for part in parts))


def parse_ids(text: str | None) -> list[int] | None:
    """Token ids from "1 2 3" or "1,2,3". Raises ConfigError."""
    if text is None:
        return None
    parts = text.replace(",", " ").split()
    if not parts or not all(part.isdecimal() for part in parts):
        raise ConfigError("prompt-ids", text, "token ids, e.g. '1 2 3'")
    return [int(part) for part in parts]


def parse_dtype(text: str | None) -> torch.dtype | None:
    """A dtype by its name; None stays None. Raises ConfigError."""
    if text is not None and text not in DTYPES:
        raise ConfigError("dtype", text, f"one of {', '.join(DTYPES)}")
    import torch

    return None if text is None else getattr(torch, text)
