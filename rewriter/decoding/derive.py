"""Incremental decoding as a rewrite: `attention(q, k, v)` becomes attention over kept entries.

Correct by construction when causal attention is all that mixes tokens, which `mixing` establishes.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from rewriter.capture.guards import violated
from rewriter.decoding.mixing import mixing_operator, vocabulary
from rewriter.decoding.own_positions import own_positions, read_positions
from rewriter.dialect import OPS
from rewriter.engine.miss import Miss
from rewriter.engine.site import Site, bound_arguments, sites
from rewriter.program import Decoding, Program, StateSpec

__all__ = ["derive"]

aten = torch.ops.aten
SUBJECT = "derive-decoding"
CAUSAL_MASKS = ("causal", "sliding_window", "chunked")
END = 9223372036854775807
OWN_POSITIONS = "positions are generated inside the model and could not be replaced by position_ids"
CALL_LENGTH = "what a token gives depends on how many tokens come with it"
LENGTHS, LONGEST = (2, 3, 7, 20, 65, 130, 515), 4096
"""Numbers of tokens at which the conditions of the trace have to hold; at most, where no limit is known."""
TAIL = frozenset(
    {
        aten.mul.Tensor,
        aten.div.Tensor,
        aten.mul.Scalar,
        aten.div.Scalar,
        aten.tanh.default,
        aten._to_copy.default,
        aten.to.dtype,
        aten.clone.default,
        aten.neg.default,
    }
)
"""What may stand between the last projection and the logits: one token at a time, one tensor input."""


def derive(program: Program) -> Program | Miss:
    """A program that decodes incrementally over state it owns, or why there is none.

    Args:
        program: a raised causal LM with inputs `input_ids` and, where the model has it, `position_ids`.
            It is not changed.

    Returns:
        a new program with `decoding` set: prefill, chunked prefill and decode are calls of one graph.
    """
    names = {spec.name for spec in program.signature.inputs}
    if "input_ids" not in names or not names <= {"input_ids", "position_ids"}:
        return Miss(
            SUBJECT, f"expected the inputs input_ids and position_ids, found {sorted(names)}"
        )
    attentions = sites(program, "attention")
    if not attentions:
        node = mixing_operator(program)
        if node is None:
            return Miss(SUBJECT, "no attention was raised")
        return Miss.at(node, SUBJECT, f"no attention was raised, and {node.target} mixes tokens")
    for site in attentions:
        miss = _not_causal(site)
        if miss is not None:
            return miss
    mixer = mixing_operator(program)
    if mixer is not None:
        return Miss.at(mixer, SUBJECT, f"{mixer.target} mixes tokens and is not causal attention")
    for baked in program.baked:
        reason = (
            f"capture fixed dimension {baked.dim} of {baked.input} at {baked.value}: {baked.reason}"
        )
        return Miss(SUBJECT, reason)
    guard = _broken_guard(program)
    if guard:
        return Miss(SUBJECT, f"the model takes another path where this does not hold: {guard}")
    return _derive_checked(program.clone())


def _broken_guard(program: Program) -> str:
    """A condition of the trace that some number of tokens in the model's range breaks; "" if none."""
    limit = _position_limit(program) or LONGEST
    lengths = [n for n in (*LENGTHS, limit) if n <= limit]
    for length in lengths:
        row = torch.empty(2, length, dtype=torch.int64, device="meta")
        sizes = {spec.name: row for spec in program.signature.inputs}
        guard = violated(program.meta.get("guards", ()), sizes)
        if guard is not None:
            return guard
    return ""


def _not_causal(site: Site) -> Miss | None:
    """Why an attention cannot run incrementally."""
    node, arguments = site.node, site.arguments
    assert node is not None
    if arguments["mask"] not in CAUSAL_MASKS:
        reason = f"mask {arguments['mask']!r} lets tokens see later ones"
        return Miss.at(node, SUBJECT, reason, site=site.label)
    if arguments["bias"] is not None:
        return Miss.at(node, SUBJECT, "its bias is a tensor over all positions", site=site.label)
    q, k = (arguments[name].meta["val"] for name in ("q", "k"))
    if str(q.shape[2]) != str(k.shape[2]):
        reason = f"queries and keys differ in length: {q.shape[2]} and {k.shape[2]}"
        return Miss.at(node, SUBJECT, reason, site=site.label)
    return None


