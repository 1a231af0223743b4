"""Saved programs: a directory of JSON and safetensors, written all or nothing, checked when read.

| file | what |
|---|---|
| `manifest.json` | format version and the SHA-256 of every other file |
| `program.json` | graph, signature, state, which weight each attribute is |
| `weights.safetensors` | every tensor once |
| `report.json` | what was done |
| `config.json`, `generation_config.json`, tokenizer files | as the model had them |
"""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, fx, nn

from rewriter.errors import ArtifactError, ConfigError
from rewriter.export.directory import (
    check_files,
    check_target,
    is_artifact,
    read_json,
    replaced,
    write_json,
    write_manifest,
)
from rewriter.export.graph_json import (
    ATTRIBUTE,
    graph_from_json,
    graph_to_json,
    value_from_json,
    value_to_json,
)
from rewriter.export.signature_json import (
    decoding_from_json,
    decoding_to_json,
    signature_from_json,
    signature_to_json,
)
from rewriter.lowering import BACKENDS, choose_backend
from rewriter.optimized import OptimizedModel
from rewriter.program import BakedDim, Program
from rewriter.report.json import report_from_json, report_to_json
from rewriter.report.report import Report

__all__ = [
    "DAMAGE",
    "check_target",
    "copy_tokenizer",
    "distinct_weights",
    "is_artifact",
    "load_optimized",
    "program_from_json",
    "program_to_json",
    "save_optimized",
]

PROGRAM, WEIGHTS, REPORT = "program.json", "weights.safetensors", "report.json"
CONFIG, GENERATION = "config.json", "generation_config.json"
META = ("kind", "max_positions", "vocab_size", "guards")
"""What is kept of the facts that capture and derivation noted."""
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "added_tokens.json",
    "chat_template.jinja",
)
DAMAGE = (KeyError, TypeError, ValueError, AttributeError, RuntimeError, AssertionError)
"""What reading JSON of another shape than ours can raise."""


def save_optimized(optimized: OptimizedModel, directory: Path) -> None:
    """Write `directory`, or leave everything as it was.

    Raises:
        ArtifactError: the target cannot be written or the program cannot be stored.
    """
    directory = directory.resolve()
    check_target(directory)
    try:
        with replaced(directory) as temporary:
            _write(optimized, temporary)
    except OSError as error:
        raise ArtifactError(f"{directory} cannot be written: {error.strerror or error}") from error


def _write(optimized: OptimizedModel, directory: Path) -> None:
    program = optimized.program
    tensors, aliases = distinct_weights(program)
    stored = program_to_json(program, aliases) | {"backend": optimized.backend}
    write_json(directory / PROGRAM, stored)
    write_json(directory / REPORT, report_to_json(optimized.report))
    try:
        save_file(_unshared(tensors), str(directory / WEIGHTS))
    except (SafetensorError, KeyError, ValueError) as error:
        raise ArtifactError(f"the weights cannot be saved: {error}") from error
    for name, values in ((CONFIG, optimized.config), (GENERATION, optimized.generation_config)):
        if values is not None:
            write_json(directory / name, values)
    copy_tokenizer(optimized.source_directory, directory)
    write_manifest(directory)


