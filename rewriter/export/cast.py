"""A program in another floating-point dtype: weights, state, and the casts that its graph spells out."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.fx.node import map_aggregate

from rewriter.program import Program

__all__ = ["cast", "weight_dtype"]


def weight_dtype(program: Program) -> torch.dtype:
    """The dtype of most numbers among the weights; fp32 where there are none."""
    counts: Counter[torch.dtype] = Counter()
    for parameter in program.module.parameters():
        if parameter.is_floating_point():
            counts[parameter.dtype] += parameter.numel()
    return counts.most_common(1)[0][0] if counts else torch.float32


def cast(program: Program, dtype: torch.dtype) -> Program:
    """A program that computes in `dtype` where it computed in the dtype of its weights.

    What has another dtype already, such as angles in fp32, stays. The program given is not changed.
    """
    old = weight_dtype(program)
    if old is dtype:
        return program
    program = program.clone()
    made: dict[int, nn.Parameter] = {}
    kept = list[nn.Parameter]()
    for node in program.graph.find_nodes(op="get_attr"):
        path, _, leaf = str(node.target).rpartition(".")
        owner = program.module.get_submodule(path)
        value = getattr(owner, leaf)
        if not isinstance(value, nn.Parameter) or value.dtype is not old:
            continue
        if id(value) not in made:
            made[id(value)] = nn.Parameter(value.detach().to(dtype), requires_grad=False)
        setattr(owner, leaf, made[id(value)])
        kept.append(value)  # or another one could come to have its id

    def other(value: Any) -> Any:
        return dtype if value is old else value

    for node in program.graph.nodes:
        node.args = map_aggregate(node.args, other)
        node.kwargs = map_aggregate(node.kwargs, other)
    program.finish()
    if program.decoding is not None:
        states = [replace(s, dtype=dtype) if s.dtype is old else s for s in program.decoding.states]
        program.decoding = replace(program.decoding, states=tuple(states))
    return program
