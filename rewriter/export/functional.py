"""A program as a function: state goes in and comes out, positions come from the caller's masks.

| placeholder of the program | becomes |
|---|---|
| `position_ids`, `q_positions`, `k_positions` | computed from `attention_mask` or true positions |
| `kv_offset`, `logits_to_keep` | nothing: entries are joined, the last real row is taken |
| a state | an input with what was kept; what is kept now is an output |
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from rewriter.export.ports import Functional, Port
from rewriter.export.stateless import Conversion, exchange
from rewriter.program import Program
from rewriter.verify.inputs import whole_scenarios
from rewriter.verify.verification import Verification

__all__ = ["functional"]


def functional(
    program: Program, *, ep: str = "portable", logits: str = "last", max_length: int | None = None
) -> Functional:
    """The function of a program that decodes, or of a plain module.

    Args:
        program: is not changed; the weights are shared.
        ep: "portable" or a provider of ONNX Runtime whose operators may be used.
        logits: "last" = of the last token of each row, "all" = of every one.
        max_length: positions for which rotary tables are stored; None = all that the model has.

    Raises:
        ExportError: state is used in a way that has no functional form.
    """
    if program.decoding is None:
        return _plain_module(program.clone())
    return Conversion(program.clone(), ep, logits, max_length).result()


def _plain_module(program: Program) -> Functional:
    """Operators exchanged, inputs and outputs as they are."""
    for node in program.graph.nodes:
        exchange(node)
    program.finish()
    inputs = tuple(Port(s.name, s.dtype, s.dims) for s in program.signature.inputs)
    scenario = whole_scenarios(program, Verification())[0]
    examples = tuple(scenario.inputs[port.name] for port in inputs)
    return Functional(program.module, inputs, _outputs(program), examples=examples)


def _outputs(program: Program) -> tuple[Port, ...]:
    """By the model's own names where its outputs have some."""
    known: dict[str, str] = {}
    for spec in program.signature.inputs:
        node = program.placeholder(spec.name)
        shape = node.meta["val"].shape if node is not None else ()
        known |= {str(e): d for e, d in zip(shape, spec.dims, strict=True) if isinstance(d, str)}
    names = program.signature.out_spec.context
    nodes: Any = program.graph.output_node().args[0]
    if not isinstance(names, list) or len(names) != len(nodes):
        names = ["output"] if len(nodes) == 1 else [f"output_{i}" for i in range(len(nodes))]
    return tuple(
        Port(str(name), node.meta["val"].dtype, _dims(node.meta["val"], known))
        for name, node in zip(names, nodes, strict=True)
    )


def _dims(value: Tensor, known: dict[str, str]) -> tuple[int | str, ...]:
    return tuple(e if isinstance(e, int) else known.get(str(e), str(e)) for e in value.shape)
