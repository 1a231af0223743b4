"""A whole decode step as one C++ function: no Python and no dispatcher between its kernels."""

from codegen.step.native_step import NativeStep

__all__ = ["NativeStep"]
