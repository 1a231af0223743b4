"""llama.cpp through llama-cpp-python, from a GGUF file written here.

float32 and bfloat16 keep keys and values in the dtype of the weights; with int8 (Q8_0: blocks of 32
weights with a half-precision scale) they are half precision, llama.cpp's default.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from peers.llama import stored_config, stored_tensors
from peers.peer import Facts, Unavailable, prepared

__all__ = ["load", "prepare"]

FILE_TYPES = {"float32": "F32", "bfloat16": "BF16", "int8": "Q8_0"}
ENTRY_TYPES = {"float32": "F32", "bfloat16": "BF16", "int8": "F16"}
PREFILL_CHUNK = 512
LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def prepare(model_dir: Path, dtype: str) -> None:
    """Write the GGUF file."""
    _require()
    prepared(_directory(model_dir, dtype), lambda path: _write(model_dir, path, FILE_TYPES[dtype]))


def load(model_dir: Path, dtype: str, threads: int) -> LlamaCpp:
    """Raises Unavailable."""
    _require()
    return LlamaCpp(model_dir, dtype, threads)


def _require() -> None:
    try:
        import gguf  # noqa: F401
        import llama_cpp  # noqa: F401
    except ImportError as error:
        raise Unavailable(f"needs llama-cpp-python and gguf: {error}") from error


def _directory(model_dir: Path, dtype: str) -> Path:
    return model_dir.with_name(f"{model_dir.name}-gguf-{FILE_TYPES[dtype].lower()}")


class LlamaCpp:
    """A llama.cpp context."""

    def __init__(self, model_dir: Path, dtype: str, threads: int) -> None:
        import gguf
        import llama_cpp

        self._api, self._threads = llama_cpp, threads
        config = stored_config(model_dir)
        self._vocab_size = config["vocab_size"]
        llama_cpp.llama_backend_init()
        path = _directory(model_dir, dtype) / "model.gguf"
        # mapped, weights would stay as in the file, without the faster layouts
        not_mapped = llama_cpp.LLAMA_LOAD_MODE_NONE
        parameters = _set(llama_cpp.llama_model_default_params(), load_mode=not_mapped)
        self._model: Any = llama_cpp.llama_model_load_from_file(str(path).encode(), parameters)
        if not self._model:
            raise Unavailable(f"llama.cpp could not read {path}; its log says why")
        self._entry_type = int(gguf.GGMLQuantizationType[ENTRY_TYPES[dtype]])
        # fused attention computes in half precision: 6e-3 off where the rest is 1e-5
        fused = llama_cpp.LLAMA_FLASH_ATTN_TYPE_AUTO
        plain = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self._fused_attention = plain if dtype == "float32" else fused
        self._context: Any = None
        size = {"F32": 4, "BF16": 2, "F16": 2}[ENTRY_TYPES[dtype]]
        per_layer = 2 * config["num_key_value_heads"] * config["head_dim"]
        self.facts = Facts(
            weight_bytes=llama_cpp.llama_model_size(self._model),
            entry_bytes=per_layer * config["num_hidden_layers"] * size,
            settings=f"weights {FILE_TYPES[dtype]}, keys and values {ENTRY_TYPES[dtype]}",
            versions={"llama-cpp-python": llama_cpp.__version__},
        )

    def prefill(self, tokens: Sequence[int], capacity: int) -> Any:
        if self._context:
            self._api.llama_free(self._context)
        parameters = _set(
            self._api.llama_context_default_params(),
            n_ctx=capacity,
            n_batch=PREFILL_CHUNK,
            n_threads=self._threads,
            n_threads_batch=self._threads,
            type_k=self._entry_type,
            type_v=self._entry_type,
            flash_attn_type=self._fused_attention,
        )
        self._context = self._api.llama_init_from_model(self._model, parameters)
        if not self._context:
            raise Unavailable("llama.cpp could not make a context; its log says why")
        *chunks, last = range(0, len(tokens), PREFILL_CHUNK)
        for first in chunks:
            self._decode(tokens[first : first + PREFILL_CHUNK])
        return self._decode(tokens[last:])

    def step(self, token: int) -> Any:
        return self._decode([token])

    def _decode(self, tokens: Sequence[int]) -> np.ndarray:
        """Logits behind the last token; llama.cpp's own memory, valid until the next call."""
        array = (self._api.llama_token * len(tokens))(*tokens)
        batch = self._api.llama_batch_get_one(array, len(tokens))
        code = self._api.llama_decode(self._context, batch)
        if code:
            raise RuntimeError(f"llama_decode gave {code}")
        logits = self._api.llama_get_logits_ith(self._context, -1)
        return np.ctypeslib.as_array(logits, shape=(self._vocab_size,))


def _set(parameters: Any, **fields: int) -> Any:
    """Set fields that exist: a ctypes structure takes any name without a word."""
    for name, value in fields.items():
        getattr(parameters, name)
        setattr(parameters, name, value)
    return parameters


def _write(model_dir: Path, directory: Path, file_type: str) -> None:
    """All tensors under llama.cpp's names: norms in fp32, matrices in `file_type`."""
    import gguf

    config = stored_config(model_dir)
    writer = gguf.GGUFWriter(directory / "model.gguf", "llama")
    _write_shape(writer, config)
    kind = gguf.GGMLQuantizationType[file_type]
    for name, tensor in stored_tensors(model_dir).items():
        numbers = _as_rotated(name, tensor.float(), config).numpy()
        own = gguf.GGMLQuantizationType.F32 if tensor.dim() == 1 else kind
        writer.add_tensor(_own_name(name), gguf.quants.quantize(numbers, own), raw_dtype=own)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_shape(writer: Any, config: dict[str, Any]) -> None:
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")


def _own_name(name: str) -> str:
    """`model.layers.3.mlp.up_proj.weight` is `blk.3.ffn_up.weight` there."""
    if name == "model.embed_tokens.weight":
        return "token_embd.weight"
    if name == "model.norm.weight":
        return "output_norm.weight"
    _, _, layer, *parts = name.split(".")
    return f"blk.{layer}.{LAYER_NAMES['.'.join(parts[:-1])]}.weight"


def _as_rotated(name: str, weight: torch.Tensor, config: dict[str, Any]) -> torch.Tensor:
    """llama.cpp rotates neighbours, Hugging Face the two halves of a head: reorder the rows."""
    heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
    kind = name.split(".")[-2]
    if kind not in heads:
        return weight
    halves = weight.view(config[heads[kind]], 2, config["head_dim"] // 2, -1)
    return halves.transpose(1, 2).reshape(weight.shape).contiguous()
