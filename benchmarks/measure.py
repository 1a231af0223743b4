"""One model of the zoo through all stages, as a row of `coverage.py`'s table."""

from __future__ import annotations

import logging
import time
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from encoders import Encoder, Unavailable, build_encoder
from families import Family, NoSuchSpelling, build
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from rewriter.capture import capture, capture_causal_lm
from rewriter.decoding.derive import derive
from rewriter.engine.miss import Miss
from rewriter.optimized import OptimizedModel
from rewriter.program import Program
from rewriter.raising import raise_program
from rewriter.report.report import Report

__all__ = ["MAX_ERROR", "Row", "measure_encoder", "measure_family"]

MAX_ERROR = 1e-4
"""Largest allowed |logits - the model's own| in fp32."""
NEW_TOKENS = 32
_SHAPES = ((1, 1), (1, 7), (2, 29))
_PROMPT = (2, 9)


@dataclass
class Row:
    """What happened to one model in one spelling of attention.

    Attributes:
        raised, candidates: attentions raised, and attentions in the captured graph.
        decode: "derived", the Miss, or "" for a model that is not a decoder.
        error: largest |output - the model's own|; None when it did not get that far.
        tokens: whether greedy tokens equal the model's own cached generate; None when not derived.
        padded: the same for a left-padded batch against each row generated alone.
        problem: why it went no further; unavailable: a spelling or package that does not exist.
    """

    family: str
    attention: str
    raised: int = 0
    candidates: int = 0
    masks: tuple[str, ...] = ()
    decode: str = ""
    error: float | None = None
    tokens: bool | None = None
    padded: bool | None = None
    problem: str = ""
    unavailable: bool = False
    expected: str = ""
    baked: tuple[str, ...] = ()
    misses: tuple[str, ...] = ()
    seconds: float = 0.0

    @property
    def all_raised(self) -> bool:
        """Whether no attention was left alone."""
        return self.raised == self.candidates

    @property
    def equal(self) -> bool:
        """Whether the outputs are the model's."""
        return self.error is not None and self.error <= MAX_ERROR

    @property
    def complete(self) -> bool:
        """A decoder: raised, derived, equal logits and equal tokens."""
        decoded = self.decode == "derived" and bool(self.tokens)
        return decoded and self.equal and self.all_raised and self.raised > 0

    @property
    def wrong(self) -> bool:
        """Numbers came out that are not the model's."""
        return (self.error is not None and not self.equal) or self.tokens is False


def measure_family(family: Family, attention: str) -> Row:
    """Capture, raise, derive and compare one decoder family. Never raises: the row says why."""
    row = Row(family.model_type, attention, expected=family.mixes)
    return _guarded(row, lambda: _measure_decoder(row, build(family, attention)))


def measure_encoder(encoder: Encoder, attention: str) -> Row:
    """Capture, raise and compare one encoder or vision model. Never raises."""
    row = Row(encoder.name, attention)
    return _guarded(row, lambda: _measure_module(row, encoder, build_encoder(encoder, attention)))


def _guarded(row: Row, work: Any) -> Row:
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    started = time.perf_counter()
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            work()
    except (NoSuchSpelling, Unavailable) as reason:
        row.problem, row.unavailable = str(reason), True
    except Exception as error:  # the table's purpose is to show whatever happens
        lines = str(error).splitlines() or [""]
        row.problem = f"{type(error).__name__}: {lines[0]}"
    row.seconds = time.perf_counter() - started
    return row


def _measure_decoder(row: Row, model: Any) -> None:
    torch.manual_seed(1)
    program = capture_causal_lm(model)
    _raise(row, program)
    derived = derive(program)
    row.decode = str(derived) if isinstance(derived, Miss) else "derived"
    if isinstance(derived, Miss):
        row.error = max(
            _error(_plain(program, ids), model(ids, use_cache=False)) for ids in _fitting(program)
        )
        return
    optimized = _optimized(derived, model)
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    batches = [torch.randint(3, vocabulary, shape) for shape in _SHAPES]
    row.error = max(_error(optimized(ids).logits, model(ids, use_cache=False)) for ids in batches)
    prompt = torch.randint(3, vocabulary, _PROMPT)
    own = _greedy(model, prompt)
    row.tokens = torch.equal(own, _greedy(optimized, prompt))
    row.padded = _padded_equal(optimized, prompt, own)


