"""A graph-rewriting optimizer for PyTorch models that checks every rewrite it ships.

Names are imported when they are asked for: `rewriter.deploy` runs exported models without PyTorch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from rewriter.errors import (
    ArtifactError,
    CaptureError,
    ConfigError,
    ExportError,
    InputError,
    ModelError,
    RewriteError,
    RewriterError,
    VerificationError,
)

if TYPE_CHECKING:
    from rewriter.api import explain, list_passes, load, optimize
    from rewriter.engine.miss import Miss
    from rewriter.optimized import OptimizedModel
    from rewriter.report.report import Report
    from rewriter.verify.certificate import Certificate
    from rewriter.verify.verification import Verification

__version__ = "0.1.0"

__all__ = [
    "ArtifactError",
    "CaptureError",
    "Certificate",
    "ConfigError",
    "ExportError",
    "InputError",
    "Miss",
    "ModelError",
    "OptimizedModel",
    "Report",
    "RewriteError",
    "RewriterError",
    "Verification",
    "VerificationError",
    "__version__",
    "explain",
    "list_passes",
    "load",
    "optimize",
]

_HOMES = {
    **dict.fromkeys(("explain", "list_passes", "load", "optimize"), "rewriter.api"),
    "Certificate": "rewriter.verify.certificate",
    "Miss": "rewriter.engine.miss",
    "OptimizedModel": "rewriter.optimized",
    "Report": "rewriter.report.report",
    "Verification": "rewriter.verify.verification",
}
"""The module of each name that needs PyTorch."""


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
