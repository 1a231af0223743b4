"""Exported decoders in ONNX Runtime: NumPy, `onnx`, `onnxruntime` and `tokenizers`, but no PyTorch."""

from __future__ import annotations

from rewriter.deploy.decoder import OnnxDecoder
from rewriter.deploy.generation import Generated, Piece
from rewriter.deploy.options import Options
from rewriter.deploy.session import OnnxSession

__all__ = ["Generated", "OnnxDecoder", "OnnxSession", "Options", "Piece"]
