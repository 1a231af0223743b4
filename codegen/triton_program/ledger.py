"""Which sites of a program run which kernels, and what stays with PyTorch, and why."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from rewriter.engine.miss import Miss

__all__ = ["Ledger", "Site"]


@dataclass
class Ledger:
    """What was planned for the sites of one program, and what happened there so far.

    Attributes:
        planned: sites that have kernels, with the operators of those.
        left: sites without a kernel, each with its reason.
        ran: launches by site and operator.
        passed: calls of planned sites that PyTorch took, by site and reason.
    """

    planned: dict[str, tuple[str, ...]] = field(default_factory=dict[str, tuple[str, ...]])
    left: list[Miss] = field(default_factory=list[Miss])
    ran: Counter[tuple[str, str]] = field(default_factory=Counter[tuple[str, str]])
    passed: Counter[tuple[str, str]] = field(default_factory=Counter[tuple[str, str]])

    def summary(self) -> str:
        """In one line: kernels that ran with how many sites each, then what did not and why."""
        sites = Counter(operator for _, operator in self.ran)
        told = ", ".join(f"{name} at {count}" for name, count in sites.items())
        parts = [f"Triton kernels ran at {len({site for site, _ in self.ran})} sites: {told}"]
        if not sites:
            parts = [f"{len(self.planned)} sites have Triton kernels, none ran yet"]
        reasons = Counter(miss.reason for miss in self.left)
        reasons += Counter(reason for _, reason in self.passed)
        if reasons:
            told = ", ".join(f"{reason} ({count})" for reason, count in reasons.items())
            parts.append(f"left to PyTorch: {told}")
        return "; ".join(parts)


@dataclass(frozen=True)
class Site:
    """One call in a program, as a kernel's callable sees it."""

    name: str
    ledger: Ledger

    def ran(self, operator: str) -> None:
        """A kernel is about to be launched here."""
        self.ledger.ran[self.name, operator] += 1

    def passed(self, reason: str) -> None:
        """PyTorch takes this call."""
        self.ledger.passed[self.name, reason] += 1
