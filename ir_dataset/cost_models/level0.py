"""Level 0: what arithmetic, memory, registers and the number of processors allow, with nothing learned.

    time = max(flops / peak, bytes / bandwidth) · quantisation + launch

On a GPU, quantisation is the waves that are launched over the waves' worth of work, and a program's
share of a multiprocessor comes from its registers, shared memory and threads. Sources: the roofline of
https://doi.org/10.1145/1498765.1498785; allocation units of the CUDA occupancy calculator.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from rewriter.errors import ConfigError

__all__ = ["CPUS", "GPUS", "Cpu", "Gpu", "Occupancy", "cpu_seconds", "gpu_seconds", "occupancy"]


@dataclass(frozen=True)
class Gpu:
    """Limits of one kind of GPU, from its vendor's tables.

    Attributes:
        multiprocessors: of the largest product of this kind.
        flops: fp32 on vector units, a second. matrix_flops: of 16-bit matrix units.
        bandwidth: bytes of memory a second.
        registers, shared_bytes, threads, programs: limits of one multiprocessor.
        register_unit: registers are given to a warp in multiples of so many.
    """

    multiprocessors: int
    flops: float
    matrix_flops: float
    bandwidth: float
    registers: int = 65536
    shared_bytes: int = 233472
    threads: int = 2048
    programs: int = 32
    warp_size: int = 32
    register_unit: int = 256


GPUS = {
    "cuda:sm_80": Gpu(108, 19.5e12, 312e12, 1.56e12, shared_bytes=167936),
    "cuda:sm_86": Gpu(84, 35.6e12, 142e12, 0.94e12, shared_bytes=102400, threads=1536, programs=16),
    "cuda:sm_89": Gpu(
        128, 82.6e12, 330e12, 1.01e12, shared_bytes=102400, threads=1536, programs=24
    ),
    "cuda:sm_90": Gpu(132, 66.9e12, 989e12, 3.35e12),
}
"""By the names of `codegen.compile.TARGETS`; A100, RTX 3090 class, RTX 4090, H100 SXM."""


@dataclass(frozen=True)
class Cpu:
    """One core. Bandwidths in bytes a second from the first and second cache, and from memory."""

    floats: int
    hertz: float
    fma_units: int = 2
    first: float = 150e9
    second: float = 60e9
    memory: float = 12e9
    first_bytes: int = 32 * 1024
    second_bytes: int = 2 * 1024 * 1024
    fork_s: float = 3e-6


CPUS = {
    "avx512": Cpu(floats=16, hertz=2.6e9),
    "avx2": Cpu(floats=8, hertz=3.0e9),
    "neon": Cpu(floats=4, hertz=2.6e9),
}
"""By the names of `codegen.cpp_kernels.compiler.ISAS`: typical server cores; ranking needs ratios only."""


@dataclass(frozen=True)
class Occupancy:
    """Programs that share a multiprocessor, and what keeps more of them out."""

    programs: int
    limit: str
    """`registers`, `shared`, `threads` or `programs`."""
    warps: int


def occupancy(gpu: Gpu, *, registers: int, shared_bytes: int, num_warps: int) -> Occupancy:
    """How many programs run side by side on one multiprocessor.

    Args:
        registers: of a thread. shared_bytes: of a program.

    Raises:
        ConfigError: `num_warps` is no positive number, or one program alone does not fit.
    """
    if num_warps < 1:
        raise ConfigError("num_warps", num_warps, "at least 1")
    warp = math.ceil(max(registers, 1) * gpu.warp_size / gpu.register_unit) * gpu.register_unit
    limits = {
        "programs": gpu.programs,  # first, so that what limits as much is not blamed
        "registers": gpu.registers // (warp * num_warps),
        "shared": gpu.shared_bytes // (shared_bytes + 1024) if shared_bytes else gpu.programs,
        "threads": gpu.threads // (num_warps * gpu.warp_size),
    }
    limit = min(limits, key=lambda name: limits[name])
    if limits[limit] < 1:
        raise ConfigError(limit, 0, "enough of a multiprocessor for one program")
    return Occupancy(limits[limit], limit, limits[limit] * num_warps)


def gpu_seconds(
    gpu: Gpu,
    *,
    flops: float,
    bytes_moved: float,
    programs: int,
    registers: int,
    shared_bytes: int,
    num_warps: int,
    spilled_bytes: int = 0,
    matrix: bool = False,
) -> float:
    """Bound on a kernel's time: roofline, lengthened where waves are partly empty or few bytes fly.

    Args:
        programs: of the whole grid. matrix: whether products run on matrix units.
        spilled_bytes: of a thread, each written and read once more.

    Raises:
        ConfigError: see `occupancy`.
    """
    beside = occupancy(gpu, registers=registers, shared_bytes=shared_bytes, num_warps=num_warps)
    slots = beside.programs * gpu.multiprocessors
    waves = math.ceil(programs / slots)
    quantisation = waves * slots / programs if programs > slots else 1.0
    busy = min(1.0, programs / gpu.multiprocessors)
    resident = min(beside.warps, math.ceil(programs / gpu.multiprocessors) * num_warps)
    in_flight = min(1.0, resident / 16)  # warps that keep memory busy, from four on each scheduler
    spills = 2.0 * spilled_bytes * programs * num_warps * gpu.warp_size
    arithmetic = flops / ((gpu.matrix_flops if matrix else gpu.flops) * busy)
    memory = (bytes_moved + spills) / (gpu.bandwidth * busy * in_flight)
    return max(arithmetic, memory) * quantisation + 2e-6


def cpu_seconds(
    cpu: Cpu,
    *,
    flops: float,
    bytes_moved: float,
    working_set: float,
    threads: int = 1,
    lanes: int | None = None,
    chains: int = 8,
) -> float:
    """Bound on a kernel's time on a CPU.

    Args:
        working_set: bytes that are touched, which says where they come from.
        lanes: floats of the vectors in use; the widest unless given.
        chains: independent sums; a multiply-add takes four cycles, so few of them leave units idle.
    """
    lanes = min(lanes or cpu.floats, cpu.floats)
    filled = min(1.0, chains / (4 * cpu.fma_units))
    peak = 2 * lanes * cpu.fma_units * cpu.hertz * filled * threads
    share = working_set / threads
    place = cpu.first if share <= cpu.first_bytes else cpu.second
    place = place if share <= cpu.second_bytes else cpu.memory
    return max(flops / peak, bytes_moved / (place * threads)) + cpu.fork_s * (threads > 1)
