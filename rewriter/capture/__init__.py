"""From a model to a `Program`: tracing once, on dynamic shapes, without touching the model."""

from rewriter.capture.causal_lm import capture_causal_lm, is_causal_lm
from rewriter.capture.module import capture
from rewriter.capture.sources import load_model

__all__ = ["capture", "capture_causal_lm", "is_causal_lm", "load_model"]
