"""Exports that do not come to their end: nothing under the final name, and what stood there stays."""

from __future__ import annotations

import resource
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from rewriter import ArtifactError, optimize
from tests.tiny import tiny_llama


@pytest.fixture(scope="module")
def optimized():
    return optimize(tiny_llama(), verify=False, backend="eager")


@contextmanager
def files_up_to(size: int):
    """Writes beyond this many bytes of a file fail, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)


def test_a_full_disk_is_an_error_and_leaves_nothing(optimized, tmp_path):
    with files_up_to(4096), pytest.raises(ArtifactError, match="cannot be written: File too large"):
        optimized.export(tmp_path / "deployed")
    assert list(tmp_path.iterdir()) == []


def test_an_older_file_survives_a_failed_export(optimized, tmp_path):
    target = tmp_path / "m.onnx"
    optimized.export(target)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with files_up_to(4096), pytest.raises(ArtifactError):
        optimized.export(target)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_killed_export_leaves_nothing_under_the_final_name(trial_reasoner: Path, tmp_path: Path):
    command = [sys.executable, "-m", "rewriter", "export", str(trial_reasoner)]
    options = ["-o", str(tmp_path / "m.onnx"), "--dtype", "float32"]
    process = subprocess.Popen(
        [*command, *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while process.poll() is None and not any(tmp_path.iterdir()):
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "m.onnx").exists()
    assert not (tmp_path / "m.onnx.data").exists()
