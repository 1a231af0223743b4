"""Kernels are tested where Triton is there; on a GPU too where there is one."""

from __future__ import annotations

import importlib.util

collect_ignore = [] if importlib.util.find_spec("triton") else ["triton_kernels", "triton_program"]
"""Triton is an extra and comes for Linux alone."""
