"""ONNX Runtime: the graph of onnxruntime-genai's model builder, run by onnxruntime-genai.

int8 is the builder's own: MatMulNBits with 8 bits, blocks of 32 weights that share a scale.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from peers.llama import stored_config
from peers.peer import Facts, Unavailable, prepared

__all__ = ["load", "prepare"]

PRECISIONS = {"float32": "fp32", "bfloat16": "bf16", "int8": "int8"}


def prepare(model_dir: Path, dtype: str) -> None:
    """Build the graph. Raises Unavailable."""
    try:
        import onnxruntime_genai  # noqa: F401
    except ImportError as error:
        raise Unavailable(f"needs onnxruntime-genai: {error}") from error
    prepared(_directory(model_dir, dtype), lambda path: _build(model_dir, path, dtype))


def load(model_dir: Path, dtype: str, threads: int) -> OnnxRuntime:
    """Raises Unavailable where the CPU provider lacks kernels."""
    return OnnxRuntime(_directory(model_dir, dtype), dtype, threads)


def _directory(model_dir: Path, dtype: str) -> Path:
    return model_dir.with_name(f"{model_dir.name}-ort-{PRECISIONS[dtype]}")


def _build(model_dir: Path, directory: Path, dtype: str) -> None:
    """Through its command line, which is what its documentation shows."""
    builder = [
        sys.executable,
        "-m",
        "onnxruntime_genai.models.builder",
        "--execution_provider",
        "cpu",
    ]
    paths = ["--input", str(model_dir), "--output", str(directory), "--cache_dir", str(directory)]
    subprocess.run([*builder, *paths, "--precision", PRECISIONS[dtype]], check=True)


class OnnxRuntime:
    """A generator of onnxruntime-genai, fed token by token."""

    def __init__(self, directory: Path, dtype: str, threads: int) -> None:
        import onnxruntime
        import onnxruntime_genai

        self._api: Any = onnxruntime_genai
        session = {"intra_op_num_threads": threads}
        config = self._api.Config(str(directory))
        config.overlay(json.dumps({"model": {"decoder": {"session_options": session}}}))
        try:
            self._model = self._api.Model(config)
        except RuntimeError as error:
            raise Unavailable(str(error).splitlines()[0][:300]) from error
        shape = stored_config(directory.with_name("model"))
        entries = 2 * shape["num_key_value_heads"] * shape["head_dim"] * shape["num_hidden_layers"]
        self.facts = Facts(
            weight_bytes=_weight_bytes(directory / "model.onnx"),
            entry_bytes=entries * (2 if dtype == "bfloat16" else 4),
            settings=f"onnxruntime-genai, model builder --precision {PRECISIONS[dtype]}",
            versions={
                "onnxruntime": onnxruntime.__version__,
                "onnxruntime-genai": onnxruntime_genai.__version__,
            },
        )

    def prefill(self, tokens: Sequence[int], capacity: int) -> Any:
        parameters = self._api.GeneratorParams(self._model)
        parameters.set_search_options(max_length=capacity, do_sample=False)
        self._generator = self._api.Generator(self._model, parameters)
        self._generator.append_tokens(np.array([tokens], dtype=np.int32))
        return self._generator.get_logits()[0, -1]

    def step(self, token: int) -> Any:
        self._generator.append_tokens(np.array([[token]], dtype=np.int32))
        return self._generator.get_logits()[0, -1]


def _weight_bytes(path: Path) -> int:
    """Of all stored tensors but those that are only looked up in."""
    import onnx

    graph = onnx.load(path, load_external_data=False).graph
    read = {name for node in graph.node if node.op_type != "Gather" for name in node.input}
    tables = {"cos_cache", "sin_cache"}
    used = [t for t in graph.initializer if t.name in read - tables]
    return sum(_stored_bytes(tensor) for tensor in used)


def _stored_bytes(tensor: Any) -> int:
    length = [entry.value for entry in tensor.external_data if entry.key == "length"]
    return int(length[0]) if length else len(tensor.raw_data)