def _raise(row: Row, program: Program) -> None:
    row.baked = tuple(f"{b.input}[{b.dim}]={b.value}: {b.reason}" for b in program.baked)
    visible = _attention_like(program)
    result = raise_program(program)
    row.misses = tuple(str(miss) for miss in result.misses)
    attention = next((c for c in result.coverage if c.op == "attention"), None)
    if attention is not None:
        row.raised, row.masks = attention.raised, attention.kinds
        visible = max(visible, attention.candidates)
    row.candidates = visible


def _attention_like(program: Program) -> int:
    """Attentions in a captured graph, counted without the recogniser: softmax over scores."""
    fused = ("scaled_dot_product", "softmax")
    calls = [n for n in program.graph.nodes if n.op == "call_function"]
    found = [n for n in calls if any(name in str(n.target) for name in fused)]
    return sum(isinstance(n.meta.get("val"), Tensor) and n.meta["val"].dim() >= 4 for n in found)


def _optimized(program: Program, model: Any) -> OptimizedModel:
    return OptimizedModel(
        program,
        Report(program.name),
        config=model.config.to_dict(),
        generation_config=model.generation_config.to_dict(),
    )


def _fitting(program: Program) -> list[Tensor]:
    """Token batches that a program takes whose dimensions may be fixed."""
    dims = program.signature.inputs[0].dims
    shapes = [
        tuple(want if isinstance(want, int) else got for want, got in zip(dims, shape, strict=True))
        for shape in _SHAPES
    ]
    return [torch.randint(3, 250, shape) for shape in dict.fromkeys(shapes)]


def _plain(program: Program, ids: Tensor) -> Tensor:
    positions = torch.arange(ids.shape[1]).expand(ids.shape).contiguous()
    return program(input_ids=ids, position_ids=positions)[0]


def _error(logits: Tensor, own: Any) -> float:
    return (logits - own.logits).abs().max().item()


def _greedy(model: Any, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """The new tokens of greedy decoding, never stopping early."""
    mask = torch.ones_like(ids) if mask is None else mask
    out = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        do_sample=False,
        use_cache=True,
        eos_token_id=None,
        pad_token_id=0,
    )
    return out[:, ids.shape[1] :]


def _padded_equal(optimized: OptimizedModel, prompt: Tensor, own: Tensor) -> bool:
    """Whether left padding of one row changes nothing: the prompt, shifted right by three."""
    padding = torch.zeros(1, 3, dtype=torch.int64)
    short, ids = prompt[:1, :6], prompt.clone()
    ids[:1] = torch.cat([padding, short], dim=1)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    expected = torch.cat([_greedy(optimized, short), own[1:]])
    return torch.equal(expected, _greedy(optimized, ids, mask))


def _measure_module(row: Row, encoder: Encoder, model: nn.Module) -> None:
    torch.manual_seed(1)
    program = capture(model, encoder.inputs(2, 11), name=encoder.name)
    _raise(row, program)
    optimized = OptimizedModel(program, Report(program.name))
    row.error = max(
        _structured_error(optimized(**inputs), model(**inputs))
        for inputs in (encoder.inputs(2, 11), encoder.inputs(3, 17), encoder.inputs(1, 5))
    )


def _structured_error(ours: Any, own: Any) -> float:
    pairs = zip(pytree.tree_leaves(ours), pytree.tree_leaves(own), strict=True)
    differences = [(a - b).abs().max().item() for a, b in pairs if isinstance(b, Tensor)]
    return max(differences)
