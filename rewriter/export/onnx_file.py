"""An ONNX file of ours: its metadata and its hashes, checked before a runtime is given the file.

| file | what |
|---|---|
| `NAME.onnx` | the graph, small initializers, and one metadata entry `rewriter`: JSON, sorted keys |
| `NAME.onnx.data` | every other initializer, at the offsets that the graph names |

The metadata hold the SHA-256 of the data file and, as `sha256`, that of the `.onnx` file itself with
these 64 digits being zeros. A hash finds damage. It does not stop an author with intent, who can write
another; so every tensor is also checked to read from the one data file, inside its bounds.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError, Message
from onnx import ModelProto, NodeProto, TensorProto

from rewriter.errors import ArtifactError

__all__ = ["FORMAT", "KEY", "MODEL", "UNSEALED", "OnnxFile", "metadata_text", "open_onnx", "seal"]

FORMAT = 1
KEY = "rewriter"
"""Name of the metadata entry."""
MODEL = "model.onnx"
"""Name of the file in a directory."""
UNSEALED = "0" * 64
MAX_BYTES = 2**31 - 1
"""No protobuf message can be larger."""
BLOCK = 1 << 24
"""Bytes hashed between two reports of progress."""
KINDS = ("causal_lm", "module")
EXTERNAL_KEYS = {"location", "offset", "length", "checksum"}
FILE_READERS = ("EPContext",)
"""Operators that name files of their own for a provider to open."""
SIZES_IN_BITS = {
    **dict.fromkeys(("UINT2", "INT2"), 2),
    **dict.fromkeys(("UINT4", "INT4", "FLOAT4E2M1"), 4),
    **dict.fromkeys(("UINT8", "INT8", "BOOL", "FLOAT8E4M3FN", "FLOAT8E4M3FNUZ"), 8),
    **dict.fromkeys(("FLOAT8E5M2", "FLOAT8E5M2FNUZ", "FLOAT8E8M0"), 8),
    **dict.fromkeys(("UINT16", "INT16", "FLOAT16", "BFLOAT16"), 16),
    **dict.fromkeys(("UINT32", "INT32", "FLOAT"), 32),
    **dict.fromkeys(("UINT64", "INT64", "DOUBLE", "COMPLEX64"), 64),
    "COMPLEX128": 128,
}


@dataclass(frozen=True)
class OnnxFile:
    """A checked file: `metadata` as a dict, and the paths; `data_path` is None without such a file."""

    metadata: dict[str, Any]
    model_path: Path
    data_path: Path | None


def metadata_text(metadata: dict[str, Any]) -> str:
    """The one way to write metadata as JSON: ASCII, sorted keys, dtypes as their names."""
    plain = json.loads(json.dumps(metadata, default=lambda v: str(v).removeprefix("torch.")))
    return json.dumps(plain, sort_keys=True)


def seal(path: Path) -> None:
    """Put the file's own hash into its metadata, where `UNSEALED` or an older hash stands.

    Raises:
        ArtifactError: the file has no metadata of ours.
    """
    content = path.read_bytes()
    text, metadata = _read_metadata(path, _parse(path, content))
    unsealed, digest = _own_hash(path, content, text, metadata)
    sealed = unsealed.replace(_with_hash(metadata, UNSEALED), _with_hash(metadata, digest))
    path.write_bytes(sealed)


def open_onnx(
    path: str | Path, *, check_data: bool = True, on_stage: Callable[..., None] | None = None
) -> OnnxFile:
    """Read the metadata and check everything that can be checked before a runtime loads the file.

    Args:
        path: the `.onnx` file, or a directory with `model.onnx`.
        check_data: whether to hash the data file; its size and every reference to it are always
            checked.
        on_stage: called with "check weights" and the share that is done.

    Raises:
        ArtifactError: names the file and what is wrong.
    """
    path = Path(path)
    path = path / MODEL if path.is_dir() else path
    content = _content(path)
    model = _parse(path, content)
    text, metadata = _read_metadata(path, model)
    if _own_hash(path, content, text, metadata)[1] != metadata["sha256"]:
        raise ArtifactError(f"{path} is damaged: its SHA-256 is not the one it was sealed with")
    data_path, size = _data_file(path, metadata)
    _check_references(path, model, data_path, size)
    if check_data and data_path is not None:
        _check_data(data_path, metadata["data"]["sha256"], size, on_stage or (lambda *_: None))
    return OnnxFile(metadata, path, data_path)


def _content(path: Path) -> bytes:
    if not path.is_file():
        raise ArtifactError(f"{path} does not exist or is no file")
    try:
        size = path.stat().st_size
        if not 0 < size <= MAX_BYTES:
            raise ArtifactError(f"{path} has {size} bytes; allowed: 1 to {MAX_BYTES}")
        return path.read_bytes()
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error.strerror}") from error


def _parse(path: Path, content: bytes) -> ModelProto:
    try:
        return ModelProto.FromString(content)
    except (DecodeError, RecursionError) as error:
        raise ArtifactError(f"{path} is no ONNX file or is damaged") from error


def _read_metadata(path: Path, model: ModelProto) -> tuple[str, dict[str, Any]]:
    """The text and what it says. Written in another way than ours it is not ours."""
    found = [entry.value for entry in model.metadata_props if entry.key == KEY]
    if len(found) != 1:
        raise ArtifactError(f"{path} has {len(found)} metadata entries {KEY!r}; allowed: 1")
    try:
        metadata = json.loads(found[0])
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{path} has metadata that are no JSON") from error
    version = metadata.get("format") if isinstance(metadata, dict) else None
    if version != FORMAT or isinstance(version, bool):
        raise ArtifactError(f"{path} has format {version!r}; allowed: {FORMAT}")
    kind, digest = metadata.get("kind"), metadata.get("sha256")
    if kind not in KINDS:
        raise ArtifactError(f"{path} has kind {kind!r}; allowed: {', '.join(KINDS)}")
    if not isinstance(digest, str) or not re.fullmatch("[0-9a-f]{64}", digest):
        raise ArtifactError(f"{path} has sha256 {digest!r}; allowed: 64 hexadecimal digits")
    if found[0] != metadata_text(metadata):
        raise ArtifactError(f"{path} has metadata that were edited: they are not in normal form")
    return found[0], metadata


def _own_hash(path: Path, content: bytes, text: str, metadata: dict[str, Any]) -> tuple[bytes, str]:
    """The content with zeros in the place of its hash, and the hash of that."""
    if content.count(text.encode()) != 1:
        raise ArtifactError(f"{path} is damaged: its metadata do not stand in it once")
    unsealed = content.replace(text.encode(), _with_hash(metadata, UNSEALED))
    return unsealed, hashlib.sha256(unsealed).hexdigest()


def _with_hash(metadata: dict[str, Any], digest: str) -> bytes:
    return metadata_text(metadata | {"sha256": digest}).encode()


def _data_file(path: Path, metadata: dict[str, Any]) -> tuple[Path | None, int]:
    """The data file and its size: of a plain name, beside the model, no link, as large as it was."""
    data = metadata.get("data")
    if data is None:
        return None, 0
    keys = {"file": str, "bytes": int, "sha256": str}
    if not isinstance(data, dict) or any(type(data.get(k)) is not t for k, t in keys.items()):
        raise ArtifactError(f"{path} has data {data!r}; allowed: null, or {', '.join(keys)}")
    name = data["file"]
    if name in ("", ".", "..") or re.search(r"[/\\:\0]", name):
        raise ArtifactError(f"{path} names the data file {name!r}; allowed: a plain file name")
    data_path = path.parent / name
    if data_path.is_symlink():
        raise ArtifactError(f"{data_path} is a link; allowed: a file beside {path.name}")
    if not data_path.is_file():
        raise ArtifactError(f"{data_path} is missing")
    size = data_path.stat().st_size
    if size != data["bytes"]:
        raise ArtifactError(f"{data_path} is damaged: {size} bytes; allowed: {data['bytes']}")
    return data_path, size


def _check_references(path: Path, model: ModelProto, data_path: Path | None, size: int) -> None:
    """Every tensor of the file, wherever it stands: graphs, attributes, sub-graphs, functions."""
    for message in _tensors_and_nodes(model):
        try:
            if isinstance(message, NodeProto):
                _check_node(message)
            else:
                _check_tensor(message, data_path, size)
        except ValueError as error:
            raise ArtifactError(f"{path}: {error}") from error


def _tensors_and_nodes(message: Message) -> Iterator[NodeProto | TensorProto]:
    """By reflection, so that no place where a tensor can stand is forgotten."""
    if isinstance(message, TensorProto):
        yield message
        return
    if isinstance(message, NodeProto):
        yield message
    for field, value in message.ListFields():
        if field.message_type is not None:
            for part in (value,) if isinstance(value, Message) else value:
                yield from _tensors_and_nodes(part)


def _check_node(node: NodeProto) -> None:
    if node.op_type in FILE_READERS:
        raise ValueError(f"operator {node.op_type} opens files of its own and is not allowed")


def _check_tensor(tensor: TensorProto, data_path: Path | None, size: int) -> None:
    external = tensor.data_location == TensorProto.EXTERNAL
    if not external and tensor.external_data:
        raise ValueError(f"tensor {tensor.name!r} has external_data but is not external")
    if external:
        start, length = _external_range(tensor, data_path)
        if start + length > size:
            raise ValueError(
                f"tensor {tensor.name!r} reads to byte {start + length} of {size} in its data file"
            )
    elif tensor.HasField("raw_data"):
        length = len(tensor.raw_data)
    else:
        return  # numbers one by one: the runtime counts them
    expected = _tensor_bytes(tensor)
    if length != expected:
        raise ValueError(
            f"tensor {tensor.name!r} has {length} bytes; its shape {list(tensor.dims)} takes"
            f" {expected}"
        )


def _tensor_bytes(tensor: TensorProto) -> int:
    names = {value: name for name, value in TensorProto.DataType.items()}
    name = names.get(tensor.data_type, str(tensor.data_type))
    if name not in SIZES_IN_BITS:
        raise ValueError(f"tensor {tensor.name!r} has type {name}, which is not allowed as bytes")
    if any(dim < 0 for dim in tensor.dims):
        raise ValueError(
            f"tensor {tensor.name!r} has shape {list(tensor.dims)}; allowed: 0 or more"
        )
    return (math.prod(tensor.dims) * SIZES_IN_BITS[name] + 7) // 8


def _external_range(tensor: TensorProto, data_path: Path | None) -> tuple[int, int]:
    """Where its bytes start, and how many they are."""
    entries = {entry.key: entry.value for entry in tensor.external_data}
    if len(entries) != len(tensor.external_data) or not entries.keys() <= EXTERNAL_KEYS:
        keys = [entry.key for entry in tensor.external_data]
        raise ValueError(f"tensor {tensor.name!r} has external_data {keys}")
    allowed = None if data_path is None else data_path.name
    if entries.get("location") != allowed or allowed is None:
        raise ValueError(
            f"tensor {tensor.name!r} reads {entries.get('location')!r}; allowed: {allowed!r}"
        )
    bounds = [entries.get("offset", "0"), entries.get("length", "")]
    if not all(re.fullmatch("[0-9]{1,18}", text) for text in bounds):
        raise ValueError(
            f"tensor {tensor.name!r} has offset and length {bounds}; allowed: integers"
        )
    return int(bounds[0]), int(bounds[1])


def _check_data(path: Path, expected: str, size: int, on_stage: Callable[..., None]) -> None:
    digest, done = hashlib.sha256(), 0
    try:
        with path.open("rb") as file:
            while block := file.read(BLOCK):
                digest.update(block)
                done += len(block)
                on_stage("check weights", min(done / size, 1.0))
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error.strerror}") from error
    if digest.hexdigest() != expected:
        raise ArtifactError(f"{path} is damaged: its SHA-256 is not the one it was saved with")
