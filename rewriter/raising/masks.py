"""What a mask means, found by running it: a kind and a span, ALiBi slopes, or still a tensor.

`describe` gets every term of an attention's scores, samples each at several lengths, and looks for
the one rule of `rewriter.dialect.attention.MASKS` that predicts every sample. A span counts only if
the samples tell it from its neighbours, so a mask that is off by one is never taken for another.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rewriter.dialect.attention import visible
from rewriter.engine.miss import Miss
from rewriter.program import Program
from rewriter.raising.mask_samples import Lengths, Sample, Sampler, Term, Unclear
from rewriter.raising.sampled_values import UnsupportedSample

__all__ = ["Classifier", "MaskStructure", "classify"]

_CONTENTS = 6


@dataclass(frozen=True)
class MaskStructure:
    """What the terms of an attention's scores mean.

    Attributes:
        kind, span: the structural mask.
        slopes: [num_heads] ALiBi slopes in fp32, or None.
        bias: terms that stay tensors; their own masks are in them.
        misses: why a term stays a tensor, where that was not expected.
    """

    kind: str = "full"
    span: int = 0
    slopes: Tensor | None = None
    bias: tuple[Term, ...] = ()
    misses: tuple[Miss, ...] = ()

    def __str__(self) -> str:
        if self.misses:
            return "other"
        kind = f"{self.kind}({self.span})" if self.span else self.kind
        return f"{kind}+bias" if self.bias else kind


@dataclass
class _Meaning:
    """One term over all lengths."""

    samples: dict[int, Sample] = field(default_factory=dict)
    reason: str = ""

    @property
    def hides_nothing(self) -> bool:
        """Whether every entry is visible at every length."""
        return all(bool(sample.keep.all()) for sample in self.samples.values())


class Classifier:
    """Classifies the masks of one program; layers that share a mask share the work."""

    def __init__(self, program: Program) -> None:
        self.program, self.sampler = program, Sampler(program)
        self.known: dict[object, MaskStructure] = {}

    def describe(
        self, terms: Sequence[Term], num_heads: int, *, causal: bool = False
    ) -> MaskStructure:
        """The meaning of all terms together.

        Args:
            causal: whether the operator itself hides later entries, too.
        """
        if not terms:
            return MaskStructure("causal" if causal else "full")
        shapes = tuple((t.node, t.role, t.factor, t.shape) for t in terms)
        key = (shapes, num_heads, causal)
        if key not in self.known:
            self.known[key] = self._describe(terms, num_heads, causal)
        return self.known[key]

    def _describe(self, terms: Sequence[Term], num_heads: int, causal: bool) -> MaskStructure:
        literals = self.sampler.literals(terms)
        lengths = self.sampler.lengths(terms[0].shape, literals)
        meanings = {term: self._meaning(term, lengths, num_heads) for term in terms}
        unclear = [t for t in terms if meanings[t].reason]
        clear = {t: meanings[t] for t in terms if t not in unclear}
        used = [i for i in range(len(lengths)) if all(i in m.samples for m in clear.values())]
        slopes, biases = self._added(clear, used, num_heads)
        misses = [_stays(t, meanings[t].reason) for t in unclear]
        joint = [_joint([m.samples[i] for m in clear.values()], causal) for i in used if clear]
        rule = classify(joint, literals) if joint else ("causal" if causal else "full", 0)
        if rule is None:
            hiding = [t for t, m in clear.items() if t not in biases and not m.hides_nothing]
            misses.extend(_stays(t, "the mask follows none of the known rules") for t in hiding[:1])
            biases, rule = [*biases, *hiding], ("causal" if causal else "full", 0)
        return MaskStructure(*rule, slopes, (*unclear, *biases), tuple(misses))

    def _added(
        self, clear: dict[Term, _Meaning], used: Sequence[int], num_heads: int
    ) -> tuple[Tensor | None, list[Term]]:
        """The sum of all ALiBi slopes, and the terms that add something else."""
        slopes, biases = None, []
        for term, meaning in clear.items():
            samples = [meaning.samples[i] for i in used]
            learned = self.sampler.learned(term)
            if not learned and all(sample.added is None for sample in samples):
                continue
            own = None if learned else alibi_slopes(samples, num_heads)
            if own is None:
                biases.append(term)
            else:
                slopes = own if slopes is None else slopes + own
        return slopes, biases

    def _meaning(self, term: Term, lengths: Sequence[Lengths], num_heads: int) -> _Meaning:
        """Samples of one term, or the reason why it cannot be understood."""
        meaning, content = _Meaning(), self.sampler.content(term)
        for i, length in enumerate(lengths):
            try:
                meaning.samples[i] = self.sampler.sample(term, length, num_heads)
                if content and not self._constant(term, length, num_heads, meaning.samples[i]):
                    meaning.reason = (
                        f"the mask depends on the values of {', '.join(sorted(content))}"
                    )
            except Unclear:
                meaning.reason = "the mask is not the same for every row of the batch"
            except UnsupportedSample as error:
                meaning.reason = f"the mask cannot be sampled at length {length.kv_len}: {error}"
            except (RuntimeError, IndexError):
                if length.kv_len <= self.sampler.limit(term):
                    meaning.reason = f"the mask cannot be evaluated at length {length.kv_len}"
            if meaning.reason:
                return meaning
        if not meaning.samples:
            meaning.reason = "the mask could not be evaluated at any length"
        return meaning

    def _constant(self, term: Term, length: Lengths, num_heads: int, first: Sample) -> bool:
        """Whether other contents of the inputs give the same mask."""
        if length.kv_len > 64:
            return True
        for seed in range(1, _CONTENTS):
            other = self.sampler.sample(term, length, num_heads, seed)
            if not _same(first.keep, other.keep) or not _same(first.added, other.added):
                return False
        return True


def _same(first: Tensor | None, second: Tensor | None) -> bool:
    if first is None or second is None:
        return first is second
    return first.shape == second.shape and torch.equal(first, second)


def _stays(term: Term, reason: str) -> Miss:
    return Miss.at(term.node, "raise-mask", f"{reason}; it stays a tensor")


def _joint(samples: Sequence[Sample], causal: bool) -> Sample:
    """What all terms together leave visible."""
    keep = samples[0].keep
    for sample in samples[1:]:
        keep = keep & sample.keep
    if causal:
        keep = keep & (samples[0].columns[None, :] <= samples[0].rows[:, None])
    same = torch.equal(keep, keep[:1].expand_as(keep))
    return Sample(samples[0].rows, samples[0].columns, keep[:1] if same else keep, None)


def classify(samples: Sequence[Sample], literals: Sequence[int]) -> tuple[str, int] | None:
    """The rule (kind, span) that predicts what is visible in every sample; None when there is none.

    Args:
        samples: of one mask at several lengths, with rows and columns of equal positions.
        literals: integers of the sub-graph, which spans are likely to be.
    """
    if any(sample.keep.shape[0] != 1 for sample in samples):
        return None
    if all(bool(sample.keep.all()) for sample in samples):
        return ("full", 0)
    if any(not torch.equal(sample.rows, sample.columns) for sample in samples):
        return None
    if _predicts(samples, "causal", 0):
        return ("causal", 0)
    for kind, span in _candidates(samples, literals):
        if _predicts(samples, kind, span) and not any(
            _predicts(samples, kind, span + step) for step in (-1, 1)
        ):
            return (kind, span)
    return None


def _predicts(samples: Sequence[Sample], kind: str, span: int) -> bool:
    return span >= 0 and all(
        torch.equal(visible(s.rows, s.columns, kind, span), s.keep[0]) for s in samples
    )


def _candidates(samples: Sequence[Sample], literals: Sequence[int]) -> Iterator[tuple[str, int]]:
    """Kinds with the spans that the samples and the literals suggest."""
    near = {c + d for c in literals for d in (-1, 0, 1)}
    for kind in ("sliding_window", "chunked", "prefix", "local"):
        suggested = {_suggest(kind, sample) for sample in samples} | near
        for span in sorted(s for s in suggested if s > 0):
            yield kind, span


def _suggest(kind: str, sample: Sample) -> int:
    """The span of a kind that the visible entries of a sample would have."""
    keep, i, j = sample.keep[0], sample.rows[:, None], sample.columns[None, :]
    distance = (i - j).expand_as(keep)
    if kind == "sliding_window":
        return int(torch.where(keep, distance, 0).max()) + 1
    if kind == "local":
        return int(torch.where(keep, distance.abs(), 0).max())
    if kind == "prefix":
        return int(torch.where(keep[0], sample.columns + 1, 0).max())
    broken = sample.rows[1:][~keep.diagonal(-1)] if len(sample.rows) > 1 else sample.rows[:0]
    return int(broken[0]) if len(broken) else 0


def alibi_slopes(samples: Sequence[Sample], num_heads: int) -> Tensor | None:
    """Slopes when every sample adds slope[h] · (j - i), up to a constant in each row."""
    longest = max(samples, key=lambda sample: int(sample.rows[-1]))
    if longest.added is None or not torch.equal(longest.rows, longest.columns):
        return None
    last = int(longest.rows[-1])
    if last == 0:
        return None
    slopes = (longest.added[:, -1, -1] - longest.added[:, -1, 0]) / last
    if not all(_is_alibi(sample, slopes) for sample in samples):
        return None
    return slopes.expand(num_heads).float().contiguous()


def _is_alibi(sample: Sample, slopes: Tensor) -> bool:
    distance = (sample.columns[None, :] - sample.rows[:, None]).double()
    added = torch.zeros(1, 1, 1).double() if sample.added is None else sample.added
    added = added.expand(-1, len(sample.rows), len(sample.columns))
    shift = added.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)
    error = (added - shift - slopes.view(-1, 1, 1) * distance) * sample.keep
    scale = (slopes.abs().view(-1, 1, 1) * distance.abs()).clamp_min(1.0)
    return bool((error.abs() <= 1e-5 * scale).all())
