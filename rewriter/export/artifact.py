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

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, fx, nn

from rewriter.errors import ArtifactError, RewriterError
from rewriter.export.graph_json import (
    baked_to_json,
    decoding_from_json,
    decoding_to_json,
    graph_from_json,
    graph_to_json,
    signature_from_json,
    signature_to_json,
)
from rewriter.optimized import OptimizedModel
from rewriter.program import BakedDim, Program
from rewriter.report.json import report_from_json, report_to_json

__all__ = ["check_target", "is_artifact", "load_optimized", "save_optimized"]

FORMAT = 1
MANIFEST, PROGRAM, WEIGHTS, REPORT = (
    "manifest.json",
    "program.json",
    "weights.safetensors",
    "report.json",
)
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


def is_artifact(directory: Path) -> bool:
    """Whether it holds a saved program."""
    return (directory / MANIFEST).is_file()


def check_target(directory: Path) -> None:
    """Whether a program could be saved there; before the long work starts.

    Raises:
        ArtifactError: it exists and is something else, or cannot be written.
    """
    if directory.exists() and not directory.is_dir():
        raise ArtifactError(f"{directory} is a file; allowed: a new or empty directory")
    if directory.is_dir() and any(directory.iterdir()) and not is_artifact(directory):
        raise ArtifactError(
            f"{directory} holds other files; allowed: a new or empty directory, or a saved program"
        )
    parent = directory.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise ArtifactError(f"{directory} cannot be written: no permission in {parent}")


def save_optimized(optimized: OptimizedModel, directory: Path) -> None:
    """Write `directory`, or leave everything as it was.

    Raises:
        ArtifactError: the target cannot be written or the program cannot be stored.
    """
    check_target(directory)
    try:
        with _replaced(directory) as temporary:
            _write(optimized, temporary)
    except OSError as error:
        raise ArtifactError(f"{directory} cannot be written: {error.strerror or error}") from error


