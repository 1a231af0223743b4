"""Kernels are tested where Triton is there; on a GPU too where there is one."""

from __future__ import annotations

import importlib.util

import pytest

collect_ignore = [] if importlib.util.find_spec("triton") else ["triton_kernels"]
"""Triton is an extra and comes for Linux alone."""


def pytest_configure(config: pytest.Config) -> None:
    """Markers of this folder."""
    config.addinivalue_line("markers", "gpu: needs a CUDA device and TRITON_INTERPRET=0")
