"""Kernels whose text depends on a configuration, and the configuration that a launch of one takes.

Outside of `with tuning(...)` that is the kernel's own, `config_for`. Inside, `codegen.tuning.choose` is
asked as it is for kernels on the CPU: by device, text and sizes. What does not fit on the device takes
forever. While a CUDA graph is captured nothing can be measured: what was chosen before stays, else the
default.
"""

from __future__ import annotations

import math
import time
from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch

from codegen.kernel import Kernel, KernelDescription
from codegen.triton_kernels.generate import described
from codegen.tuning import Problem, choose, current

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

__all__ = ["TunedKernel", "config_of_launch", "device_name", "problem_of"]

C = TypeVar("C", bound="DataclassInstance")


class TunedKernel(Kernel, Generic[C]):
    """A generator of text for a description and a configuration, a frozen dataclass."""

    @abstractmethod
    def config_for(self, description: KernelDescription) -> C:
        """The configuration that ships."""

    @abstractmethod
    def candidates(self, description: KernelDescription) -> tuple[C, ...]:
        """All that are worth measuring on some device; the one that ships need not be among them."""

    @abstractmethod
    def configured_source(self, description: KernelDescription, config: C) -> str:
        """`source` with this configuration."""

    def source(self, description: KernelDescription) -> str:
        """See `Kernel.source`."""
        return self.configured_source(description, self.config_for(description))


def config_of_launch(
    kernel: TunedKernel[C],
    description: KernelDescription,
    device: torch.device,
    sizes: Callable[[], Mapping[str, int]],
    launch: Callable[[C], object],
) -> C:
    """The configuration to launch with; see the module.

    Args:
        sizes: gives those that the time depends on, by name, besides the description's.
        launch: runs the kernel with a configuration; may be called often.
    """
    default = kernel.config_for(description)
    how = current()
    if how is None:
        return default
    problem = problem_of(kernel, description, device, sizes())
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return how.chosen(problem, default)
    return choose(
        problem, kernel.candidates(description), default, lambda c: _seconds(launch, c, device)
    )


def problem_of(
    kernel: TunedKernel[Any],
    description: KernelDescription,
    device: torch.device,
    sizes: Mapping[str, int],
) -> Problem:
    """What a choice is made for and kept under; widths and sizes of elements join `sizes`."""
    weight = description.weight_dtype or description.dtype
    told = {
        **sizes,
        "head_dim": description.head_dim,
        "value_dim": description.value_dim or description.head_dim,
        "element_bytes": description.dtype.itemsize,
        "weight_bytes": weight.itemsize,
    }
    text = described(kernel, description)
    return Problem(f"{kernel.operator} triton", text, told, device_name(device))


def device_name(device: torch.device) -> str:
    """The card's name with its number of multiprocessors; `interpreter` on the CPU."""
    if device.type != "cuda":
        return "interpreter"
    card = torch.cuda.get_device_properties(device)
    return f"{card.name} multiprocessors={card.multi_processor_count}"


def _seconds(launch: Callable[[C], object], config: C, device: torch.device) -> float:
    """The least time of one call, by the device's clock where there is one."""
    from triton.runtime.errors import OutOfResources
    from triton.testing import do_bench

    try:
        if device.type == "cuda":
            least: Any = do_bench(lambda: launch(config), warmup=5, rep=20, return_mode="min")
            return 1e-3 * least
        begun = time.perf_counter()
        launch(config)
        return time.perf_counter() - begun
    except OutOfResources:
        return math.inf
