"""Bounds of level 0 against numbers that can be worked out by hand."""

from __future__ import annotations

import pytest

from ir_dataset.cost_models.level0 import CPUS, GPUS, cpu_seconds, gpu_seconds, occupancy
from rewriter.errors import ConfigError

H100 = GPUS["cuda:sm_90"]


def test_occupancy_by_each_limit() -> None:
    by_registers = occupancy(H100, registers=128, shared_bytes=0, num_warps=4)
    assert (by_registers.programs, by_registers.limit, by_registers.warps) == (4, "registers", 16)
    by_shared = occupancy(H100, registers=16, shared_bytes=100 * 1024, num_warps=4)
    assert (by_shared.programs, by_shared.limit) == (2, "shared")
    by_threads = occupancy(H100, registers=16, shared_bytes=0, num_warps=16)
    assert (by_threads.programs, by_threads.limit) == (4, "threads")
    by_programs = occupancy(H100, registers=16, shared_bytes=0, num_warps=1)
    assert (by_programs.programs, by_programs.limit) == (32, "programs")


def test_occupancy_refuses() -> None:
    with pytest.raises(ConfigError, match="shared"):
        occupancy(H100, registers=16, shared_bytes=300_000, num_warps=4)
    with pytest.raises(ConfigError, match="num_warps"):
        occupancy(H100, registers=16, shared_bytes=0, num_warps=0)


def test_gpu_bounds() -> None:
    full = {"registers": 64, "shared_bytes": 0, "num_warps": 4}
    slots = 132 * occupancy(H100, **full).programs
    read = gpu_seconds(H100, flops=0, bytes_moved=3.35e9, programs=slots, **full)
    assert read == pytest.approx(1e-3 + 2e-6)
    one_more = gpu_seconds(H100, flops=0, bytes_moved=3.35e9, programs=slots + 1, **full)
    assert one_more == pytest.approx(1e-3 * 2 * slots / (slots + 1) + 2e-6)
    few = gpu_seconds(H100, flops=0, bytes_moved=3.35e9, programs=66, **full)
    assert few > 2 * read  # half of the multiprocessors have nothing to do
    spilled = gpu_seconds(
        H100, flops=0, bytes_moved=3.35e9, programs=slots, spilled_bytes=64, **full
    )
    assert spilled > read
    wide = gpu_seconds(H100, flops=1e12, bytes_moved=0, programs=slots, matrix=True, **full)
    assert wide < gpu_seconds(H100, flops=1e12, bytes_moved=0, programs=slots, **full) / 10


def test_cpu_bounds() -> None:
    cpu = CPUS["avx512"]
    small = cpu_seconds(cpu, flops=0, bytes_moved=1e4, working_set=1e4)
    assert small == pytest.approx(1e4 / cpu.first)
    assert cpu_seconds(cpu, flops=0, bytes_moved=1e4, working_set=1e4, threads=2) > small
    large = cpu_seconds(cpu, flops=0, bytes_moved=1e8, working_set=1e8)
    assert large == pytest.approx(1e8 / cpu.memory)
    assert cpu_seconds(cpu, flops=0, bytes_moved=1e8, working_set=1e8, threads=2) < 0.6 * large
    one_sum = cpu_seconds(cpu, flops=1e9, bytes_moved=0, working_set=0, chains=1)
    many = cpu_seconds(cpu, flops=1e9, bytes_moved=0, working_set=0, chains=8)
    assert one_sum == pytest.approx(8 * many)
    assert cpu_seconds(cpu, flops=1e9, bytes_moved=0, working_set=0, lanes=8) > 1.9 * many
