"""Why a site was left alone: data, not a log line."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from rewriter.source import source_line

__all__ = ["Miss"]


@dataclass(frozen=True)
class Miss:
    """A pass, recogniser or derivation that does not apply, and why.

    Attributes:
        subject: who declined: a pass name, a recogniser ("raise-attention") or "derive-decoding".
        reason: one sentence: what was expected and what was found.
        node: name of the first differing node; "" when there is none.
        source: the line of the user's model it came from.
        site: where it was tried, e.g. "layer 3 attention"; "" for the whole program.
        blocked_by: names of the nodes between the anchor and the first differing node, nearest first.
    """

    subject: str
    reason: str
    node: str = ""
    source: str = ""
    site: str = ""
    blocked_by: tuple[str, ...] = ()

    @classmethod
    def at(
        cls,
        node: fx.Node,
        subject: str,
        reason: str,
        *,
        site: str = "",
        blocked_by: tuple[str, ...] = (),
    ) -> Miss:
        """A miss whose first differing node is `node`."""
        return cls(subject, reason, node.name, source_line(node), site, blocked_by)

    def __str__(self) -> str:
        where = f" at {self.node} ({self.source})" if self.node else ""
        site = f" [{self.site}]" if self.site else ""
        return f"{self.subject}{site}: {self.reason}{where}"
