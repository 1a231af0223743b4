"""The structure of a model's inputs and outputs as JSON and back.

| stored | stands for |
|---|---|
| `null` | one value |
| `{"tuple": [...]}`, `{"list": [...]}` | a tuple, a list |
| `{"dict": [...], "keys": [...]}` | a dict |
| `{"fields": [...], "names": [...], "absent": [...], "class": "..."}` | an object with fields |

Reading imports nothing but output classes of transformers. A class that this process does not know
becomes a `Record` with the same fields.
"""

from __future__ import annotations

import importlib
import re
import sys
from collections import OrderedDict, namedtuple
from typing import Any

from torch.utils import _pytree as pytree

from rewriter.errors import ArtifactError

__all__ = ["Record", "tree_from_json", "tree_to_json"]

_OUTPUT_MODULE = re.compile(r"transformers\.(modeling_outputs|models\.\w+\.modeling_\w+)")
_LEAF = pytree.tree_structure(0)


class Record(OrderedDict[str, Any]):
    """Named fields of an output whose class is not known here; also reads as attributes."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


pytree.register_pytree_node(
    Record,
    lambda record: (list(record.values()), list(record)),
    lambda values, names: Record(zip(names, values, strict=True)),
)


def tree_to_json(spec: pytree.TreeSpec) -> Any:
    """Plain JSON types. Raises ArtifactError for a container that cannot be stored."""
    if spec.is_leaf():
        return None
    children = [tree_to_json(child) for child in spec.children()]
    if spec.type in (tuple, list):
        return {spec.type.__name__: children}
    if spec.type in (dict, OrderedDict):
        return {"dict": children, "keys": list(spec.context)}
    names, absent = _field_names(spec)
    return {"fields": children, "names": names, "absent": absent, "class": _class_name(spec)}


def _field_names(spec: pytree.TreeSpec) -> tuple[list[str], list[str]]:
    """Names of the fields that hold values, and of those that are None."""
    context: Any = spec.context
    if spec.type is namedtuple:
        return list(context._fields), []
    nested = isinstance(context, list) and len(context) == 2 and isinstance(context[0], list)
    names, absent = context if nested else (context, [])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ArtifactError(f"an input or output of type {_class_name(spec)} cannot be saved")
    return list(names), list(absent)


def _class_name(spec: pytree.TreeSpec) -> str:
    kind: Any = spec.context if spec.type is namedtuple else spec.type
    return f"{kind.__module__}.{kind.__qualname__}"


def tree_from_json(stored: Any) -> pytree.TreeSpec:
    """The inverse. Raises ArtifactError for what `tree_to_json` does not write."""
    if stored is None:
        return _LEAF
    match stored:
        case {"tuple": list(children)}:
            return pytree.TreeSpec(tuple, None, _children(children))
        case {"list": list(children)}:
            return pytree.TreeSpec(list, None, _children(children))
        case {"dict": list(children), "keys": list(keys)} if len(keys) == len(children):
            return pytree.TreeSpec(dict, keys, _children(children))
        case {
            "fields": list(children),
            "names": list(names),
            "absent": list(absent),
            "class": str(name),
        }:
            if len(names) == len(children):
                return _fields(name, names, absent, _children(children))
    raise ArtifactError(f"unknown structure of inputs or outputs: {str(stored)[:80]}")


def _children(stored: list[Any]) -> list[pytree.TreeSpec]:
    return [tree_from_json(child) for child in stored]


def _fields(
    class_name: str, names: list[str], absent: list[str], children: list[pytree.TreeSpec]
) -> pytree.TreeSpec:
    kind = _known_class(class_name)
    if kind is None:
        return pytree.TreeSpec(Record, names, children)
    if issubclass(kind, tuple):
        return pytree.TreeSpec(namedtuple, kind, children)  # pyright: ignore
    context = names if issubclass(kind, dict) else [names, absent]
    return pytree.TreeSpec(kind, context, children)


def _known_class(name: str) -> Any:
    """A class that this process knows: an output, of transformers or not, or a named tuple."""
    module_name, _, class_name = name.rpartition(".")
    if _OUTPUT_MODULE.fullmatch(module_name):
        _import(module_name)
    for kind in pytree.SUPPORTED_NODES:
        if isinstance(kind, type) and f"{kind.__module__}.{kind.__qualname__}" == name:
            return kind
    kind = getattr(sys.modules.get(module_name), class_name, None)
    is_named_tuple = isinstance(kind, type) and issubclass(kind, tuple) and hasattr(kind, "_fields")
    return kind if is_named_tuple else None


def _import(module_name: str) -> None:
    try:
        importlib.import_module(module_name)
    except ImportError:  # another version of transformers: its fields are read all the same
        return
