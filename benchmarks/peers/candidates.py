"""The table of candidates: a name, the module that knows how, and its options."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["CANDIDATES", "REFERENCE", "Candidate"]


@dataclass(frozen=True)
class Candidate:
    """One way to decode.

    Attributes:
        module: in this folder; has `load`, and `prepare` where installed apart.
        options: keyword arguments of its `load`.
        ours: whether it is this project's.
        installed_apart: whether it runs under the interpreter that has the other runtimes, from files
            that it has to convert first.
    """

    name: str
    module: str
    options: Mapping[str, str] = field(default_factory=dict)
    ours: bool = False
    installed_apart: bool = False


CANDIDATES = (
    Candidate("HF eager", "hugging_face"),
    Candidate("HF compiled", "hugging_face", {"mode": "default"}),
    Candidate("rewriter eager", "rewritten", {"backend": "eager"}, ours=True),
    Candidate("rewriter inductor", "rewritten", {"backend": "inductor"}, ours=True),
    Candidate("rewriter cpu", "rewritten", {"backend": "cpu"}, ours=True),
    Candidate("rewriter ONNX", "exported", {"ep": "cpu"}, ours=True),
    Candidate("rewriter ONNX portable", "exported", {"ep": "portable"}, ours=True),
    Candidate("torch.onnx", "torch_onnx"),
    Candidate("ONNX Runtime", "onnx_runtime", installed_apart=True),
    Candidate("OpenVINO", "open_vino", installed_apart=True),
    Candidate("llama.cpp", "llamacpp", installed_apart=True),
)
REFERENCE = Candidate("HF eager in float32", "hugging_face", {"compute_dtype": "float32"})
"""Whose logits are taken for right: of the stored weights, also where those are bfloat16."""
