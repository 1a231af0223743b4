"""Which file an optimized model becomes, by the name it is to have, and which one a path holds."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rewriter.errors import ArtifactError, ConfigError
from rewriter.export.directory import is_artifact

if TYPE_CHECKING:
    from rewriter.export.onnx_export import OnnxSummary
    from rewriter.export.pt2 import Pt2Summary
    from rewriter.optimized import OptimizedModel

__all__ = ["artifact_kind", "check_export", "export_optimized"]

OnStage = Callable[..., None]

DEFAULTS: dict[str, Any] = {
    "target": "cpu",
    "ep": "portable",
    "portable": False,
    "max_length": None,
    "batch": None,
    "dtype": None,
    "logits": "last",
}
"""Options of every format, and the values that leave them to it."""

ALLOWED = {
    "pt2": ("target", "portable", "max_length", "batch"),
    "onnx": ("ep", "max_length", "dtype", "logits"),
}
"""Options by format; a directory takes those of ONNX."""


def artifact_kind(path: Path) -> str | None:
    """ "program" (as `save` writes), "onnx" (file or directory) or "pt2"; None for anything else."""
    if path.is_dir():
        if (path / "model.onnx").is_file():
            return "onnx"
        return "program" if is_artifact(path) else None
    if path.suffix == ".onnx":
        return "onnx" if path.is_file() else None
    return "pt2" if path.suffix == ".pt2" and path.is_file() and _is_ours(path) else None


def _is_ours(path: Path) -> bool:
    """Whether a zip has metadata of ours: torch.export's own files have the same suffix."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.rpartition("/")[2] == "rewriter.json" for name in archive.namelist())
    except (zipfile.BadZipFile, OSError):
        return False


def check_export(path: Path, options: dict[str, Any]) -> str:
    """The format for a path: "pt2", "onnx" or "directory"; before the long work starts.

    Raises:
        ConfigError: an option that the format does not have. ArtifactError: a place that cannot be
            written.
    """
    kind = {".pt2": "pt2", ".onnx": "onnx"}.get(path.suffix, "directory")
    for name, value in options.items():
        if value != DEFAULTS[name] and name not in ALLOWED["pt2" if kind == "pt2" else "onnx"]:
            formats = [form for form, names in ALLOWED.items() if name in names]
            raise ConfigError(name, value, f"only with {formats[0]}, not for {path.name}")
    if kind == "directory":
        from rewriter.export.artifact import check_target

        check_target(path)
    elif path.is_dir():
        raise ArtifactError(f"{path} is a directory; allowed: a file")
    return kind


def export_optimized(
    optimized: OptimizedModel, path: Path, *, on_stage: OnStage | None = None, **options: Any
) -> OnnxSummary | Pt2Summary:
    """Write `path` and check it; arguments and errors as of `OptimizedModel.export`."""
    unknown = set(options) - set(DEFAULTS)
    if unknown:
        name = min(unknown)
        raise ConfigError(name, options[name], f"one of {', '.join(DEFAULTS)}")
    kind = check_export(path, options)
    if kind == "pt2":
        from rewriter.export.pt2 import export_pt2

        given = {name: options[name] for name in ALLOWED["pt2"] if name in options}
        return export_pt2(optimized, path, on_stage=on_stage, **given)
    given = {name: options[name] for name in ALLOWED["onnx"] if name in options}
    if kind == "onnx":
        from rewriter.export.onnx_export import export_onnx

        return export_onnx(optimized, path, on_stage=on_stage, **given)
    from rewriter.export.onnx_directory import export_directory

    return export_directory(optimized, path, on_stage=on_stage, **given)
