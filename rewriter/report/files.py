"""Files that are there whole or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from rewriter.errors import ConfigError

__all__ = ["write_file"]


def write_file(path: Path, content: bytes, field: str) -> None:
    """Write in one step. Raises ConfigError, naming the option `field`, when it cannot be written."""
    folder = path.absolute().parent
    try:
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=folder) as temporary:
            written = Path(temporary) / path.name
            written.write_bytes(content)
            os.replace(written, path)
    except OSError as error:
        raise ConfigError(field, str(path), f"a writable file ({error.strerror})") from error
