"""Whole programs whose operators run generated Triton kernels, and PyTorch where there is none.

`place_kernels` puts a callable in the place of every call that a kernel supports; it launches the kernel,
or hands on to PyTorch where a call's sizes are not for it. A `Ledger` keeps both, with the reasons.
"""

from codegen.triton_program.ledger import Ledger
from codegen.triton_program.place import place_kernels
from codegen.triton_program.program import TritonProgram, why_not_triton

__all__ = ["Ledger", "TritonProgram", "place_kernels", "why_not_triton"]
