"""The pass protocol: a frozen dataclass whose fields are its knobs."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from torch import Tensor, fx

from rewriter.cost.work import Work
from rewriter.engine.miss import Miss
from rewriter.engine.site import Site, tensor_arguments

__all__ = ["Facts", "Fidelity", "RewritePass"]


class Fidelity(enum.Enum):
    """How a rewrite relates to what it replaces; never mixed in one pass."""

    EXACT = "exact"
    """Bitwise the same."""
    REASSOCIATED = "reassociated"
    """The same function, rounded in another order."""
    APPROXIMATE = "approximate"
    """Another function, controlled by knobs, equal to the original at `exact_setting`."""


@dataclass(frozen=True)
class Facts:
    """What `check` learned about a site; passes subclass it. Never stored on the pass."""


@dataclass(frozen=True, kw_only=True)
class RewritePass:
    """One method. Subclasses are frozen dataclasses: fields are knobs, `str(pass)` is the CLI text.

    Knobs every pass has: `layers`, the layer numbers it may touch (None = all), so that one spec per
    group of layers gives per-layer knobs.
    """

    name: ClassVar[str]
    fidelity: ClassVar[Fidelity]
    source: ClassVar[str]
    anchor: ClassVar[str]
    """The dialect operator whose sites it looks at, a key of `site.ANCHORS` for several, or "program"."""
    conflicts: ClassVar[frozenset[str]] = frozenset()
    """Names of passes that may not be asked for on the same layers."""

    layers: tuple[int, ...] | None = None

    def check(self, site: Site) -> Facts | Miss:
        """The conditions. Looks, changes nothing."""
        raise NotImplementedError

    def rewrite(self, graph: fx.Graph, site: Site, facts: Any) -> None:
        """Edit the graph at a site for which `check` returned these facts."""
        raise NotImplementedError

    def reference_inputs(self, site: Site, facts: Any) -> tuple[fx.Node | None, ...]:
        """The nodes of the program before the rewrite whose values `reference` is given, in order.

        None stands for an argument that is absent. The default is every tensor argument of the anchor
        in the order of its schema (for attention: q, k, v, q_positions, k_positions, bias, sinks,
        slopes). A pass whose replacement reads further back, such as keys before their rotation,
        names those nodes instead. A placeholder may be fed None at run time; so may its value be here.
        """
        return tensor_arguments(site)

    def reference(self, *tensors: Tensor | None, facts: Any) -> Tensor:
        """Meaning of the replacement in plain PyTorch.

        `tensors` are the values of `reference_inputs` when the program before the rewrite runs on the
        whole sequence in one call with an empty cache; the result is what the anchor is replaced by.
        """
        raise NotImplementedError

    def exact_setting(self, facts: Any, *, length: int) -> Self:
        """The knobs at which the rewrite equals the original on sequences up to `length` tokens."""
        return self

    def stress_setting(self, facts: Any, *, length: int) -> Self:
        """Knobs at which the approximation is at work within `length` tokens, for verification."""
        return self

    def original_work(self, facts: Any) -> tuple[Work, ...]:
        """What one decode step computes at the site before the rewrite; () when it is not told."""
        return ()

    def work(self, facts: Any) -> tuple[Work, ...]:
        """What one decode step computes at the site after the rewrite; () when it is not told."""
        return ()

    def candidates(self, facts: Any) -> tuple[Self, ...]:
        """Settings worth trying in a search, cheapest first."""
        return (self,)

    def at_density(self, density: float, *, length: int) -> Self | None:
        """This method with so much kept of what it drops, on sequences of `length` tokens.

        Args:
            density: share kept, in (0, 1]; at 1 nothing changes.

        Returns:
            None for a method that drops nothing.
        """
        return None

    def controls(self) -> dict[str, str]:
        """Specs of what this method has to beat at equal bytes, by name; see `rewriter.quality`."""
        return {}

    def __str__(self) -> str:
        from rewriter.engine.spec_text import format_spec

        return format_spec(self)
