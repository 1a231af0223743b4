"""Kernels for dialect operators on a target: Triton text, C++ text, and their compilation."""
