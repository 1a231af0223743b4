"""Pointwise work on a kernel's result before it is stored, told in two languages.

An epilogue is a straight line of steps on one fp32 value, its operands and constants; `followers`
reads it off a graph. Rounding happens where the graph has a cast and at the end, not after every step.
What the text of an epilogue says depends on the functions and shapes alone: operands are numbered, so
names in a model never get into code, and equal work in two layers gives equal text.

The C++ text calls `rw::exp_ tanh_ erf_ sigmoid silu gelu gelu_tanh relu` (float to float),
`rw::to_float(T)`, `rw::round_bf16(float)`, `rw::round_f16(float)` and `std::log sqrt sin cos fabs`.
The Triton text calls `tanh`, `silu`, `gelu` and `gelu_tanh` of `codegen.triton_kernels.activations`.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from codegen.pointwise import FUNCTIONS
from rewriter.errors import InputError

__all__ = ["OPERAND_DTYPES", "VALUE", "Epilogue", "Operand", "Step", "cpp_constant"]

VALUE = "value"
"""The site's own result in a step's arguments."""

_CPP_TYPES = {
    torch.float32: "float",
    torch.bfloat16: "rw::bf16",
    torch.float16: "rw::f16",
    torch.bool: "bool",
}
_TRITON_TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.bool: "i1",
}
OPERAND_DTYPES = tuple(_TRITON_TYPES)
"""What operands and the values between steps may be."""


@dataclass(frozen=True)
class Operand:
    """A tensor that an epilogue reads besides the site's result.

    Attributes:
        name: `<kind>_<number>`, unique in its epilogue.
        kind: `"element"` (the result's shape), `"row"` (one for each row), `"column"` or `"scalar"`.
        dtype: float32, bfloat16, float16 or bool.
    """

    name: str
    kind: str
    dtype: torch.dtype


@dataclass(frozen=True)
class Step:
    """`function(*arguments)`; an argument is `"value"`, an operand, `"t<i>"` for step i, or a constant."""

    function: str
    arguments: tuple[str | float, ...]


@dataclass(frozen=True)
class Epilogue:
    """A pure function of one value and its operands, at each of [rows, columns].

    Attributes:
        steps: the last one is the result; none means the value itself.
        operands: in the order in which a kernel takes them.
        dtype: of the result, or None for the dtype that the site has without it.
    """

    steps: tuple[Step, ...] = ()
    operands: tuple[Operand, ...] = ()
    dtype: torch.dtype | None = None

    def __bool__(self) -> bool:
        """Whether it does anything."""
        return bool(self.steps) or self.dtype is not None

    def __str__(self) -> str:
        """The steps as text, e.g. `t0=silu(value);t1=mul(t0,element_0)`."""
        shown = (
            f"t{i}={step.function}({','.join(map(str, step.arguments))})"
            for i, step in enumerate(self.steps)
        )
        return ";".join(shown) or VALUE

    def after_bias(self, dtype: torch.dtype) -> Epilogue:
        """The same on the value plus one number for each column, which becomes the first operand."""
        columns = [o for o in self.operands if o.kind == "column"]
        names = {VALUE: "t0"} | {f"t{i}": f"t{i + 1}" for i in range(len(self.steps))}
        names |= {o.name: f"column_{i}" for i, o in enumerate(columns, start=1)}
        moved = tuple(
            Step(
                s.function, tuple(names.get(a, a) if isinstance(a, str) else a for a in s.arguments)
            )
            for s in self.steps
        )
        others = (Operand(names.get(o.name, o.name), o.kind, o.dtype) for o in self.operands)
        bias = Operand("column_0", "column", dtype)
        return Epilogue((Step("add", (VALUE, bias.name)), *moved), (bias, *others), self.dtype)

    @property
    def functions(self) -> frozenset[str]:
        """Names of the functions that are called."""
        return frozenset(step.function for step in self.steps)

    def triton_parameters(self) -> dict[str, str]:
        """Parameters that a kernel takes for the operands, in order, with their types in a signature.

        Compiled ahead of time, columns of an operand are one element apart; at run time they may not be.
        """
        return {
            f"{o.name}_{part}": kind.format(_TRITON_TYPES[o.dtype])
            for o in self.operands
            for part, kind in (("ptr", "*{}:16"), ("row_stride", "i64"), ("column_stride", "i64:1"))
        }

    def triton_lines(
        self, value: str, row: str, column: str, row_mask: str = "True", column_mask: str = "True"
    ) -> list[str]:
        """Lines that load the operands and assign the result to `value`, an fp32 tile.

        Args:
            value: a name in the kernel.
            row, column: expressions of int64 indices that broadcast to the tile's shape.
            row_mask, column_mask: expressions of their validity; `"True"` where all are valid.
        """
        lines = []
        for o in self.operands:
            row_of, column_of = o.kind in ("row", "element"), o.kind in ("column", "element")
            at = f"{o.name}_ptr"
            at += f" + {_bracketed(row)} * {o.name}_row_stride" if row_of else ""
            at += f" + {_bracketed(column)} * {o.name}_column_stride" if column_of else ""
            masks = [
                f"({m})"
                for m, used in ((row_mask, row_of), (column_mask, column_of))
                if m != "True" and used
            ]
            mask = f", mask={' & '.join(masks)}, other=0" if masks else ""
            convert = " != 0" if o.dtype == torch.bool else ".to(tl.float32)"
            lines.append(f"{o.name} = tl.load({at}{mask}){convert}")
        return [*lines, *self._assignments("triton", value, "")]

    def cpp_parameters(self) -> list[str]:
        """Parameters of a C++ function for the operands: pointer, row and column stride of each."""
        return [
            text
            for o in self.operands
            for text in (
                f"const {_CPP_TYPES[o.dtype]}* {o.name}",
                f"int64_t {o.name}_row_stride",
                f"int64_t {o.name}_column_stride",
            )
        ]

    def cpp_lines(self, value: str, row: str, column: str) -> list[str]:
        """Statements that assign the result to `value`, a float, at an int64_t row and column."""
        lines = []
        for o in self.operands:
            terms = (
                [f"{_bracketed(row)} * {o.name}_row_stride"] if o.kind in ("row", "element") else []
            )
            terms += (
                [f"{_bracketed(column)} * {o.name}_column_stride"]
                if o.kind in ("column", "element")
                else []
            )
            load = f"{o.name}[{' + '.join(terms) or '0'}]"
            kind = "bool" if o.dtype == torch.bool else "float"
            read = load if o.dtype == torch.bool else f"rw::to_float({load})"
            lines.append(f"const {kind} {o.name}_value = {read};")
        return [*lines, *(f"{line};" for line in self._assignments("cpp", value, "_value"))]

    def cpp_expression(self, value: str, row: str, column: str) -> str:
        """The result as one C++ expression of `value`, a float that is not changed."""
        lines = self.cpp_lines("result", row, column)
        return f"[&] {{ float result = {value}; {' '.join(lines)} return result; }}()"

    def launch_arguments(self, operands: Sequence[Tensor], rows: int, columns: int) -> list[Any]:
        """Tensors and strides, in the order of the parameters, for a result of [rows, columns].

        Raises:
            InputError: too few or too many operands, or one of another dtype or size.
        """
        if len(operands) != len(self.operands):
            told = f"{len(operands)} operands for an epilogue that takes {len(self.operands)}"
            raise InputError(told)
        flat = [_flat(o, t, rows, columns) for o, t in zip(self.operands, operands, strict=True)]
        return [part for t in flat for part in (t, t.stride(0), t.stride(1))]

    def reference(self, value: Tensor, operands: Sequence[Tensor] = ()) -> Tensor:
        """The result for `value` [rows, columns] in fp32, cast to `dtype` where it is given."""
        rows, columns = value.shape
        names: dict[str, Tensor] = {VALUE: value.float()}
        for o, tensor in zip(self.operands, operands, strict=True):
            flat = _flat(o, tensor, rows, columns)
            names[o.name] = flat if o.dtype == torch.bool else flat.float()
        result = names[VALUE]
        for i, step in enumerate(self.steps):
            arguments = [names[a] if isinstance(a, str) else a for a in step.arguments]
            result = names[f"t{i}"] = FUNCTIONS[step.function].torch(*arguments)
        result = result.expand(rows, columns)
        return result if self.dtype is None else result.to(self.dtype)

    def _assignments(self, language: str, value: str, suffix: str) -> list[str]:
        names = {VALUE: value} | {o.name: o.name + suffix for o in self.operands}
        names |= {f"t{i}": f"t{i}" for i in range(len(self.steps))}
        show = _triton_constant if language == "triton" else cpp_constant
        lines = []
        for i, step in enumerate(self.steps):
            function = FUNCTIONS[step.function]
            arguments = [names[a] if isinstance(a, str) else show(a) for a in step.arguments]
            text = getattr(function, language).format(*arguments)
            last = i == len(self.steps) - 1
            declared = f"const {'bool' if function.is_bool else 'float'} t{i}"
            target = value if last else declared if language == "cpp" else f"t{i}"
            lines.append(f"{target} = {text}")
        return lines


def _flat(operand: Operand, tensor: Tensor, rows: int, columns: int) -> Tensor:
    """The operand's tensor as [rows or 1, columns or 1]."""
    shape = {
        "element": (rows, columns),
        "row": (rows, 1),
        "column": (1, columns),
        "scalar": (1, 1),
    }[operand.kind]
    if tensor.dtype != operand.dtype:
        raise InputError(f"{operand.name}: {tensor.dtype} where {operand.dtype} is expected")
    if tensor.numel() != shape[0] * shape[1]:
        raise InputError(f"{operand.name}: shape {tuple(tensor.shape)} is not {shape}")
    return tensor.reshape(shape)


def _bracketed(expression: str) -> str:
    """With brackets around it unless it is a name, indexed or not."""
    return expression if re.fullmatch(r"\w+(\[[\w:, ]*\])?", expression) else f"({expression})"


def _rounded(value: float) -> float:
    """To fp32, which is what kernels compute in; beyond its range infinite."""
    try:
        return struct.unpack("f", struct.pack("f", value))[0]
    except OverflowError:
        return math.copysign(math.inf, value)


def _triton_constant(value: float) -> str:
    value = _rounded(value)
    return repr(value) if math.isfinite(value) else f'float("{value}")'


def cpp_constant(value: float) -> str:
    """A C++ expression of this number, rounded to fp32."""
    value = _rounded(value)
    if math.isfinite(value):
        return f"{value!r}f" if value >= 0 else f"({value!r}f)"
    return "NAN" if math.isnan(value) else "INFINITY" if value > 0 else "(-INFINITY)"
