"""PyTorch's own exporter: Hugging Face's model with its cache, in ONNX Runtime with all its rewrites."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from peers.hugging_face import llama_facts, read_model
from peers.peer import Unavailable, prepared

__all__ = ["load"]


def load(model_dir: Path, dtype: str, threads: int) -> TorchOnnx:
    """Raises Unavailable for dtypes that ONNX Runtime has no CPU kernels for."""
    if dtype != "float32":
        raise Unavailable(f"the exporter keeps the dtype, and the CPU provider has no {dtype}")
    directory = model_dir.with_name(f"{model_dir.name}-torch-onnx-{torch.__version__}")
    prepared(directory, lambda path: _export(model_dir, path / "model.onnx"))
    return TorchOnnx(model_dir, directory / "model.onnx", threads)


class _WithCache(nn.Module):
    """Keys and values as plain inputs and outputs."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, position_ids: Tensor, past: list[Tensor]) -> Any:
        cache = DynamicCache()
        for layer in range(len(past) // 2):
            cache.update(past[2 * layer], past[2 * layer + 1], layer)
        out = self.model(
            input_ids, position_ids=position_ids, past_key_values=cache, logits_to_keep=1
        )
        return out.logits, [t for layer in cache.layers for t in (layer.keys, layer.values)]


@torch.no_grad()
def _export(model_dir: Path, path: Path) -> None:
    model = read_model(model_dir)
    config: Any = model.config
    shape = (1, config.num_key_value_heads, 5, config.head_dim)
    past = [torch.zeros(shape) for _ in range(2 * config.num_hidden_layers)]
    ids = torch.arange(3).view(1, -1)
    new, old = torch.export.Dim("q_len", min=1, max=4095), torch.export.Dim("past", min=1, max=4095)
    torch.onnx.export(
        _WithCache(model),
        (ids, ids + 5, past),
        path,
        dynamo=True,
        external_data=True,
        dynamic_shapes=({1: new}, {1: new}, [{2: old} for _ in past]),
    )


class TorchOnnx:
    """Outputs are bound, so that state is not copied through NumPy."""

    def __init__(self, model_dir: Path, path: Path, threads: int) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
        providers = ["CPUExecutionProvider"]
        self._session = onnxruntime.InferenceSession(str(path), options, providers=providers)
        self._inputs = [value.name for value in self._session.get_inputs()]
        self._outputs = [value.name for value in self._session.get_outputs()]
        self._shape = [
            self._session.get_inputs()[2].shape[1],
            self._session.get_inputs()[2].shape[3],
        ]
        self.facts = llama_facts(read_model(model_dir), "torch.onnx.export dynamo, ORT_ENABLE_ALL")

    def prefill(self, tokens: Sequence[int], capacity: int) -> Any:
        heads, width = self._shape
        empty = np.zeros((1, heads, 0, width), np.float32)
        self._past = [onnxruntime.OrtValue.ortvalue_from_numpy(empty)] * (len(self._inputs) - 2)
        self._entries = 0
        return self._run(np.array([tokens], np.int64))

    def step(self, token: int) -> Any:
        return self._run(np.array([[token]], np.int64))

    def _run(self, ids: np.ndarray) -> Any:
        binding = self._session.io_binding()
        positions = np.arange(self._entries, self._entries + ids.shape[1], dtype=np.int64)[None]
        binding.bind_cpu_input(self._inputs[0], ids)
        binding.bind_cpu_input(self._inputs[1], positions)
        for name, value in zip(self._inputs[2:], self._past, strict=True):
            binding.bind_ortvalue_input(name, value)
        for name in self._outputs:
            binding.bind_output(name)
        self._session.run_with_iobinding(binding)
        logits, *self._past = binding.get_outputs()
        self._entries += ids.shape[1]
        return logits.numpy()[0, -1]
