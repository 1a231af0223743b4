"""Pointwise nodes after a site, read off the graph as its epilogue.

They are translated node by node, so every mixture of the functions of `codegen.pointwise` fuses and
nothing is listed by hand.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from codegen.epilogue import OPERAND_DTYPES, VALUE, Epilogue, Operand, Step
from codegen.pointwise import Call, translate

__all__ = ["Untranslatable", "epilogue_of", "followers", "operand_nodes"]


@dataclass(frozen=True)
class Untranslatable:
    """Why a node cannot become part of an epilogue."""

    reason: str
    node: fx.Node


def epilogue_of(nodes: Sequence[fx.Node], value: fx.Node) -> Epilogue | Untranslatable:
    """The work of `nodes`, in graph order, the last of which is the result, on the site `value`.

    Nodes that do not lead to the last, such as assertions, are left out. Every other node they read
    becomes an operand, in the order of first use (`operand_nodes`). Shapes come from `meta["val"]`; rows
    are all leading dimensions of the value, flattened.
    """
    return _Translation(value).run(nodes)


def operand_nodes(nodes: Sequence[fx.Node], value: fx.Node) -> tuple[fx.Node, ...]:
    """The nodes whose tensors are the operands of `epilogue_of`, in the same order."""
    inside = {*nodes, value}
    outside = (arg for node in _leading(nodes) for arg in node.all_input_nodes if arg not in inside)
    return tuple(dict.fromkeys(outside))


def followers(node: fx.Node) -> tuple[Epilogue, tuple[fx.Node, ...]]:
    """The longest chain of pointwise nodes after `node`, each the only user of the one before.

    What else they read is there before `node` is, so of two sites whose results are added the later one
    has the sum.

    Returns:
        their work and themselves; nothing of either where there are none.
    """
    chain: list[fx.Node] = []
    best: tuple[Epilogue, tuple[fx.Node, ...]] = (Epilogue(), ())
    last = node
    while len(last.users) == 1:
        (last,) = last.users
        if last.op != "call_function":
            break
        chain.append(last)
        epilogue = epilogue_of(chain, node)
        late = any(operand > node for operand in operand_nodes(chain, node))
        if late or not isinstance(epilogue, Epilogue):
            break
        best = epilogue, tuple(chain)
    return best


class _Translation:
    """One run of `epilogue_of`."""

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
        for outside in operand_nodes(nodes, self.value):
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
        if example.dtype not in OPERAND_DTYPES:
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
        if example.dtype not in OPERAND_DTYPES:
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
