"""Generated Triton text to machine code, ahead of time and without a GPU.

The compiler runs in a process of its own (`python -m codegen.compile`), because Triton decides when it
is imported whether kernels are compiled or interpreted, and because compilers can crash.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rewriter.errors import ConfigError, RewriterError

__all__ = [
    "TARGETS",
    "Compiled",
    "KernelCompileError",
    "Target",
    "compile_each",
    "compile_texts",
]


class KernelCompileError(RewriterError):
    """A compiler refused generated text: a defect of the generator, told with its first messages."""


@dataclass(frozen=True)
class Target:
    """A kind of GPU.

    Attributes:
        backend: `"cuda"` or `"hip"`. arch: as Triton wants it.
        warp_size: threads that run together.
        binary, assembly: file name endings of what comes out.
    """

    backend: str
    arch: int | str
    warp_size: int
    binary: str
    assembly: str

    @staticmethod
    def parse(text: str) -> Target:
        """A key of `TARGETS`. Raises ConfigError."""
        if text not in TARGETS:
            raise ConfigError("target", text, f"one of {', '.join(TARGETS)}")
        return TARGETS[text]


TARGETS = {
    **{f"cuda:sm_{n}": Target("cuda", n, 32, "cubin", "ptx") for n in (80, 86, 89, 90)},
    "hip:gfx942": Target("hip", "gfx942", 64, "hsaco", "amdgcn"),
}
"""What was tried, by its name on the command line."""


@dataclass(frozen=True)
class Compiled:
    """One kernel for one target.

    Attributes:
        binary, assembly: cubin or hsaco; PTX or AMD assembly.
        llir: the LLVM IR they were made from, after Triton's own passes.
        ttgir: Triton's dialect for GPUs, with layouts, that it was made from in turn.
        facts: entry, arguments in order with types and divisibility, the pointers trailing them (null
            where scratch_bytes is 0), constants, grid, threads, shared_bytes, registers, spilled_bytes.
    """

    binary: bytes
    assembly: str
    llir: str
    ttgir: str
    facts: dict[str, Any]


def compile_texts(texts: Mapping[str, str], target: str) -> dict[str, Compiled]:
    """Compile every text that `generate` made, by name.

    Args:
        texts: names that are file names; target: a key of `TARGETS`.

    Raises:
        ConfigError: an unknown target, or no Triton.
        KernelCompileError: a text did not compile.
    """
    found: dict[str, Compiled] = {}
    for name, result in compile_each(texts, target).items():
        if isinstance(result, KernelCompileError):
            raise result
        found[name] = result
    return found


def compile_each(texts: Mapping[str, str], target: str) -> dict[str, Compiled | KernelCompileError]:
    """`compile_texts`, with the error in the place of what did not compile.

    Raises:
        ConfigError: an unknown target, or no Triton.
        KernelCompileError: the compiler's process died.
    """
    kind = Target.parse(target)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        for name, text in texts.items():
            (place / f"{name}.py").write_text(text, encoding="utf-8")
        _run_worker(place, target)
        facts = json.loads((place / "facts.json").read_text())
        return {name: _result(place / name, kind, target, facts[name]) for name in texts}


def _result(
    path: Path, kind: Target, target: str, facts: dict[str, Any]
) -> Compiled | KernelCompileError:
    """What the worker left of one text."""
    if "error" in facts:
        return KernelCompileError(f"Triton for {target}:\n{facts['error']}")
    binary = path.with_name(f"{path.name}.{kind.binary}").read_bytes()
    assembly, llir, ttgir = (
        path.with_name(f"{path.name}.{ending}").read_text()
        for ending in (kind.assembly, "llir", "ttgir")
    )
    return Compiled(binary, assembly, llir, ttgir, facts)


def _run_worker(place: Path, target: str) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    # Triton 3.10 changes the default and warns; fused multiply-adds are what the tests allow for.
    environment.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    root = str(Path(__file__).parents[1])
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-m", "codegen.compile", str(place), target]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    if run.returncode == _NO_TRITON:
        raise ConfigError("target", target, "nothing without Triton: pip install rewriter[gpu]")
    if run.returncode != 0:
        told = "\n".join(run.stderr.strip().splitlines()[-12:])
        raise KernelCompileError(f"Triton for {target}:\n{told}")


_NO_TRITON = 7
"""Exit code of the worker."""


def _work(place: Path, target: Target) -> None:
    """In the worker: compile each text in the folder, leaving binaries, assembly and facts there."""
    facts: dict[str, dict[str, Any]] = {}
    for path in sorted(place.glob("*.py")):
        try:
            facts[path.stem] = _compile(path, target)
        except Exception as error:  # the compiler raises many kinds
            facts[path.stem] = {"error": _told(path.stem, error)}
    (place / "facts.json").write_text(json.dumps(facts))


def _told(name: str, error: Exception) -> str:
    lines = "\n".join(str(error).strip().splitlines()[-12:])
    return f"{name}: {type(error).__name__}: {lines}"


def _compile(path: Path, target: Target) -> dict[str, Any]:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from codegen.triton_kernels.generate import load_file

    module = load_file(path)
    launch = module.LAUNCH
    function = getattr(module, launch["kernel"])
    constants, signature, attributes = dict(launch["constants"]), {}, {}
    arguments = []
    for position, name in enumerate(function.arg_names):
        kind, _, divisor = launch["signature"].get(name, "constexpr").partition(":")
        if divisor == "1":
            constants[name], kind = 1, "constexpr"
        signature[name] = kind
        if kind == "constexpr":
            continue
        arguments.append({"name": name, "type": kind, "divisible_by": int(divisor or 1)})
        if divisor:
            attributes[(position,)] = [["tt.divisibility", int(divisor)]]
    kernel = triton.compile(
        ASTSource(function, signature, constants, attributes),
        target=GPUTarget(target.backend, target.arch, target.warp_size),
        options={"num_warps": launch["num_warps"], "num_stages": launch["num_stages"]},
    )
    binary = path.with_suffix(f".{target.binary}")
    binary.write_bytes(kernel.asm[target.binary])
    for kind in (target.assembly, "llir", "ttgir"):
        path.with_suffix(f".{kind}").write_text(kernel.asm[kind])
    return {
        "entry": kernel.metadata.name,
        "arguments": arguments,
        "trailing": ["global_scratch", "profile_scratch"],
        "constants": constants,
        "grid": list(launch["grid"]),
        "threads": launch["num_warps"] * target.warp_size,
        "shared_bytes": kernel.metadata.shared,
        "scratch_bytes": kernel.metadata.global_scratch_size,
        "triton": triton.__version__,
        **_resources(target, binary, kernel.asm[target.assembly]),
    }


def _resources(target: Target, binary: Path, assembly: str) -> dict[str, int]:
    """Registers of a thread, and bytes of them that had to go to memory."""
    if target.backend == "hip":
        found = dict(re.findall(r"\.(vgpr_count|private_segment_fixed_size):\s+(\d+)", assembly))
        return {
            "registers": int(found["vgpr_count"]),  # scalar ones spill into lanes of these
            "spilled_bytes": int(found["private_segment_fixed_size"]),
        }
    from triton import knobs

    command = [knobs.nvidia.cuobjdump.path, "-res-usage", str(binary)]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    found = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", run.stdout))
    return {
        "registers": int(found["REG"]),
        "spilled_bytes": int(found["STACK"]) + int(found["LOCAL"]),  # kernels have no stack else
    }


if __name__ == "__main__":
    try:
        import triton as _triton  # noqa: F401
    except ImportError:
        sys.exit(_NO_TRITON)
    _work(Path(sys.argv[1]), TARGETS[sys.argv[2]])
