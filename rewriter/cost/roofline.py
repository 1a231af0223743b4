"""The baseline: what memory, arithmetic and launches allow on this machine, with nothing learned.

    seconds = max(flops / peak, bytes / bandwidth) + launches · overhead

The ceilings are measured, once for a processor, a number of threads and a version of torch, and kept
beside what `codegen` compiled. Source: https://doi.org/10.1145/1498765.1498785
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from rewriter import processor
from rewriter.cost.model import Estimate
from rewriter.cost.work import Work
from rewriter.errors import ArtifactError

__all__ = ["Ceilings", "Roofline"]

_FACTOR = 3.0
"""Times lie within this factor of the roofline nine times of ten, about; see docs/cost-models.md."""
_MEBIBYTES = 256


@dataclass(frozen=True)
class Ceilings:
    """What one machine can do with a number of threads.

    Attributes:
        processor: its name. threads: that PyTorch used.
        bandwidth: bytes of memory read in a second.
        flops: fp32 operations in a second, of a product of matrices.
        overhead: seconds that calling an operator on few numbers takes.
    """

    processor: str
    threads: int
    bandwidth: float
    flops: float
    overhead: float

    @staticmethod
    def measured() -> Ceilings:
        """With PyTorch's number of threads; takes about a second and 256 MiB."""
        numbers, few = torch.ones(_MEBIBYTES * 2**18), torch.ones(8)
        square = torch.ones(1024, 1024)
        with torch.no_grad():
            return Ceilings(
                processor=processor.name(),
                threads=torch.get_num_threads(),
                bandwidth=numbers.nbytes / _least(numbers.sum, 6),
                flops=2 * 1024**3 / _least(lambda: square @ square, 20),
                overhead=_least(lambda: few + few, 2000),
            )

    @staticmethod
    def here() -> Ceilings:
        """The kept ones of this machine; measured and kept where there are none.

        Raises:
            ArtifactError: what was kept is not what this version writes.
        """
        from codegen.cache import cached_build, content_hash

        parts = ("ceilings", processor.name(), str(torch.get_num_threads()), torch.__version__)
        path = cached_build(content_hash(*parts), ".json", _write)
        try:
            return Ceilings(**json.loads(path.read_text()))
        except (TypeError, ValueError) as error:
            raise ArtifactError(f"ceilings {path} cannot be read: {error}") from error

    def seconds(self, work: Work) -> float:
        """The roofline of one call."""
        cost = work.cost
        busy = max(cost.flops / self.flops, cost.bytes_moved / self.bandwidth)
        return busy + max(1, cost.launches) * self.overhead


class Roofline:
    """`CostModel` of the ceilings alone: the same on every backend.

    Args:
        ceilings: those of this machine unless given, which may measure them.
    """

    name = "roofline"

    def __init__(self, ceilings: Ceilings | None = None) -> None:
        self.ceilings = ceilings or Ceilings.here()

    def estimate(self, work: Work, backend: str) -> Estimate:
        """Within a factor of three, which decides only what differs by more than four."""
        seconds = self.ceilings.seconds(work)
        return Estimate(seconds, seconds / _FACTOR, seconds * _FACTOR)


def _write(path: Path) -> None:
    path.write_text(json.dumps(asdict(Ceilings.measured())))


def _least(call: Callable[[], object], times: int) -> float:
    found = float("inf")
    for _ in range(times):
        begun = time.perf_counter()
        call()
        found = min(found, time.perf_counter() - begun)
    return found
