"""What every node of a graph is when one token per row is decoded: found by running it on fake tensors.

Two runs, at other numbers of entries and capacities, tell what is fixed from what grows. Nothing is
concluded from names or from symbolic expressions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from codegen.step.extent import CAPACITY, ENTRIES, Extent

__all__ = ["Fact", "TensorFact", "probe"]

_POINTS = ({ENTRIES: 37, CAPACITY: 64}, {ENTRIES: 53, CAPACITY: 128})


@dataclass(frozen=True)
class TensorFact:
    """Shape and dtype of a tensor."""

    shape: tuple[Extent, ...]
    dtype: torch.dtype


Fact = TensorFact | Extent | tuple[Any, ...] | float | None
"""A tensor, an integer, several results, another constant, or nothing that can be said."""

UNKNOWN = object()


def probe(
    module: fx.GraphModule, inputs: Callable[[dict[str, int]], list[Any]]
) -> dict[fx.Node, Any]:
    """Facts of all nodes that can be run without values.

    Args:
        inputs: the placeholders' values for a number of entries and a capacity: tensors, integers or
            None; called where tensors made are fake.

    Returns:
        nodes to facts; those that need values, or whose results grow in another way, are absent.
    """
    runs = [_run(module, inputs, point) for point in _POINTS]
    facts = {}
    for node in module.graph.nodes:
        if all(node in run for run in runs):
            fact = _merged(runs[0][node], runs[1][node])
            if fact is not UNKNOWN:
                facts[node] = fact
    return facts


def _run(
    module: fx.GraphModule,
    inputs: Callable[[dict[str, int]], list[Any]],
    point: dict[str, int],
) -> dict[fx.Node, Any]:
    """Values by node, fake; what depends on a node that cannot be run is left out."""
    results: dict[fx.Node, Any] = {}
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
        given = iter(inputs(point))

        def fake(value: Any) -> Any:
            return mode.from_tensor(value) if isinstance(value, Tensor) else value

        interpreter = fx.Interpreter(module)
        for node in module.graph.nodes:
            if node.op == "placeholder":
                results[node] = next(given)
            elif node.op == "get_attr":
                results[node] = fake(interpreter.fetch_attr(str(node.target)))
            elif all(n in results for n in node.all_input_nodes) and node.op == "call_function":
                args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: results[n])
                try:
                    results[node] = node.target(*args, **kwargs)
                except Exception:  # whatever an operator says without values: it stays with PyTorch
                    continue
    return results


def _merged(a: Any, b: Any) -> Any:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        pairs = list(zip(a.shape, b.shape, strict=True))
        dims = [d for x, y in pairs if (d := _extent(int(x), int(y))) is not None]
        return TensorFact(tuple(dims), a.dtype) if len(dims) == len(pairs) else UNKNOWN
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)) and len(a) == len(b):
        return tuple(_merged(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, int) and isinstance(b, int) and not isinstance(a, bool):
        extent = _extent(a, b)
        return UNKNOWN if extent is None else extent
    return a if type(a) is type(b) and a == b else UNKNOWN


def _extent(a: int, b: int) -> Extent | None:
    if a == b:
        return a
    for name in (ENTRIES, CAPACITY):
        more = a - _POINTS[0][name]
        if more == b - _POINTS[1][name]:
            return (
                name if more == 0 else f"({name} + {more})" if more > 0 else f"({name} - {-more})"
            )
    return None
