"""`genai_config.json`: what onnxruntime-genai reads to run an exported folder."""

from __future__ import annotations

from typing import Any

from rewriter.errors import ExportError

__all__ = ["GENAI_CONFIG", "genai_config"]

GENAI_CONFIG = "genai_config.json"


def genai_config(metadata: dict[str, Any], *, model: str = "model.onnx") -> dict[str, Any]:
    """The content of the file for a decoder whose layers all keep every entry.

    Args:
        metadata: of the `.onnx` file. model: its name in the folder.

    Raises:
        ExportError: state that onnxruntime-genai cannot keep, or a dimension that nobody stated.
    """
    states = metadata["states"]
    keys = [s for s in states if s["role"] == "keys"]
    _check(metadata, keys)
    _, num_kv_heads, _, head_dim = keys[0]["dims"]
    config = metadata.get("config") or {}
    in_place = metadata["padding"] == "right"
    limit = metadata["max_positions"] or config.get("max_position_embeddings") or 2048
    num_heads = config.get("num_attention_heads", num_kv_heads)
    return {
        "model": {
            "type": "decoder",
            "context_length": limit,
            "vocab_size": metadata["vocab_size"],
            **_tokens(metadata),
            "decoder": {
                "filename": model,
                "head_size": head_dim,
                "hidden_size": config.get("hidden_size", num_heads * head_dim),
                "num_attention_heads": num_heads,
                "num_key_value_heads": num_kv_heads,
                "num_hidden_layers": len(keys),
                "session_options": {"provider_options": _providers(metadata["ep"])},
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        "search": {
            "max_length": limit,
            "do_sample": False,
            "past_present_share_buffer": in_place,
        },
    }


def _check(metadata: dict[str, Any], keys: list[dict[str, Any]]) -> None:
    others = [s["name"] for s in metadata["states"] if "past" not in s["dims"]]
    if metadata["kind"] != "causal_lm":
        raise ExportError(f"onnxruntime-genai runs language models, not a {metadata['kind']}")
    if others or not keys:
        found = ", ".join(others) or "no keys at all"
        raise ExportError(f"onnxruntime-genai keeps every entry and nothing else, not {found}")
    names = {f"past_key_values.{index}.key" for index in range(len(keys))}
    shapes = {tuple(state["dims"]) for state in metadata["states"]}
    if {state["input"] for state in keys} != names or len(shapes) != 1:
        raise ExportError(
            f"onnxruntime-genai wants layers of one shape, numbered from 0: not {sorted(shapes)}"
        )
    if metadata["vocab_size"] is None:
        raise ExportError("onnxruntime-genai wants a vocab_size, which this program does not state")


def _tokens(metadata: dict[str, Any]) -> dict[str, Any]:
    """Special tokens, as the generation config has them, else the config."""
    found: dict[str, Any] = {}
    for source in (metadata.get("config") or {}, metadata.get("generation_config") or {}):
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            if source.get(name) is not None:
                found[name] = source[name]
    if "pad_token_id" not in found and "eos_token_id" in found:
        first = found["eos_token_id"]
        found["pad_token_id"] = first[0] if isinstance(first, list) else first
    return found


def _providers(ep: str) -> list[dict[str, Any]]:
    return [{"cuda": {}}] if ep == "cuda" else []