@contextmanager
def _replaced(directory: Path) -> Iterator[Path]:
    """A temporary directory beside the target that takes its place when the block ends well."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    try:
        yield temporary
        temporary.chmod(0o755)
        for path in temporary.iterdir():
            _sync(path)
        _sync(temporary)
        if directory.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{directory.name}.old.", dir=directory.parent))
            os.replace(directory, old)
            os.replace(temporary, directory)
            shutil.rmtree(old)
        else:
            os.replace(temporary, directory)
        _sync(directory.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write(optimized: OptimizedModel, directory: Path) -> None:
    program = optimized.program
    tensors, aliases = _weights(program)
    stored = {
        "name": program.name,
        "backend": optimized.backend,
        "signature": signature_to_json(program.signature),
        "decoding": decoding_to_json(program.decoding),
        "baked": baked_to_json(program.baked),
        "kind": program.meta.get("kind", "module"),
        "weights": aliases,
        "graph": graph_to_json(program.graph),
    }
    _write_json(directory / PROGRAM, stored)
    _write_json(directory / REPORT, report_to_json(optimized.report))
    save_file(tensors, str(directory / WEIGHTS))
    for name, values in (
        ("config.json", optimized.config),
        ("generation_config.json", optimized.generation_config),
    ):
        if values is not None:
            _write_json(directory / name, values)
    for name in TOKENIZER_FILES if optimized.source_directory else ():
        source = optimized.source_directory / name  # pyright: ignore
        if source.is_file():
            shutil.copyfile(source, directory / name)
    files = sorted(path.name for path in directory.iterdir())
    hashes = {name: _sha256(directory / name) for name in files}
    _write_json(directory / MANIFEST, {"format": FORMAT, "files": hashes})


def _write_json(path: Path, value: Any) -> None:
    text = json.dumps(value, indent=1, default=_plain)
    path.write_text(text + "\n", encoding="utf-8")


def _plain(value: Any) -> Any:
    """JSON for what configurations hold besides plain types."""
    return str(value).removeprefix("torch.")


def _weights(program: Program) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """Each distinct tensor once, and for each attribute of the graph the tensor it is."""
    tensors: dict[str, Tensor] = {}
    seen: dict[tuple[Any, ...], str] = {}
    aliases: dict[str, dict[str, Any]] = {}
    for node in program.graph.find_nodes(op="get_attr"):
        name = str(node.target)
        value = _attribute(program.module, name)
        if not isinstance(value, Tensor):
            raise ArtifactError(f"attribute {name} is a {type(value).__name__}; it cannot be saved")
        key = (value.data_ptr(), value.dtype, tuple(value.shape), tuple(value.stride()))
        if value.numel() == 0 or key not in seen:
            seen[key] = name
            tensors[name] = value.detach().to("cpu").contiguous().clone()
        aliases[name] = {"tensor": seen[key], "parameter": isinstance(value, nn.Parameter)}
    return tensors, aliases


def _attribute(module: nn.Module, path: str) -> Any:
    value: Any = module
    for part in path.split("."):
        value = getattr(value, part)
    return value


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load_optimized(directory: Path) -> OptimizedModel:
    """Read and check a saved program.

    Raises:
        ArtifactError: it is missing, damaged, of another version, or names unknown operators.
    """
    _check_files(directory)
    stored = _read_json(directory / PROGRAM)
    try:
        program = _program(directory, stored)
        report = report_from_json(_read_json(directory / REPORT))
        backend = stored["backend"]
    except RewriterError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise ArtifactError(f"{directory / PROGRAM} is damaged: {error!r}") from error
    config, generation = (
        _read_json(path) if path.is_file() else None
        for path in (directory / "config.json", directory / "generation_config.json")
    )
    return OptimizedModel(
        program,
        report,
        config=config,
        generation_config=generation,
        backend=backend,
        source_directory=directory,
    )


def _check_files(directory: Path) -> None:
    """Every file of the manifest is there, inside the directory, and unchanged."""
    if not directory.is_dir():
        raise ArtifactError(f"{directory} does not exist or is no directory")
    if not is_artifact(directory):
        raise ArtifactError(f"{directory} is no saved program: {MANIFEST} is missing")
    manifest = _read_json(directory / MANIFEST)
    version = manifest.get("format") if isinstance(manifest, dict) else None
    if version != FORMAT:
        raise ArtifactError(f"{directory / MANIFEST} has format {version!r}; allowed: {FORMAT}")
    files = manifest.get("files")
    if not isinstance(files, dict) or not {PROGRAM, WEIGHTS, REPORT} <= files.keys():
        raise ArtifactError(f"{directory / MANIFEST} lists no {PROGRAM}, {WEIGHTS} or {REPORT}")
    for name, expected in files.items():
        path = directory / name
        if Path(name).name != name or path.is_symlink():
            raise ArtifactError(f"{directory / MANIFEST} names {name!r}, outside of the directory")
        if not path.is_file():
            raise ArtifactError(f"{path} is missing")
        if _sha256(path) != expected:
            raise ArtifactError(f"{path} is damaged: its SHA-256 is not the one it was saved with")


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path} cannot be read: {error}") from error


def _program(directory: Path, stored: dict[str, Any]) -> Program:
    graph = graph_from_json(stored["graph"])
    try:
        tensors = load_file(str(directory / WEIGHTS))
    except SafetensorError as error:
        raise ArtifactError(f"{directory / WEIGHTS} is damaged: {error}") from error
    root = _root(stored["weights"], tensors, directory)
    module = fx.GraphModule(root, graph, class_name="Program")
    program = Program(
        module,
        signature_from_json(stored["signature"]),
        name=stored["name"],
        baked=tuple(BakedDim(*item) for item in stored["baked"]),
        decoding=decoding_from_json(stored["decoding"]),
        meta={"kind": stored["kind"]},
    )
    program.graph.lint()
    return program


def _root(
    weights: dict[str, dict[str, Any]], tensors: dict[str, Tensor], directory: Path
) -> nn.Module:
    """A module tree that holds each tensor where the graph looks for it."""
    root, made = nn.Module(), {}
    for name, item in weights.items():
        source = item["tensor"]
        if source not in tensors:
            raise ArtifactError(f"{directory / WEIGHTS} has no tensor {source!r}")
        if source not in made:
            value = tensors[source]
            floating = value.is_floating_point() and item["parameter"]
            made[source] = nn.Parameter(value, requires_grad=False) if floating else value
        *path, leaf = name.split(".")
        owner = root
        for part in path:
            if part not in owner._modules:
                owner.add_module(part, nn.Module())
            owner = owner._modules[part]
            assert owner is not None
        if isinstance(made[source], nn.Parameter):
            owner.register_parameter(leaf, made[source])
        else:
            owner.register_buffer(leaf, made[source])
    return root


