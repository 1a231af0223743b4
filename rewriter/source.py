"""Where in the user's model a graph node comes from."""

from __future__ import annotations

import re

from torch import fx

__all__ = ["layer_index", "module_path", "source_line"]

_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+), in (?P<function>\S+)')


def source_line(node: fx.Node) -> str:
    """`file.py:line in function` of the innermost model frame, or `(no source)`."""
    frames = _FRAME.findall(node.meta.get("stack_trace") or "")
    if not frames:
        return "(no source)"
    file, line, function = frames[-1]
    return f"{'/'.join(file.split('/')[-2:])}:{line} in {function}"


def module_path(node: fx.Node) -> str:
    """Dotted path of the module that made the node, e.g. `model.layers.0.self_attn`; '' if unknown."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [str(path) for path, _ in stack.values()]
    return paths[-1] if paths else ""


def layer_index(node: fx.Node) -> int | None:
    """The first integer in the module path: the layer's number."""
    numbers = [part for part in module_path(node).split(".") if part.isdigit()]
    return int(numbers[0]) if numbers else None
