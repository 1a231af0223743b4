"""Arguments of a C entry point, by name: one struct in the text, the same one in Python."""

from __future__ import annotations

import ctypes
from typing import Any

from torch import Tensor

__all__ = ["Arguments"]

_TYPES = {
    "int64_t": ctypes.c_int64,
    "int": ctypes.c_int,
    "float": ctypes.c_float,
    "bool": ctypes.c_bool,
}


class Arguments:
    """Names and C types of what one entry point takes, e.g. `Arguments(q="const float*", rows="int64_t")`.

    Attributes:
        text: the definition of `struct Arguments` in C++.
    """

    def __init__(self, **fields: str) -> None:
        self.names = tuple(fields)
        lines = "".join(f"    {kind} {name};\n" for name, kind in fields.items())
        self.text = f"struct Arguments {{\n{lines}}};\n"
        members = [(n, _TYPES.get(kind, ctypes.c_void_p)) for n, kind in fields.items()]
        self._structure = type("Arguments", (ctypes.Structure,), {"_fields_": members})

    def call(self, function: Any, **values: Tensor | float | None) -> Any:
        """What `function(const Arguments*)` returns; tensors as addresses, what is not given as 0.

        Raises:
            TypeError: a name that is no field.
        """
        unknown = values.keys() - set(self.names)
        if unknown:
            raise TypeError(f"no such arguments: {', '.join(sorted(unknown))}")
        told = {
            name: value.data_ptr() if isinstance(value, Tensor) else value
            for name, value in values.items()
            if value is not None
        }
        return function(ctypes.byref(self._structure(**told)))
