"""Find a model by text: a Hugging Face directory, an exported program, or a factory."""

from __future__ import annotations

import importlib
import json
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rewriter.capture.exported import ExportedModule
from rewriter.errors import ModelError

__all__ = ["load_model"]

_FACTORY = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
_ALLOWED = "a Hugging Face model directory, a .pt2 file of torch.export, or package.module:factory"


def load_model(source: str | Path) -> nn.Module:
    """Load the model that `source` names, in eval mode, from this machine only.

    A factory takes no arguments and returns a module, or `(module, example_inputs)`; these are
    kept on the module as `example_inputs`.

    Raises:
        ModelError: nothing there, or it is damaged; one line says what.
    """
    text, path = str(source), Path(source)
    if path.is_dir():
        return _from_directory(path).eval()
    if path.suffix == ".pt2":
        return _from_exported(path)
    if _FACTORY.fullmatch(text):
        return _from_factory(text).eval()
    found = "is a file" if path.exists() else "does not exist"
    raise ModelError(f"model {text!r} {found}: expected {_ALLOWED}")


def _from_directory(path: Path) -> nn.Module:
    """A Hugging Face model, by the architecture its configuration names."""
    architectures = _read_config(path).get("architectures") or []
    factory = _model_class(architectures)
    try:
        model, info = factory.from_pretrained(
            path, local_files_only=True, trust_remote_code=False, output_loading_info=True
        )
    except Exception as error:  # whatever the library and the file formats raise
        raise ModelError(f"cannot load {path}: {_one_line(error)}") from None
    problems = {
        key: sorted(map(str, info.get(key) or ())) for key in ("missing_keys", "mismatched_keys")
    }
    for kind, names in problems.items():
        if names:
            raise ModelError(
                f"cannot load {path}: {kind.replace('_', ' ')} in its weights: {names[0]}"
            )
    return model


def _read_config(path: Path) -> dict[str, Any]:
    file = path / "config.json"
    if not file.is_file():
        raise ModelError(f"{path} is not a Hugging Face model directory: config.json is missing")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ModelError(f"{file} cannot be read: {_one_line(error)}") from None
    if not isinstance(config, dict):
        raise ModelError(f"{file} cannot be read: expected a JSON object")
    return config


def _model_class(architectures: list[str]) -> Any:
    """The class that the configuration names, or the automatic one of its kind."""
    import transformers

    name = architectures[0] if architectures else ""
    if not name or name.endswith(("ForCausalLM", "LMHeadModel")):
        return transformers.AutoModelForCausalLM
    return getattr(transformers, name, transformers.AutoModel)


def _from_exported(path: Path) -> nn.Module:
    if not path.is_file():
        raise ModelError(f"{path} does not exist")
    try:
        return ExportedModule(torch.export.load(path))
    except Exception as error:  # torch.export.load raises what zip, JSON and pickle raise
        raise ModelError(f"{path} is not a program of torch.export: {_one_line(error)}") from None


def _from_factory(text: str) -> nn.Module:
    """Import `package.module` (the working directory counts) and call its factory."""
    module_name, _, attribute = text.partition(":")
    with _working_directory_importable():
        try:
            factory = getattr(importlib.import_module(module_name), attribute, None)
        except ImportError as error:
            raise ModelError(f"cannot import {module_name!r}: {_one_line(error)}") from None
    if not callable(factory):
        raise ModelError(f"{module_name!r} has no callable {attribute!r}")
    return _call_factory(text, factory)


def _call_factory(text: str, factory: Callable[[], Any]) -> nn.Module:
    try:
        made = factory()
    except Exception as error:  # the user's code
        raise ModelError(f"{text} failed: {_one_line(error)}") from None
    model, *examples = made if isinstance(made, tuple) else (made,)
    if not isinstance(model, nn.Module):
        raise ModelError(f"{text} returned {type(model).__name__}, not a torch.nn.Module")
    if examples:
        model.example_inputs = examples[0]
    return model


@contextmanager
def _working_directory_importable() -> Iterator[None]:
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        yield
    finally:
        sys.path.remove(here)


def _one_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__
