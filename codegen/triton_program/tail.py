"""The pointwise nodes that a site took in: an epilogue for its kernel, and plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from codegen.epilogue import Epilogue
from codegen.followers import followers, operand_nodes

__all__ = ["Tail", "take"]


@dataclass(frozen=True)
class Tail:
    """What follows a site.

    Attributes:
        epilogue: for the kernel; empty where nothing follows.
        operands: nodes whose tensors it reads.
        nodes: the nodes themselves, in order.
        run: what they compute in PyTorch: `run(value, *operands)`.
    """

    epilogue: Epilogue
    operands: tuple[fx.Node, ...]
    nodes: tuple[fx.Node, ...]
    run: Callable[..., Tensor]


def take(node: fx.Node) -> Tail:
    """What follows `node`; the graph stays as it is."""
    epilogue, chain = followers(node)
    if not chain:
        return Tail(Epilogue(), (), (), _same)
    operands = operand_nodes(chain, node)
    graph, told = fx.Graph(), dict[fx.Node, Any]()
    for outside in (node, *operands):
        told[outside] = graph.placeholder(outside.name)
    for inner in chain:
        told[inner] = graph.node_copy(inner, told.__getitem__)
    graph.output(told[chain[-1]])
    return Tail(epilogue, operands, chain, fx.GraphModule(nn.Module(), graph).forward)


def _same(value: Tensor) -> Tensor:
    return value
