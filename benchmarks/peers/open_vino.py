"""OpenVINO: the Hugging Face model converted with keys and values as state of the model.

int8 compresses the weights with NNCF: one scale for each output channel. float32 and bfloat16 keep
keys and values in the dtype of the weights; with int8 they are what the CPU plugin takes by default.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from peers.llama import stored_config
from peers.peer import Facts, Unavailable, prepared

__all__ = ["load", "prepare"]

OWN_PRECISIONS = {"float32": "f32", "bfloat16": "bf16"}
ENTRY_BYTES = {"f32": 4, "bf16": 2, "f16": 2, "u8": 1}


def prepare(model_dir: Path, dtype: str) -> None:
    """Convert. Raises Unavailable."""
    try:
        import openvino  # noqa: F401

        if dtype == "int8":
            import nncf  # noqa: F401
    except ImportError as error:
        raise Unavailable(f"needs openvino, and nncf for int8: {error}") from error
    prepared(_directory(model_dir, dtype), lambda path: _convert(model_dir, path, dtype))


def load(model_dir: Path, dtype: str, threads: int) -> OpenVino:
    """Compile for the CPU plugin."""
    return OpenVino(_directory(model_dir, dtype), dtype, threads)


def _directory(model_dir: Path, dtype: str) -> Path:
    return model_dir.with_name(f"{model_dir.name}-openvino-{dtype}")


class OpenVino:
    """An inference request whose state is the cache."""

    def __init__(self, directory: Path, dtype: str, threads: int) -> None:
        import openvino

        core: Any = openvino.Core()
        model = core.read_model(directory / "model.xml")
        options: dict[str, Any] = {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1}
        if dtype in OWN_PRECISIONS:
            precision = OWN_PRECISIONS[dtype]
            options |= {"INFERENCE_PRECISION_HINT": precision, "KV_CACHE_PRECISION": precision}
        compiled = core.compile_model(model, "CPU", {**options, "PERFORMANCE_HINT": "LATENCY"})
        self._request: Any = compiled.create_infer_request()
        self._beams = np.zeros(1, np.int32)
        kept = compiled.get_property("KV_CACHE_PRECISION").to_string()
        activations = compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
        shape = stored_config(directory.with_name("model"))
        entries = 2 * shape["num_key_value_heads"] * shape["head_dim"] * shape["num_hidden_layers"]
        self.facts = Facts(
            # the file holds fp32; the plugin rounds the matrices when it compiles
            weight_bytes=_weight_bytes(model) // (2 if dtype == "bfloat16" else 1),
            entry_bytes=entries * ENTRY_BYTES[kept],
            settings=f"weights {dtype}, activations {activations}, keys and values {kept}",
            versions={"openvino": openvino.__version__},
        )

    def prefill(self, tokens: Sequence[int], capacity: int) -> Any:
        self._request.reset_state()
        return self._feed(tokens)

    def step(self, token: int) -> Any:
        return self._feed([token])

    def _feed(self, tokens: Sequence[int]) -> Any:
        outputs = self._request.infer({0: np.array([tokens], np.int64), 1: self._beams})
        return outputs[0][0, -1]


def _convert(model_dir: Path, directory: Path, dtype: str) -> None:
    import openvino

    from peers.hugging_face import read_model

    original = read_model(model_dir).float()  # a bfloat16 trace gives wrong logits
    model: Any = _stateful(original)
    if dtype == "int8":
        import nncf

        model = nncf.compress_weights(model)
    openvino.save_model(model, directory / "model.xml", compress_to_fp16=False)


class WithEntries(nn.Module):
    """The model with keys and values as inputs and outputs, as OpenVINO makes states of them."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, beams: Tensor, *entries: Tensor) -> tuple[Tensor, ...]:
        """Entries are keys and values of each layer in turn, [1, num_kv_heads, kv_len, head_dim].

        The CPU plugin fuses the cache with attention where a gather over beams stands between.
        """
        cache: Any = DynamicCache(config=self.model.config)
        for layer, keys, values in zip(cache.layers, entries[::2], entries[1::2], strict=True):
            layer.lazy_initialization(keys, values)
            layer.keys, layer.values = (e.index_select(0, beams) for e in (keys, values))
        kept, new = entries[0].shape[2], input_ids.shape[1]
        positions = kept + torch.arange(new)
        later = torch.arange(kept + new)[None] > positions[:, None]
        dtype = entries[0].dtype
        outputs = self.model(
            input_ids,
            attention_mask=(later.to(dtype) * torch.finfo(dtype).min)[None, None],
            position_ids=positions[None],
            past_key_values=cache,
            logits_to_keep=1,
        )
        return (outputs.logits, *(e for layer in cache.layers for e in (layer.keys, layer.values)))


@torch.no_grad()
def _stateful(original: Any) -> Any:
    """An OpenVINO model with inputs `input_ids` and `beams` and one state for each entry."""
    import openvino
    from openvino._offline_transformations import apply_make_stateful_transformation

    config = original.config
    shape = (1, config.num_key_value_heads, 3, config.head_dim)
    entries = [torch.zeros(shape, dtype=original.dtype)] * (2 * config.num_hidden_layers)
    example = (torch.tensor([[1, 2, 3]]), torch.zeros(1, dtype=torch.int32), *entries)
    model: Any = openvino.convert_model(WithEntries(original), example_input=example)
    names = dict[str, str]()
    for i in range(len(entries)):
        model.inputs[2 + i].get_tensor().set_names({f"past.{i}"})
        model.outputs[1 + i].get_tensor().set_names({f"present.{i}"})
        _set_shape(model.inputs[2 + i], [-1, shape[1], -1, shape[3]])
        names[f"past.{i}"] = f"present.{i}"
    _set_shape(model.inputs[0], [-1, -1])
    _set_shape(model.inputs[1], [-1])
    model.validate_nodes_and_infer_types()
    apply_make_stateful_transformation(model, names)
    _start_empty(model, shape)
    return model


def _set_shape(port: Any, sizes: list[int]) -> None:
    from openvino import PartialShape

    port.get_node().set_partial_shape(PartialShape(sizes))


def _start_empty(model: Any, shape: tuple[int, ...]) -> None:
    """Every state starts with no entry; the plugin asks for a way to make one."""
    from openvino import opset13 as ops

    batch = ops.gather(ops.shape_of(model.inputs[0]), ops.constant([0]), ops.constant(0))
    sizes = [batch, ops.constant([shape[1]]), ops.constant([0]), ops.constant([shape[3]])]
    for node in model.get_ops():
        if node.get_type_name() == "ReadValue":
            zero = ops.constant(0.0, dtype=node.get_output_element_type(0))
            node.set_arguments([ops.broadcast(zero, ops.concat(sizes, 0))])
    model.validate_nodes_and_infer_types()


def _weight_bytes(model: Any) -> int:
    """Of all constants but those that are only looked up in."""
    constants = [node for node in model.get_ops() if node.get_type_name() == "Constant"]
    return sum(node.get_byte_size() for node in constants if _readers(node) - {"Gather"})


def _readers(node: Any) -> set[str]:
    """Types of the operations that use a constant, behind its decompression."""
    found = set[str]()
    for output in node.outputs():
        for target in output.get_target_inputs():
            reader = target.get_node()
            found |= _readers(reader) if _is_constant(reader) else {reader.get_type_name()}
    return found


def _is_constant(node: Any) -> bool:
    sources = [value.get_source_output().get_node() for value in node.inputs()]
    return node.get_type_name() == "Constant" or (bool(sources) and all(map(_is_constant, sources)))
