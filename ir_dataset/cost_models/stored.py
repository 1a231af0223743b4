"""Models as text: one JSON document with LightGBM's own text in it, never anything that runs when read.

    {"format": 1, "kind": ..., "features": [...], "boosters": {"name": [text, ...]}, "parameters": {...},
     "training_data": sha256, "metrics": {...}, "digest": sha256 of all the rest}

The digest finds damage before LightGBM's parser sees the text. A name that ends in `.gz` is compressed.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rewriter.errors import ArtifactError, ConfigError

if TYPE_CHECKING:
    import lightgbm

__all__ = ["FORMAT", "StoredModel", "boosters_of", "load", "save", "shipped"]

FORMAT = 1
_MOST_BYTES = 64 * 1024 * 1024


@dataclass(frozen=True)
class StoredModel:
    """What a file holds.

    Attributes:
        kind: `ranking` or `size`: which class it belongs to.
        features: names of the columns, in order.
        boosters: LightGBM's texts by role.
        parameters: numbers and lists that the class needs beside them.
        training_data: sha256 of the data it learned from.
        metrics: figures of the evaluation that it was shipped with.
    """

    kind: str
    features: tuple[str, ...]
    boosters: Mapping[str, tuple[str, ...]]
    parameters: Mapping[str, Any]
    training_data: str
    metrics: Mapping[str, Any] = field(default_factory=dict)


def save(model: StoredModel, path: Path) -> None:
    """Write the model whole or not at all; equal models give equal bytes."""
    content = {"format": FORMAT, **asdict(model)}
    document = json.dumps({**content, "digest": _digest(content)}, sort_keys=True, allow_nan=False)
    data = document.encode()
    if path.suffix == ".gz":
        data = gzip.compress(data, 9, mtime=0)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    with os.fdopen(handle, "wb") as stream:
        stream.write(data)
    os.chmod(name, 0o644)
    os.replace(name, path)


def load(path: Path, kind: str) -> StoredModel:
    """Read a model of one kind.

    Raises:
        ArtifactError: it is missing, damaged, of another format, or of another kind.
    """
    try:
        data = path.read_bytes()
        if path.suffix == ".gz":
            with gzip.open(path) as stream:
                data = stream.read(_MOST_BYTES + 1)
        if len(data) > _MOST_BYTES:
            raise ArtifactError(f"cost model {path} has more than {_MOST_BYTES} bytes")
        content = json.loads(data)
    except (OSError, EOFError, ValueError) as error:
        raise ArtifactError(f"cost model {path} cannot be read: {error}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        told = content.get("format") if isinstance(content, dict) else type(content).__name__
        raise ArtifactError(f"cost model {path} has format {told!r}; this version reads {FORMAT}")
    if content.pop("digest", None) != _digest(content):
        raise ArtifactError(f"cost model {path} is damaged: its digest is another")
    if content["kind"] != kind:
        raise ArtifactError(f"cost model {path} is of kind {content['kind']!r}, wanted {kind!r}")
    return StoredModel(
        kind=content["kind"],
        features=tuple(content["features"]),
        boosters={name: tuple(texts) for name, texts in content["boosters"].items()},
        parameters=content["parameters"],
        training_data=content["training_data"],
        metrics=content["metrics"],
    )


def shipped(name: str) -> Path:
    """The file of a model that comes with the package.

    Raises:
        ConfigError: there is none of this name; lists those there are.
    """
    folder = Path(str(resources.files("ir_dataset.cost_models"))) / "models"
    path = folder / f"{name}.json.gz"
    if not path.is_file():
        names = sorted(p.name.removesuffix(".json.gz") for p in folder.glob("*.json.gz"))
        raise ConfigError("model", name, f"one of {', '.join(names) or 'none'}")
    return path


def boosters_of(texts: Sequence[str]) -> list[lightgbm.Booster]:
    """LightGBM's boosters from their texts.

    Raises:
        ArtifactError: one is no model.
    """
    import lightgbm

    try:
        return [lightgbm.Booster(model_str=text) for text in texts]
    except lightgbm.basic.LightGBMError as error:
        raise ArtifactError(f"a booster of the cost model cannot be read: {error}") from error


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, allow_nan=False).encode()).hexdigest()
