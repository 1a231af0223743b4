"""A graph-rewriting optimizer for PyTorch models that checks every rewrite it ships."""

from rewriter.api import explain, list_passes, load, optimize
from rewriter.engine.miss import Miss
from rewriter.errors import (
    ArtifactError,
    CaptureError,
    ConfigError,
    InputError,
    ModelError,
    RewriteError,
    RewriterError,
    VerificationError,
)
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
