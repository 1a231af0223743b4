"""Triton kernels: ordinary `@triton.jit` functions, and the specialised text generated from them."""
