"""Shape and dtype of every value of a graph at one set of extents, without computing anything."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils import _pytree as pytree

from rewriter.program import Dim, Program

__all__ = ["ShapeError", "Shapes", "same_form"]

EXTENTS = {"batch": 2, "seq": 5, "capacity": 16}
"""Extents of the dynamic dimensions; any other one has `OTHER`."""
OTHER = 7
KV_OFFSET = 3
"""Entries kept before the call: a decoding program is looked at in the middle of a sequence."""

Form = tuple[tuple[Dim, ...], torch.dtype] | int
"""Dimensions and dtype of an input tensor, or the value of an input number."""


class ShapeError(Exception):
    """An operator does not accept the shapes or dtypes it is given."""

    def __init__(self, node: fx.Node, error: Exception) -> None:
        super().__init__(f"{node.name} ({node.target}): {str(error).splitlines()[0]}")


@dataclass
class Shapes:
    """Fake values by node name; a node whose value cannot be told without data is absent."""

    mode: FakeTensorMode = field(default_factory=lambda: FakeTensorMode(allow_non_fake_inputs=True))
    values: dict[str, Any] = field(default_factory=dict)
    inputs: dict[str, Form] = field(default_factory=dict)

    @classmethod
    def of(cls, program: Program) -> Shapes:
        """Of every node of a program that is taken to be right."""
        shapes = cls()
        shapes.learn(program, program.graph.nodes, demanding=False)
        return shapes

    def copy(self) -> Shapes:
        """Independent of this one from here on."""
        return Shapes(self.mode, dict(self.values), dict(self.inputs))

    def learn(self, program: Program, nodes: Iterable[fx.Node], *, demanding: bool = True) -> None:
        """Evaluate these nodes, given in graph order, and inputs that are new or changed.

        Raises:
            ShapeError: with `demanding`, an operator rejects inputs that are known.
        """
        self._learn_inputs(program)
        for node in nodes:
            if node.op in ("get_attr", "call_function"):
                self._learn(program, node, demanding)

    def _learn_inputs(self, program: Program) -> None:
        forms = _input_forms(program)
        for name, form in forms.items():
            if self.inputs.get(name) != form:
                self.values[name] = self._input(form)
        self.inputs = forms

    def _input(self, form: Form) -> Any:
        if isinstance(form, int):
            return form
        dims, dtype = form
        shape = [EXTENTS.get(dim, OTHER) if isinstance(dim, str) else dim for dim in dims]
        with self.mode:
            return torch.empty(shape, dtype=dtype)

    def _learn(self, program: Program, node: fx.Node, demanding: bool) -> None:
        self.values.pop(node.name, None)
        if any(source.name not in self.values for source in node.all_input_nodes):
            return
        try:
            self.values[node.name] = self._value(program, node)
        except DataDependentOutputException:
            return
        except Exception as error:  # whatever an operator's fake kernel raises
            if demanding:
                raise ShapeError(node, error) from error

    def _value(self, program: Program, node: fx.Node) -> Any:
        if node.op == "get_attr":
            held = operator.attrgetter(str(node.target))(program.module)
            return self.mode.from_tensor(held, static_shapes=True)
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: self.values[n.name])
        with self.mode:
            return node.target(*args, **kwargs)  # pyright: ignore[reportCallIssue]


def same_form(a: Any, b: Any) -> bool:
    """Whether two values, or all values in two nests, agree in dtype and shape, or are equal."""
    flat_a, spec_a = pytree.tree_flatten(a)
    flat_b, spec_b = pytree.tree_flatten(b)
    return spec_a == spec_b and all(_alike(x, y) for x, y in zip(flat_a, flat_b, strict=True))


def _alike(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and a.shape == b.shape
    return type(a) is type(b) and bool(a == b)


def _input_forms(program: Program) -> dict[str, Form]:
    """What every placeholder holds."""
    forms: dict[str, Form] = {s.name: (s.dims, s.dtype) for s in program.signature.inputs}
    if program.decoding is None:
        return forms
    forms |= {state.name: (state.dims, state.dtype) for state in program.decoding.states}
    kept = KV_OFFSET + EXTENTS["seq"]
    forms["q_positions"] = (("batch", "seq"), torch.int64)
    forms["k_positions"] = (("batch", kept), torch.int64)
    return forms | {"kv_offset": KV_OFFSET, "logits_to_keep": 0}
