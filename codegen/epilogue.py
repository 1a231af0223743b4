"""Pointwise work on a kernel's result before it is stored, read off the graph and told in two languages.

An epilogue is a straight line of steps on one fp32 value, its operands and constants. It is translated
from FX nodes, node by node, so every mixture of the functions below fuses and nothing is listed by hand.
Rounding happens where the graph has a cast and at the end, not after every step. What the text of an
epilogue says depends on the functions and shapes alone: operands are numbered, so names in a model
never get into code, and equal work in two layers gives equal text.

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
from torch import Tensor, fx

from codegen.pointwise import FUNCTIONS, Call, translate
from rewriter.errors import InputError

__all__ = ["Epilogue", "Operand", "Step", "Untranslatable", "cpp_constant"]

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


@dataclass(frozen=True)
class Untranslatable:
    """Why a node cannot become part of an epilogue."""

    reason: str
    node: fx.Node


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

    def __str__(self) -> str:
        """The steps as text, e.g. `t0=silu(value);t1=mul(t0,element_0)`."""
        shown = (
            f"t{i}={step.function}({','.join(map(str, step.arguments))})"
            for i, step in enumerate(self.steps)
        )
        return ";".join(shown) or VALUE

    @staticmethod
    def from_nodes(nodes: Sequence[fx.Node], value: fx.Node) -> Epilogue | Untranslatable:
        """The work of `nodes`, in graph order, the last of which is the result, on the site `value`.

        Nodes that do not lead to the last, such as assertions, are left out. Every other node they
        read becomes an operand, in the order of first use (`operand_nodes`). Shapes come from
        `meta["val"]`; rows are all leading dimensions of the value, flattened.
        """
        return _Translation(value).run(nodes)

    @staticmethod
    def operand_nodes(nodes: Sequence[fx.Node], value: fx.Node) -> tuple[fx.Node, ...]:
        """The nodes whose tensors are the operands of `from_nodes`, in the same order."""
        inside = {*nodes, value}
        outside = (
            arg for node in _leading(nodes) for arg in node.all_input_nodes if arg not in inside
        )
        return tuple(dict.fromkeys(outside))

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


class _Translation:
    """One run of `Epilogue.from_nodes`."""

    def __init__(self, value: fx.Node) -> None:
        self.value = value
        self.shape = _shape(value)
        self.names: dict[fx.Node, str | float] = {value: VALUE}
        self.steps: list[Step] = []
        self.operands: list[Operand] = []

    def run(self, nodes: Sequence[fx.Node]) -> Epilogue | Untranslatable:
        if self.shape is None:
            return Untranslatable("its shape is not known", self.value)
        if not nodes:
            return Epilogue()
        for outside in Epilogue.operand_nodes(nodes, self.value):
            refusal = self._add_operand(outside)
            if refusal is not None:
                return Untranslatable(refusal, outside)
        for node in _leading(nodes):
            refusal = self._add_step(node)
            if refusal is not None:
                return Untranslatable(refusal, node)
        return self._finish(nodes[-1])

    def _finish(self, last: fx.Node) -> Epilogue | Untranslatable:
        if not _same(_shape(last), self.shape):
            return Untranslatable("its shape is not that of the site's result", last)
        dtype = last.meta["val"].dtype
        if dtype == torch.bool:
            return Untranslatable("its result is bool, not a float", last)
        if not isinstance(self.names[last], str):
            return Untranslatable("its result is a constant", last)
        if self.names[last] != f"t{len(self.steps) - 1}":  # an alias of something earlier
            self._emit(Call("copy", (self.names[last],)))
        return Epilogue(tuple(self.steps), tuple(self.operands), dtype)

    def _add_operand(self, node: fx.Node) -> str | None:
        example = node.meta.get("val")
        if not isinstance(example, Tensor):
            return "it is an operand that is no tensor"
        if example.dtype not in _CPP_TYPES:
            return f"it is an operand of {example.dtype}, not float32, bfloat16, float16 or bool"
        kind = _kind(tuple(example.shape), self.shape or ())
        if kind is None:
            return f"it broadcasts over {self.shape} by neither rows nor columns: {tuple(example.shape)}"
        name = f"{kind}_{sum(o.kind == kind for o in self.operands)}"
        self.operands.append(Operand(name, kind, example.dtype))
        self.names[node] = name
        return None

    def _add_step(self, node: fx.Node) -> str | None:
        example = node.meta.get("val")
        if not isinstance(example, Tensor):
            return "its dtype is not known"
        if example.dtype not in _CPP_TYPES:
            return f"it gives {example.dtype}, not float32, bfloat16, float16 or bool"
        calls = translate(node)
        if isinstance(calls, str):
            return calls
        result: str | float = ""
        for call in calls:
            wrong = next((a for a in call.arguments if not self._is_known(a)), None)
            if wrong is not None:
                return f"an argument is a {type(wrong).__name__}, not a tensor or a constant"
            arguments = tuple(self._argument(a, result) for a in call.arguments)
            same = call.function == "copy"
            result = arguments[0] if same else self._emit(Call(call.function, arguments))
        self.names[node] = result
        return None

    def _emit(self, call: Call) -> str:
        self.steps.append(Step(call.function, call.arguments))
        return f"t{len(self.steps) - 1}"

    def _is_known(self, argument: Any) -> bool:
        """Whether it is a node that has a name, a number, or the result before; texts are not."""
        if isinstance(argument, fx.Node):
            return argument in self.names
        return argument is Call.PREVIOUS or isinstance(argument, bool | int | float)

    def _argument(self, argument: Any, previous: str | float) -> str | float:
        if argument is Call.PREVIOUS:
            return previous
        return self.names[argument] if isinstance(argument, fx.Node) else float(argument)


def _leading(nodes: Sequence[fx.Node]) -> list[fx.Node]:
    """Those that the last one depends on, in the same order."""
    wanted = set(nodes[-1:])
    for node in reversed(nodes):
        if node in wanted:
            wanted.update(node.all_input_nodes)
    return [node for node in nodes if node in wanted]


def _shape(node: fx.Node) -> tuple[Any, ...] | None:
    example = node.meta.get("val")
    return tuple(example.shape) if isinstance(example, Tensor) else None


def _same(a: tuple[Any, ...] | None, b: tuple[Any, ...] | None) -> bool:
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    if a is None or b is None or len(a) != len(b):
        return False
    return all(statically_known_true(x == y) for x, y in zip(a, b, strict=True))


def _kind(shape: tuple[Any, ...], whole: tuple[Any, ...]) -> str | None:
    """How an operand of `shape` broadcasts over `whole`; None where one stride a row cannot say it."""
    if len(shape) > len(whole):
        return None
    shape = (1,) * (len(whole) - len(shape)) + shape
    if _same(shape, whole):
        return "element"
    if _same(shape, (1,) * len(whole)):
        return "scalar"
    if _same(shape[:-1], (1,) * (len(whole) - 1)) and _same(shape[-1:], whole[-1:]):
        return "column"
    if _same(shape, (*whole[:-1], 1)):
        return "row"
    return None


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