def _derive_checked(program: Program) -> Program | Miss:
    """Derivation proper, once only causal attention is left to mix tokens."""
    if own_positions(program) is not None:
        counts = read_positions(program)
        try:
            node = own_positions(program)
        except RuntimeError as error:  # shapes that hold for equal positions in every row only
            reason = str(error).splitlines()[0]
            return Miss(SUBJECT, f"positions cannot be read from position_ids: {reason}")
        if node is not None:
            return Miss.at(node, SUBJECT, OWN_POSITIONS if counts else CALL_LENGTH)
    limit = _position_limit(program)
    _inputs(program, limit)
    for index, site in enumerate(sites(program, "attention")):
        _keep_entries(program, site, index)
    _keep_last_logits(program)
    program.finish()
    return program


def _position_limit(program: Program) -> int | None:
    limit = program.meta.get("max_positions")
    return int(limit) if limit else None


def _inputs(program: Program, limit: int | None) -> None:
    """Append the placeholders that a session feeds."""
    names = ("position_ids", "q_positions", "k_positions", "kv_offset", "logits_to_keep")
    for name in names:
        if program.placeholder(name) is None:
            with program.graph.inserting_after(program.placeholders()[-1]):
                program.graph.placeholder(name)
    program.meta["vocab_size"] = vocabulary(program)
    program.decoding = Decoding(states=(), max_positions=limit)


def _entry_count(program: Program) -> fx.Node:
    """kv_offset + q_len, one node for all layers."""
    offset, ids = program.placeholder("kv_offset"), program.placeholder("input_ids")
    assert offset is not None
    for node in program.calls(operator.add):
        if node.args[0] is offset:
            return node
    with program.graph.inserting_after(program.placeholders()[-1]):
        q_len = program.graph.call_function(aten.sym_size.int, (ids, 1))
    with program.graph.inserting_after(q_len):
        return program.graph.call_function(operator.add, (offset, q_len))


def _keep_entries(program: Program, site: Site, index: int) -> None:
    """Append new keys and values to state, and attend over all that was kept."""
    node, graph = site.node, program.graph
    assert node is not None
    arguments = bound_arguments(node)
    k, v = arguments["k"], arguments["v"]
    states = [_state(program, new, index, role) for new, role in ((k, "keys"), (v, "values"))]
    kv_len = _entry_count(program)
    with graph.inserting_before(node):
        append = graph.call_function(
            OPS["kv_append"].overload, (*states, k, v, program.placeholder("kv_offset"))
        )
        views = [graph.call_function(aten.slice.Tensor, (s, 2, 0, kv_len)) for s in states]
    for new in (append, *views):
        new.meta = {
            key: node.meta[key] for key in ("stack_trace", "nn_module_stack") if key in node.meta
        }
    q_positions, k_positions = (program.placeholder(n) for n in ("q_positions", "k_positions"))
    rest = (arguments[name] for name in ("bias", "sinks", "slopes"))
    node.args = (arguments["q"], *views, q_positions, k_positions, *rest)
    node.kwargs = {name: arguments[name] for name in ("softmax_scale", "mask", "span", "softcap")}


def _state(program: Program, new: fx.Node, index: int, role: str) -> fx.Node:
    value = new.meta["val"]
    dims = ("batch", int(value.shape[1]), "capacity", int(value.shape[3]))
    return program.add_state(
        StateSpec(f"layer{index}_{role}", dims, value.dtype, role, layer=index)
    )


def _keep_last_logits(program: Program) -> None:
    """Compute only the last `logits_to_keep` rows of the last projection; 0 = all."""
    projection = _last_projection(logits_node(program))
    keep = program.placeholder("logits_to_keep")
    if projection is None or keep is None:
        return
    hidden: Any = projection.args[0]
    graph = program.graph
    with graph.inserting_before(projection):
        start = graph.call_function(operator.neg, (keep,))
        last = graph.call_function(aten.slice.Tensor, (hidden, 1, start, END))
    projection.replace_input_with(hidden, last)


def logits_index(program: Program) -> int:
    """Which of the program's outputs are the logits."""
    names = program.signature.out_spec.context
    if isinstance(names, list) and "logits" in names:
        return names.index("logits")
    return 0


def logits_node(program: Program) -> fx.Node:
    """The node of the logits, [batch_size, q_len, vocab_size]."""
    outputs = program.graph.output_node().args[0]
    return outputs[logits_index(program)]  # pyright: ignore


def _last_projection(node: fx.Node) -> fx.Node | None:
    """The `linear` that the logits come from, through operators that treat each token alone."""
    while node.target in TAIL and len(node.all_input_nodes) == 1:
        node = node.all_input_nodes[0]
    if node.target is not aten.linear.default or len(node.users) != 1:
        return None
    hidden = node.args[0]
    value = hidden.meta.get("val") if isinstance(hidden, fx.Node) else None
    return node if value is not None and value.dim() == 3 else None
