"""Cubins on a GPU through CUDA's driver: what was compiled ahead of time is what is timed.

A text that a pack lacks, because the card divides the work in another way than the one that the pack was
made for, is compiled by Triton when it is launched, and counted.
"""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from codegen.triton_kernels.generate import launch
from ir_dataset.cost_models.triton_code import argument_types, for_launch
from ir_dataset.cost_models.triton_families import Recorded
from ir_dataset.cost_models.triton_pack import Pack, text_key
from rewriter.errors import ConfigError, InputError, RewriterError

__all__ = ["CudaError", "Driver", "parameters"]

_DYNAMIC_SHARED = 8
"""CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES"""
_PLENTY = 48 * 1024
"""Shared memory that a kernel has without asking."""
_NUMBERS = {"i32": ctypes.c_int32, "i64": ctypes.c_int64, "fp32": ctypes.c_float}


class CudaError(RewriterError):
    """The driver refused a cubin or a launch; names the call and the driver's code."""


def parameters(
    facts: Mapping[str, Any], types: Mapping[str, str], values: Sequence[Any]
) -> list[ctypes._SimpleCData[Any]]:
    """A kernel's parameters as the driver takes them.

    Args:
        facts: of the compiled text. types: of all arguments, by name, as the text was specialised.
        values: of all arguments, in that order.

    Raises:
        InputError: a value is not what the text was compiled for.
    """
    given = dict(zip(types, values, strict=True))
    found: list[ctypes._SimpleCData[Any]] = []
    for argument in facts["arguments"]:
        name, kind, divisor = argument["name"], argument["type"], argument["divisible_by"]
        value = given[name]
        number = value.data_ptr() if kind.startswith("*") else value
        if divisor > 1 and number % divisor:
            raise InputError(f"{name}: {number} where a multiple of {divisor} was compiled")
        found.append(_NUMBERS.get(kind, ctypes.c_void_p)(number))
    if facts["scratch_bytes"]:
        raise InputError(f"scratch_bytes: {facts['scratch_bytes']}, allowed: 0")
    return [*found, *(ctypes.c_void_p(None) for _ in facts["trailing"])]


@dataclass(frozen=True)
class _Loaded:
    """A function of the driver, and what it was compiled for."""

    function: ctypes.c_void_p
    facts: Mapping[str, Any]


class Driver:
    """Loads what a pack holds, and launches it on torch's current stream.

    Attributes:
        used: texts by where their code came from, `pack` or `compiled here`.

    Raises:
        ConfigError: there is no CUDA driver.
    """

    def __init__(self, pack: Pack) -> None:
        self.pack = pack
        self.used: Counter[str] = Counter()
        self._loaded: dict[str, _Loaded | None] = {}
        try:
            self._driver = ctypes.CDLL("libcuda.so.1")
        except OSError as error:
            raise ConfigError("device", "none", "a GPU with its CUDA driver") from error

    def prepared(self, launches: Sequence[Recorded]) -> Callable[[], None]:
        """Everything but the launches themselves done, so that they take a few microseconds each."""
        calls = [self._prepared(one) for one in launches]

        def run() -> None:
            for call in calls:
                call()

        return run

    def _prepared(self, one: Recorded) -> Callable[[], None]:
        types = argument_types(one.text, one.arguments)
        key = text_key(for_launch(one.text, one.arguments), self.pack.target)
        if key not in self._loaded:
            self._loaded[key] = self._load(key)
            self.used["pack" if self._loaded[key] else "compiled here"] += 1
        loaded = self._loaded[key]
        if loaded is None:
            return lambda: launch(one.text, one.grid, one.arguments)
        given = parameters(loaded.facts, types, one.arguments)
        return self._call_of(loaded, one.grid, given)

    def _load(self, key: str) -> _Loaded | None:
        found = self.pack.binary(key)
        if found is None:
            return None
        cubin, facts = found
        module, function = ctypes.c_void_p(), ctypes.c_void_p()
        self._call("cuModuleLoadData", ctypes.byref(module), cubin)
        entry = facts["entry"].encode()
        self._call("cuModuleGetFunction", ctypes.byref(function), module, entry)
        if facts["shared_bytes"] > _PLENTY:
            asked = ctypes.c_int(facts["shared_bytes"])
            self._call("cuFuncSetAttribute", function, ctypes.c_int(_DYNAMIC_SHARED), asked)
        return _Loaded(function, facts)

    def _call_of(
        self, loaded: _Loaded, grid: tuple[int, ...], given: list[ctypes._SimpleCData[Any]]
    ) -> Callable[[], None]:
        import torch

        pointers = (ctypes.c_void_p * len(given))(
            *(ctypes.cast(ctypes.pointer(one), ctypes.c_void_p) for one in given)
        )
        blocks = [ctypes.c_uint(n) for n in (*grid, 1, 1)[:3]]
        threads = [ctypes.c_uint(n) for n in (loaded.facts["threads"], 1, 1)]
        shared = ctypes.c_uint(loaded.facts["shared_bytes"])

        def call(_alive: object = given) -> None:
            stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
            how = (*blocks, *threads, shared, stream, pointers, None)
            self._call("cuLaunchKernel", loaded.function, *how)

        return call

    def _call(self, name: str, *arguments: Any) -> None:
        code = getattr(self._driver, name)(*arguments)
        if code:
            raise CudaError(f"{name} failed with {code}")
