"""Which attentions ONNX Runtime's GroupQueryAttention can take over, cache and all."""

from __future__ import annotations

from rewriter.engine.cached_attention import CachedAttention, cached_attention
from rewriter.engine.miss import Miss
from rewriter.engine.site import Site

__all__ = ["HEAD_WIDTH", "ROTATED_WIDTH", "TABLE_WIDTH", "fits_grouped_query"]

HEAD_WIDTH, ROTATED_WIDTH, TABLE_WIDTH = 8, 16, 8
"""The operator takes heads, rotates heads, and rotates by tables, whose widths are multiples of these."""


def fits_grouped_query(site: Site) -> CachedAttention | str:
    """The cache of an attention that the operator can take over, or why it cannot."""
    cached = cached_attention(site, "grouped-query")
    if isinstance(cached, Miss):
        return cached.reason
    arguments = site.arguments
    q, v = arguments["q"].meta["val"], cached.v.meta["val"]
    if q.shape[3] != v.shape[3]:
        return f"keys and values differ in width: {q.shape[3]} and {v.shape[3]}"
    if q.shape[3] % HEAD_WIDTH:
        return f"heads are {q.shape[3]} wide, no multiple of {HEAD_WIDTH}"
    if arguments["bias"] is not None:
        return "its bias is a tensor"
    return cached
