"""What operators cost, and how long what a pass does is predicted to take."""

from __future__ import annotations

from rewriter.cost.context import costing

__all__ = ["costing"]
