"""Run an attention as the model spells it beside its replacement, on the same random operands."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor, fx

from rewriter.program import Program
from rewriter.raising.attention_regions import AttentionRegion
from rewriter.raising.evaluate import UnboundInput, depends_on, evaluate, needed, random_value
from rewriter.raising.mask_samples import Sampler
from rewriter.raising.position_tables import POSITIONS, random_positions
from rewriter.raising.region import EVALUATION_ERRORS, region_key

__all__ = ["Agreement"]

_LENGTHS = (5, 9)
_TOLERANCE = 1e-4
"""Of the largest value, in fp32; a mask or scale that is wrong changes results by 1e-2 and more."""


class Agreement:
    """Compares regions of one program with their replacements; equal regions are run once.

    Attributes:
        groups: keys or values whose heads are equal within each of so many groups.
    """

    def __init__(self, program: Program, sampler: Sampler) -> None:
        self.program, self.sampler = program, sampler
        self.groups: dict[fx.Node, int] = {}
        self.depends: dict[fx.Node, frozenset[str]] = {}
        self.checked: set[Hashable] = set()

    def holds(self, region: AttentionRegion, new: fx.Node, inserted: Sequence[fx.Node]) -> bool:
        """Whether `new`, built of the inserted nodes, computes what the region's output is."""
        bound = self._boundary(region, inserted)
        terms = [term.node for term in region.scores.terms]
        inside = needed([region.output, new], dict.fromkeys((*bound, *terms)))
        key = region_key(inside, terms)
        if key not in self.checked:
            if not all(self._holds_at(region, new, bound, length) for length in _LENGTHS):
                return False
            self.checked.add(key)
        return True

    def _boundary(self, region: AttentionRegion, inserted: Sequence[fx.Node]) -> list[fx.Node]:
        """Data-dependent nodes that the replacement reads: they get random values."""
        fresh = set(inserted)
        operands = {o for node in inserted for o in node.all_input_nodes if o not in fresh}
        terms = {term.node for term in region.scores.terms}
        tensors = {o for o in operands | terms if isinstance(o.meta.get("val"), Tensor)}
        return sorted(o for o in tensors if depends_on(o, self.depends) - {POSITIONS})

    def _holds_at(
        self, region: AttentionRegion, new: fx.Node, bound: Sequence[fx.Node], length: int
    ) -> bool:
        generator = torch.Generator().manual_seed(length)
        sizes = self.sampler.sizes(region.shape[-2:], length)
        try:
            values = {node: self._random(node, sizes, generator) for node in bound}
            values |= _counted_positions(self.program, sizes)
            outputs = [region.output, new]
            old, raised = evaluate(self.program, outputs, values, sizes=sizes, widen=True)
        except (*EVALUATION_ERRORS, UnboundInput):
            return False
        if old.shape != raised.shape or not old.numel():
            return False
        error = (old.double() - raised.double()).abs().max()
        return bool(error <= _TOLERANCE * old.double().abs().max())

    def _random(self, node: fx.Node, sizes: dict[str, int], generator: torch.Generator) -> Tensor:
        """Random values; bool ones are True in the first column: every row sees something."""
        value = random_value(node, sizes, generator)
        if value.dtype == torch.bool and value.dim():
            value[..., 0] = True
        if node in self.groups:
            size = value.shape[1] // self.groups[node]
            value = value[:, ::size].repeat_interleave(size, dim=1)
        return value.float() if value.is_floating_point() else value


def _counted_positions(program: Program, sizes: dict[str, int]) -> dict[fx.Node, Tensor]:
    """True positions from 0 on: masks are functions of them."""
    values = random_positions(program, sizes, torch.Generator())
    return {n: torch.arange(v.shape[-1]).expand(v.shape).to(v) for n, v in values.items()}
