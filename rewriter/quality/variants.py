"""What is compared: the original, rewrites of it, and their controls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from rewriter.engine.rewrite_pass import RewritePass
from rewriter.errors import ConfigError
from rewriter.optimized import OptimizedModel

__all__ = ["Plan", "Variant", "plans"]


@dataclass(frozen=True)
class Plan:
    """A variant before it is built.

    Attributes:
        specs: its passes. density: share kept, where it was asked for. control: "" for the method
            itself, otherwise the name of the control.
    """

    specs: tuple[str, ...]
    density: float | None = None
    control: str = ""

    @property
    def label(self) -> str:
        """How it is called in tables."""
        text = " + ".join(self.specs) or "dense"
        return f"{text} ({self.control})" if self.control else text


@dataclass
class Variant:
    """A plan with its program, and what it did not do."""

    plan: Plan
    model: OptimizedModel
    undone: tuple[str, ...] = field(default=())


def plans(
    methods: Sequence[RewritePass], densities: Sequence[float], length: int, *, controls: bool
) -> list[Plan]:
    """The methods at each density, each followed by its controls; at 1 nothing is dropped.

    Args:
        methods: applied together; passes that keep the function may be among them.
        densities: shares in (0, 1]; none = the knobs as they are.

    Raises:
        ConfigError: a density out of range, or methods that have none.
    """
    found: dict[tuple[str, ...], Plan] = {}
    for density in densities or (None,):
        settings = [_at(method, density, length) for method in methods]
        plan = Plan(tuple(map(str, settings)), density)
        found.setdefault(plan.specs, plan)
        for control in _controls(settings, density) if controls and density != 1 else ():
            found.setdefault(control.specs, control)
    return list(found.values())


def _at(method: RewritePass, density: float | None, length: int) -> RewritePass:
    if density is None:
        return method
    if not 0 < density <= 1:
        raise ConfigError("density", density, "above 0, at most 1")
    return method.at_density(density, length=length) or method


def _controls(settings: list[RewritePass], density: float | None) -> list[Plan]:
    """Each control of each method, the other methods as they are."""
    return [
        Plan((*map(str, settings[:i]), spec, *map(str, settings[i + 1 :])), density, name)
        for i, method in enumerate(settings)
        for name, spec in method.controls().items()
    ]
