"""What a trace took for granted about sizes, beyond the dimensions it fixed."""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch.export import ExportedProgram

from rewriter.program import InputSpec

__all__ = ["conditions"]

_SIZE = re.compile(r"L\['(?P<input>\w+)'\]\.size\(\)\[(?P<dim>\d+)\]")
_SAME_SIZE = re.compile(r"\w+\.shape\[\d+\] == \w+\.shape\[\d+\]")


def conditions(exported: ExportedProgram, inputs: Sequence[InputSpec]) -> tuple[str, ...]:
    """Conditions on the inputs under which the graph is the model, e.g. `input_ids.shape[1] <= 256`.

    Equal sizes are left out: such dimensions share a name in the signature. Branches of the model
    that were decided by the example's sizes show up here.
    """
    found = [_readable(code) for code in getattr(exported, "_guards_code", [])]
    names = {spec.name for spec in inputs}
    kept = [text for text in found if not _SAME_SIZE.fullmatch(text)]
    return tuple(text for text in kept if any(name in text for name in names))


def _readable(code: str) -> str:
    return _SIZE.sub(r"\g<input>.shape[\g<dim>]", code)
