"""A language model called like the module it came from: arguments, and where padding stands."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rewriter.capture.guards import demand
from rewriter.decoding.derive import logits_index
from rewriter.decoding.mixing import differs
from rewriter.decoding.new_tokens import check_tokens, new_columns
from rewriter.decoding.state import Session
from rewriter.errors import InputError
from rewriter.program import Program

__all__ = ["TokenCall", "decode_call", "whole_call"]

TENSORS = ("input_ids", "attention_mask", "position_ids")
ALLOWED = "input_ids, attention_mask, position_ids, logits_to_keep, return_dict"
IGNORED = ("use_cache",)
"""The state belongs to the program, whatever they ask for; the outputs are the same."""


@dataclass(frozen=True)
class TokenCall:
    """The arguments of one call that a program can honour.

    Attributes:
        input_ids: int [batch_size, q_len]; attention_mask: [batch_size, q_len], 1 = token.
        position_ids: int [batch_size or 1, q_len].
        logits_to_keep: how many last rows of logits to return; 0 = all.
        return_dict: False = a plain tuple.
    """

    input_ids: Tensor
    attention_mask: Tensor | None = None
    position_ids: Tensor | None = None
    logits_to_keep: int = 0
    return_dict: bool = True

    @classmethod
    def parse(
        cls, args: tuple[Any, ...], kwargs: Mapping[str, Any], constants: Mapping[str, Any]
    ) -> TokenCall:
        """From the arguments of `forward`; those baked in may be given with the same value.

        Raises:
            InputError: something that was not captured is asked for, or no `input_ids`.
        """
        if len(args) > 2 or not all(isinstance(value, Tensor | None) for value in args[1:]):
            allowed = "input_ids and the tensor attention_mask, others by name"
            raise InputError(f"{len(args)} positional arguments; allowed: {allowed}")
        positional = dict(zip(TENSORS, args, strict=False))
        for name in positional.keys() & kwargs.keys():
            raise InputError(f"{name} is given twice; allowed: once")
        given = {n: value for n, value in (positional | dict(kwargs)).items() if value is not None}
        known = (*TENSORS, "logits_to_keep", "return_dict")
        for name in sorted(given.keys() - set(known) - set(IGNORED)):
            if given[name] is not False and constants.get(name) is not given[name]:
                raise InputError(f"{name} is not supported; allowed: {ALLOWED}")
        if "input_ids" not in given:
            raise InputError(f"input_ids is missing; allowed: {ALLOWED}")
        keep = given.get("logits_to_keep", 0)
        if not isinstance(keep, int) or keep < 0:
            raise InputError(f"logits_to_keep={keep!r}; allowed: an integer of 0 or more")
        return cls(**{name: given[name] for name in known if name in given})


def decode_call(call: TokenCall, session: Callable[[int, int], Session]) -> tuple[Tensor, ...]:
    """What a program with decoding returns for one call on its own.

    Where padding leaves open what position a token has, both ways of counting are tried: over tokens,
    and over columns, as most models do that are given no positions. An answer has to be the same.

    Args:
        session: a fresh session for a batch size and a capacity.

    Raises:
        InputError: wrong inputs, or positions matter and were not given.
    """
    check_tokens(call.input_ids, None, None)
    rows, q_len = call.input_ids.shape

    def run(positions: Tensor | None) -> tuple[Tensor, ...]:
        return session(rows, q_len).outputs(
            call.input_ids,
            attention_mask=call.attention_mask,
            position_ids=positions,
            logits_to_keep=call.logits_to_keep,
        )

    outputs = run(call.position_ids)
    if call.attention_mask is None or call.position_ids is not None:
        return outputs
    real = new_columns(call.attention_mask, rows, q_len)
    if real is None or _only_behind(real):
        return outputs
    return _agreed(outputs, run, real, session(rows, q_len))


def whole_call(program: Program, call: TokenCall) -> dict[str, Tensor]:
    """The inputs by name of a language model without decoding: positions count from 0.

    Raises:
        InputError: wrong inputs, padding, or more tokens than the model has positions.
    """
    vocab_size = program.meta.get("vocab_size")
    check_tokens(call.input_ids, None, vocab_size)
    rows, q_len = call.input_ids.shape
    if (
        call.attention_mask is not None
        and new_columns(call.attention_mask, rows, q_len) is not None
    ):
        raise InputError("attention_mask has padding; allowed: none, decoding was not derived")
    limit = program.meta.get("max_positions")
    if limit is not None and q_len > limit:
        raise InputError(f"{q_len} tokens are longer than the model's {limit} positions")
    positions = call.position_ids
    if positions is None:
        positions = torch.arange(q_len, device=call.input_ids.device)
    named = {"input_ids": call.input_ids, "position_ids": positions.expand(rows, -1)}
    inputs = {spec.name: named[spec.name] for spec in program.signature.inputs}
    demand(program.meta["guards"], inputs)
    return inputs


def _only_behind(real: Tensor) -> bool:
    """Whether padding follows the tokens in every row: then columns and tokens count the same."""
    return bool((real[:, :-1] >= real[:, 1:]).all())


def _agreed(
    outputs: tuple[Tensor, ...],
    run: Callable[[Tensor | None], tuple[Tensor, ...]],
    real: Tensor,
    session: Session,
) -> tuple[Tensor, ...]:
    """The outputs, if counting positions over columns gives the same ones."""
    which, columns = logits_index(session.program), torch.arange(real.shape[1], device=real.device)
    if session.bounded:
        if _one_run(real):
            return outputs
        raise InputError("attention_mask has gaps; allowed: padding before or behind the tokens")
    by_column = run(columns.expand(real.shape))[which]
    shown = real[:, -by_column.shape[1] :].to(by_column.device)
    if differs(outputs[which][shown], by_column[shown]):
        raise InputError(
            "position_ids is missing: with this attention_mask the positions of the tokens matter,"
            " and they may count over padding or not; allowed: integers [batch_size, tokens]"
        )
    return outputs


def _one_run(real: Tensor) -> bool:
    """Whether the tokens of each row stand together."""
    starts = real[:, 1:] & ~real[:, :-1]
    return bool((starts.sum(1) + real[:, 0] <= 1).all())
