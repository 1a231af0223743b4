"""How a program is called and what it keeps, as JSON and back."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from rewriter.errors import ArtifactError
from rewriter.export.graph_json import value_from_json, value_to_json
from rewriter.export.tree_json import tree_from_json, tree_to_json
from rewriter.program import Decoding, InputSpec, Signature, StateSpec

__all__ = ["decoding_from_json", "decoding_to_json", "signature_from_json", "signature_to_json"]


def signature_to_json(signature: Signature) -> dict[str, Any]:
    """Plain JSON types. Raises ArtifactError for an output type that cannot be stored."""
    return {
        "parameters": list(signature.parameters),
        "inputs": [_plain(spec) for spec in signature.inputs],
        "constants": {k: value_to_json(v) for k, v in signature.constants.items()},
        "in_spec": tree_to_json(signature.in_spec),
        "leaf_names": list(signature.leaf_names),
        "out_spec": tree_to_json(signature.out_spec),
    }


def signature_from_json(stored: dict[str, Any]) -> Signature:
    """The inverse. Raises ArtifactError for an unknown structure or dtype."""
    inputs = tuple(
        InputSpec(i["name"], _dtype(i["dtype"]), tuple(i["dims"])) for i in stored["inputs"]
    )
    return Signature(
        parameters=tuple(stored["parameters"]),
        inputs=inputs,
        constants={k: value_from_json(v, {}) for k, v in stored["constants"].items()},
        in_spec=tree_from_json(stored["in_spec"]),
        leaf_names=tuple(stored["leaf_names"]),
        out_spec=tree_from_json(stored["out_spec"]),
    )


def decoding_to_json(decoding: Decoding | None) -> dict[str, Any] | None:
    """Plain JSON types of the decoding state."""
    if decoding is None:
        return None
    fields = {f.name: getattr(decoding, f.name) for f in dataclasses.fields(decoding)}
    states = [_plain(spec) | {"fill": value_to_json(spec.fill)} for spec in decoding.states]
    return fields | {"states": states}


def decoding_from_json(stored: dict[str, Any] | None) -> Decoding | None:
    """The inverse."""
    if stored is None:
        return None
    fields: dict[str, Any] = stored | {"states": tuple(_state(item) for item in stored["states"])}
    return Decoding(**fields)


def _state(stored: dict[str, Any]) -> StateSpec:
    read = {"dims": tuple(stored["dims"]), "dtype": _dtype(stored["dtype"])}
    return StateSpec(**stored | read | {"fill": value_from_json(stored["fill"], {})})


def _plain(spec: InputSpec | StateSpec) -> dict[str, Any]:
    dtype = str(spec.dtype).removeprefix("torch.")
    return dataclasses.asdict(spec) | {"dtype": dtype, "dims": list(spec.dims)}


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise ArtifactError(f"unknown dtype {name!r}")
    return found
