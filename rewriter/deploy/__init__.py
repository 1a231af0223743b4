"""Exported decoders in ONNX Runtime: NumPy, `onnx`, `onnxruntime` and `tokenizers`, but no PyTorch."""

from __future__ import annotations

from rewriter.deploy.decoder import Generated, OnnxDecoder, Piece
from rewriter.deploy.sampling import Sampling
from rewriter.deploy.session import OnnxSession

__all__ = ["Generated", "OnnxDecoder", "OnnxSession", "Piece", "Sampling"]