def program_to_json(program: Program, aliases: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Plain JSON types. aliases: from `distinct_weights`. Raises ArtifactError."""
    return {
        "name": program.name,
        "signature": signature_to_json(program.signature),
        "decoding": decoding_to_json(program.decoding),
        "baked": [[b.input, b.dim, b.value, b.reason] for b in program.baked],
        "meta": {key: value_to_json(program.meta.get(key)) for key in META},
        "weights": aliases,
        "graph": graph_to_json(program.graph),
    }


def copy_tokenizer(source: Path | None, directory: Path) -> None:
    """Of a Hugging Face directory; without one there is nothing to copy."""
    if source is None:
        return
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, directory / name)


def distinct_weights(program: Program) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """Each distinct tensor once, contiguous and on the CPU, and for each attribute which one it is."""
    tensors: dict[str, Tensor] = {}
    seen: dict[tuple[Any, ...], str] = {}
    aliases: dict[str, dict[str, Any]] = {}
    for node in program.graph.find_nodes(op="get_attr"):
        name = str(node.target)
        value = _attribute(program.module, name)
        if not isinstance(value, Tensor) or not ATTRIBUTE.fullmatch(name):
            raise ArtifactError(f"attribute {name!r} ({type(value).__name__}) cannot be saved")
        key = (value.data_ptr(), value.dtype, tuple(value.shape), tuple(value.stride()))
        if value.numel() == 0 or key not in seen:
            seen[key] = name
            tensors[name] = value.detach().to("cpu").contiguous()
        aliases[name] = {"tensor": seen[key], "parameter": isinstance(value, nn.Parameter)}
    return tensors, aliases


def _unshared(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies of those that share their memory with others or are part of something larger."""
    owners = Counter(tensor.untyped_storage().data_ptr() for tensor in tensors.values())

    def alone(tensor: Tensor) -> bool:
        storage = tensor.untyped_storage()
        return owners[storage.data_ptr()] == 1 and storage.nbytes() == tensor.nbytes

    return {name: t if alone(t) else t.clone() for name, t in tensors.items()}


def _attribute(module: nn.Module, path: str) -> Any:
    value: Any = module
    for part in path.split("."):
        value = getattr(value, part)
    return value


def load_optimized(directory: Path) -> OptimizedModel:
    """Read and check a saved program.

    Raises:
        ArtifactError: it is missing, damaged, of another version, or names unknown operators.
    """
    files = check_files(directory, (PROGRAM, WEIGHTS, REPORT))
    stored = read_json(directory / PROGRAM)
    tensors = _read_weights(directory / WEIGHTS)
    try:
        program = program_from_json(stored, tensors)
        backend = stored["backend"]
    except (ArtifactError, *DAMAGE) as error:
        raise _damaged(directory / PROGRAM, error) from error
    if backend not in BACKENDS:
        raise ArtifactError(f"{directory / PROGRAM} names the backend {backend!r}")
    config, generation = (
        read_json(directory / name) if name in files else None for name in (CONFIG, GENERATION)
    )
    report = _read_report(directory / REPORT)
    return OptimizedModel(
        program,
        report,
        config=config,
        generation_config=generation,
        backend=_available(backend, program, report),
        source_directory=directory,
    )


def _available(backend: str, program: Program, report: Report) -> str:
    """The backend a program was saved with, or eager with a note where this machine cannot run it."""
    try:
        return choose_backend(backend, program).name
    except ConfigError as error:
        report.notes.append(f"runs on eager: {error}")
        return "eager"


def _damaged(path: Path, error: Exception) -> ArtifactError:
    what = str(error) if isinstance(error, ArtifactError) else repr(error)
    return ArtifactError(f"{path} is damaged: {what}")


def _read_report(path: Path) -> Report:
    try:
        return report_from_json(read_json(path))
    except ArtifactError as error:
        raise _damaged(path, error) from error


def _read_weights(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(str(path))
    except (SafetensorError, OSError, ValueError) as error:
        raise _damaged(path, error) from error


def program_from_json(stored: dict[str, Any], tensors: dict[str, Tensor]) -> Program:
    """The inverse of `program_to_json`, over these tensors; damage raises whatever it leads to."""
    graph = graph_from_json(stored["graph"])
    weights = stored["weights"]
    unknown = [n.target for n in graph.find_nodes(op="get_attr") if n.target not in weights]
    if unknown:
        raise ArtifactError(f"attribute {unknown[0]!r} is none of its weights")
    program = Program(
        fx.GraphModule(_root(weights, tensors), graph, class_name="Program"),
        signature_from_json(stored["signature"]),
        name=str(stored["name"]),
        baked=tuple(BakedDim(*item) for item in stored["baked"]),
        decoding=decoding_from_json(stored["decoding"]),
        meta={key: value_from_json(value, {}) for key, value in stored["meta"].items()},
    )
    program.graph.lint()
    _check_inputs(program)
    return program


def _check_inputs(program: Program) -> None:
    """Every declared input and state is a placeholder."""
    names = {node.name for node in program.placeholders()}
    declared = [spec.name for spec in program.signature.inputs] if program.decoding is None else []
    declared += [spec.name for spec in program.decoding.states] if program.decoding else []
    for name in declared:
        if name not in names:
            raise ArtifactError(f"the graph has no input {name!r}")


def _root(weights: dict[str, dict[str, Any]], tensors: dict[str, Tensor]) -> nn.Module:
    """A module tree that holds each tensor where the graph looks for it."""
    root, made = nn.Module(), {}
    for name, item in weights.items():
        source = item["tensor"]
        if source not in tensors:
            raise ArtifactError(f"{WEIGHTS} has no tensor {source!r}")
        if source not in made:
            value = tensors[source]
            floating = value.is_floating_point() and item["parameter"]
            made[source] = nn.Parameter(value, requires_grad=False) if floating else value
        _place(root, name, made[source])
    return root


def _place(root: nn.Module, name: str, value: Tensor) -> None:
    *path, leaf = name.split(".")
    owner = root
    for part in path:
        if part not in owner._modules:
            owner.add_module(part, nn.Module())
        owner = owner.get_submodule(part)
    if isinstance(value, nn.Parameter):
        owner.register_parameter(leaf, value)
    else:
        owner.register_buffer(leaf, value)
