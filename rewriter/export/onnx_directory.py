"""A directory to deploy: the ONNX file with configuration and tokenizer beside it.

| file | what |
|---|---|
| `model.onnx`, `model.onnx.data` | graph and weights |
| `config.json`, `generation_config.json`, tokenizer files | as the model had them |
| `genai_config.json` | for onnxruntime-genai, where it can run the model |
| `manifest.json` | format version and the SHA-256 of every other file |
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rewriter.deploy.genai import GENAI_CONFIG, genai_config
from rewriter.errors import ArtifactError, ExportError
from rewriter.export.artifact import CONFIG, GENERATION, copy_tokenizer
from rewriter.export.directory import check_target, replaced, write_json, write_manifest
from rewriter.export.onnx_export import OnnxSummary, export_onnx
from rewriter.export.onnx_file import MODEL, open_onnx
from rewriter.optimized import OptimizedModel

__all__ = ["export_directory"]


def export_directory(
    optimized: OptimizedModel,
    directory: Path,
    *,
    on_stage: Callable[..., None] | None = None,
    **options: Any,
) -> OnnxSummary:
    """Write `directory`, or leave everything as it was; options and errors as of `export_onnx`."""
    directory = directory.resolve()
    check_target(directory)
    try:
        with replaced(directory) as place:
            summary = export_onnx(optimized, place / MODEL, on_stage=on_stage, **options)
            for name, values in (
                (CONFIG, optimized.config),
                (GENERATION, optimized.generation_config),
            ):
                if values is not None:
                    write_json(place / name, values)
            copy_tokenizer(optimized.source_directory, place)
            metadata = open_onnx(place, check_data=False).metadata
            notes, data = _write_genai(metadata, place), metadata["data"]
            if on_stage is not None:
                on_stage("hash")
            write_manifest(place, {data["file"]: data["sha256"]} if data else None)
    except OSError as error:
        raise ArtifactError(f"{directory} cannot be written: {error.strerror or error}") from error
    return dataclasses.replace(summary, path=directory, notes=(*summary.notes, *notes))


def _write_genai(metadata: dict[str, Any], directory: Path) -> tuple[str, ...]:
    """Write `genai_config.json`; a note where onnxruntime-genai cannot run the model."""
    try:
        settings = genai_config(metadata)
    except ExportError as error:
        return (f"not for onnxruntime-genai: {error}",)
    write_json(directory / GENAI_CONFIG, settings)
    return ()
