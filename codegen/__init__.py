"""Kernels for dialect operators on a target. Nothing here yet."""
