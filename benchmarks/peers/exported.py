"""This project's ONNX files: `OptimizedModel.export`, run by `rewriter.deploy`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx

import rewriter
from codegen.cache import content_hash
from peers.hugging_face import read_model
from peers.peer import Facts, Unavailable, prepared
from peers.rewritten import INT8_PASS
from rewriter.deploy import OnnxDecoder
from rewriter.errors import ConfigError, ExportError

__all__ = ["load"]

LOOKUPS = ("Gather", "GatherND", "GroupQueryAttention", "RotaryEmbedding")
"""Operators whose stored inputs are tables."""
WRITERS = ("codegen/onnx_functions", "rewriter/export")


def load(model_dir: Path, dtype: str, threads: int, *, ep: str) -> Exported:
    """Export unless this code did so before. Raises Unavailable where that cannot be."""
    name = f"{model_dir.name}-rewriter-{ep}-{dtype}-{_code()}"
    directory = model_dir.with_name(name)
    try:
        prepared(directory, lambda path: _export(model_dir, dtype, ep, path / "model"))
    except (ConfigError, ExportError) as error:
        raise Unavailable(str(error)) from error
    return Exported(directory / "model", ep, threads)


def _code() -> str:
    """Changes with the text of what writes ONNX files."""
    root = Path(rewriter.__file__).parents[1]
    files = sorted(path for folder in WRITERS for path in (root / folder).glob("*.py"))
    return content_hash(*(path.read_text() for path in files))[:8]


def _export(model_dir: Path, dtype: str, ep: str, directory: Path) -> None:
    passes = ["default", INT8_PASS] if dtype == "int8" else ["default"]
    model = read_model(model_dir)
    optimized = rewriter.optimize(model, passes=passes, backend="eager", verify=False)
    optimized.export(directory, ep=ep)


class Exported:
    """A decoder in ONNX Runtime, state bound to its memory."""

    def __init__(self, directory: Path, ep: str, threads: int) -> None:
        self._decoder = OnnxDecoder(directory, threads=threads, check_data=False)
        metadata = self._decoder.metadata
        caches = [s for s in metadata["states"] if s["role"] in ("keys", "values")]
        per_entry = sum(s["dims"][1] * s["dims"][3] * _size(s["dtype"]) for s in caches)
        self.facts = Facts(
            weight_bytes=_weight_bytes(directory / "model.onnx"),
            entry_bytes=per_entry,
            settings=f"export ep={ep}: {_attentions(metadata['operators'])}",
            versions={"onnxruntime": metadata["versions"]["onnxruntime"]},
        )

    def prefill(self, tokens: Sequence[int], capacity: int) -> Any:
        self._session = self._decoder.session(1, capacity=capacity)
        return self._session.run(np.array([tokens], np.int64))[0, -1]

    def step(self, token: int) -> Any:
        return self._session.run(np.array([[token]], np.int64))[0, -1]


def _attentions(operators: dict[str, int]) -> str:
    return ", ".join(f"{n} {name}" for name, n in operators.items() if "Attention" in name)


def _size(dtype: str) -> int:
    return 2 if dtype in ("bfloat16", "float16") else 4


def _weight_bytes(path: Path) -> int:
    """Of all stored tensors but those that are only looked up in."""
    graph = onnx.load(path, load_external_data=False).graph
    read = {name for node in graph.node if node.op_type not in LOOKUPS for name in node.input}
    used = [tensor for tensor in graph.initializer if tensor.name in read]
    return sum(int(e.value) for tensor in used for e in tensor.external_data if e.key == "length")
