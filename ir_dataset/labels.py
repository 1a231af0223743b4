"""Labels: how many bytes of machine code each function becomes at -Oz and at -O2.

With LLVM's tools: `opt -passes=default<Oz>` or `<O2>`, then `llc`; the sizes stand in the object's symbol
table. Without them llvmlite does the same in the process for O2. It has no pipeline for size, so there
every function is marked `minsize optsize` and O2 is run, which is another pipeline and is called
`Os-attr`: the two are never mixed under one name.

A Zig module keeps all its functions to itself, and optimising it leaves nothing. There, what nothing in
the module uses is made visible first.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from ir_dataset.elf_symbols import function_sizes
from ir_dataset.reader import is_bitcode, read_module
from ir_dataset.records import Record
from ir_dataset.store import Store
from ir_dataset.toolchain import LLVM_MAJOR, Toolchain
from rewriter.errors import ArtifactError, SourceError

__all__ = ["FunctionSizes", "LabelFailure", "ModuleLabels", "label_module"]

_CODEGEN = ("-function-sections", "-filetype=obj")


class FunctionSizes(Record, frozen=True):
    """One way of compiling a module."""

    kind: str
    """`Oz`, `O2`, or `Os-attr`."""
    tools: str
    """E.g. `opt 22.1.8, llc 22.1.8`."""
    names: tuple[str, ...]
    """Functions that the object has, sorted; inlined and merged ones are gone."""
    sizes: tuple[int, ...]
    """Bytes of each."""


class LabelFailure(Record, frozen=True):
    """A way of compiling that gave nothing."""

    kind: str
    reason: str


class ModuleLabels(Record, frozen=True):
    """A module's labels; a way that failed has none."""

    module: str
    sizes: tuple[FunctionSizes, ...]
    failures: tuple[LabelFailure, ...] = ()


def label_module(
    store: Store,
    sha: str,
    *,
    toolchain: Toolchain | None = None,
    timeout_s: float = 120.0,
    show_unused: bool = False,
) -> ModuleLabels:
    """Compile a stored module for size and for speed, and measure its functions.

    Args:
        toolchain: where the tools are; those of this machine if not given.
        timeout_s: wall time of each step of each way.
        show_unused: make internal functions and variables that the module itself does not use external.

    Raises:
        ArtifactError: the store does not have the module.
        SourceError: there is neither `opt` with `llc`, nor llvmlite.
    """
    tools = toolchain or Toolchain.find()
    data = _with_unused_shown(store.get(sha)) if show_unused else store.get(sha)
    sizes: list[FunctionSizes] = []
    failures: list[LabelFailure] = []
    if tools.reads("opt") and tools.reads("llc"):
        ways = {"Oz": "Oz", "O2": "O2"}
    elif tools.reads("llvmlite"):
        ways = {"Os-attr": "Os-attr", "O2": "O2"}
    else:
        raise SourceError(
            f"labels need opt and llc of LLVM {LLVM_MAJOR}, or llvmlite: pip install llvmlite"
        )
    for kind in ways:
        try:
            if "Oz" in ways:
                built, said = _by_tools(data, kind, tools, timeout_s)
            else:
                built, said = _by_llvmlite(data, kind)
            found = sorted(function_sizes(built).items())
        except (ArtifactError, subprocess.TimeoutExpired, RuntimeError, OSError) as error:
            failures.append(LabelFailure(kind=kind, reason=_reason(error)))
            continue
        sizes.append(
            FunctionSizes(
                kind=kind,
                tools=said,
                names=tuple(name for name, _ in found),
                sizes=tuple(size for _, size in found),
            )
        )
    return ModuleLabels(module=sha, sizes=tuple(sizes), failures=tuple(failures))


def _reason(error: Exception) -> str:
    if isinstance(error, subprocess.TimeoutExpired):
        return f"{Path(error.cmd[0]).name} took longer than {error.timeout:g} s"
    return str(error).strip()[:300]


def _by_tools(data: bytes, kind: str, tools: Toolchain, timeout_s: float) -> tuple[bytes, str]:
    opt, llc = tools.need("opt"), tools.need("llc")
    with tempfile.TemporaryDirectory(prefix="label-") as directory:
        place = Path(directory)
        (place / "in.bc").write_bytes(data)
        _run([str(opt), f"-passes=default<{kind}>", "in.bc", "-o", "opt.bc"], place, timeout_s)
        _run([str(llc), *_CODEGEN, "opt.bc", "-o", "out.o"], place, timeout_s)
        built = (place / "out.o").read_bytes()
    return built, f"opt {tools.llvm_version('opt')}, llc {tools.llvm_version('llc')}"


def _run(command: list[str], place: Path, timeout_s: float) -> None:
    done = subprocess.run(
        command, cwd=place, capture_output=True, timeout=timeout_s, check=False, errors="replace"
    )
    if done.returncode:
        told = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise ArtifactError(f"{Path(command[0]).name}: {told[0]}")


_NAME = re.compile(r'@(?:"[^"]*"|[-\w$.]+)')
_HIDDEN = re.compile(r"^(define |@.*? = )(internal|private) (.*)$", re.MULTILINE)


def _with_unused_shown(module: bytes) -> bytes:
    """As text, with `internal` and `private` gone where a name stands in its definition alone.

    A module that cannot be read comes back as it is.
    """
    reading = read_module(module)
    if reading.reason:
        return module
    uses = Counter(_NAME.findall(reading.text))

    def shown(found: re.Match[str]) -> str:
        name = _NAME.search(found[0])
        unused = name is not None and uses[name[0]] == 1
        return found[1] + found[3] if unused else found[0]

    return _HIDDEN.sub(shown, reading.text).encode("utf-8", "surrogateescape")


def _by_llvmlite(data: bytes, kind: str) -> tuple[bytes, str]:
    import llvmlite.binding as llvm

    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    llvm.initialize_native_asmparser()  # start code has inline assembly
    context = llvm.create_context()
    if is_bitcode(data):
        module = llvm.parse_bitcode(data, context=context)
    else:
        module = llvm.parse_assembly(data.decode("utf-8", "surrogateescape"), context=context)
    # the large code model that is a JIT's default puts code into .ltext
    machine = llvm.Target.from_triple(module.triple).create_target_machine(opt=2, codemodel="small")
    if kind == "Os-attr":
        _mark_for_size(module)
    options: Any = llvm.create_pipeline_tuning_options(speed_level=2)
    builder = llvm.create_pass_builder(machine, options)
    builder.getModulePassManager().run(module, builder)
    version = ".".join(map(str, llvm.llvm_version_info))
    return machine.emit_object(module), f"llvmlite {version}"


def _mark_for_size(module: Any) -> None:
    for function in module.functions:
        if function.is_declaration:
            continue
        attributes = {item for group in function.attributes for item in group.split()}
        if "optnone" not in attributes:
            function.add_function_attribute("minsize")
            function.add_function_attribute("optsize")
