"""Incremental decoding, derived from a graph without a cache."""
