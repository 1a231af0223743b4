"""What a compiled Triton kernel looks like: resources, machine code, Triton's own IR and LLVM's.

`sass_` counts instructions by class, `loop_` those of the longest loop, `ttgir_` operators of Triton's GPU
dialect, `llir_` are `ir_dataset.features` of the kernel's function. What a reader refuses is NaN with the
reason beside it.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from codegen.compile import Compiled
from codegen.triton_kernels.generate import specialised

__all__ = [
    "CODE",
    "LLIR",
    "MACHINE",
    "CodeFeatures",
    "argument_types",
    "features",
    "for_launch",
    "sass_counts",
    "ttgir_counts",
]

_CLASSES = {
    "matrix": "HMMA IMMA DMMA QMMA HGMMA IGMMA QGMMA WARPGROUP",
    "fma": "FFMA FMUL FADD FMNMX FSWZADD FFMA2",
    "half": "HFMA2 HADD2 HMUL2 HMNMX2",
    "transcendental": "MUFU",
    "convert": "F2F F2I I2F F2FP I2FP I2IP PRMT FRND",
    "integer": "IMAD IADD3 IADD VIADD LEA SHF LOP3 IABS SGXT IMNMX VIMNMX VIADDMNMX BMSK POPC FLO",
    "compare": "ISETP FSETP HSETP2 PLOP3 SEL FSEL P2R R2P FCHK",
    "uniform": "UIADD3 UIMAD ULEA USHF ULOP3 UISETP USEL UMOV UPRMT ULDC R2UR S2UR REDUX UPLOP3",
    "move": "MOV CS2R S2R LDC",
    "global_load": "LDG LD",
    "global_store": "STG ST RED ATOMG",
    "async_copy": "LDGSTS UTMALDG UBLKCP",
    "shared_load": "LDS LDSM",
    "shared_store": "STS STSM",
    "spill": "LDL STL",
    "shuffle": "SHFL",
    "wait": "BAR DEPBAR LDGDEPBAR SYNCS WARPSYNC MEMBAR ARRIVES",
    "branch": "BRA EXIT CALL RET BSSY BSYNC BRX YIELD",
}
_CLASS_OF = {opcode: name for name, opcodes in _CLASSES.items() for opcode in opcodes.split()}
_SASS = (*_CLASSES, "other")
_INSTRUCTION = re.compile(
    r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ +)?([A-Z]\w*)([^;]*);", re.MULTILINE
)
_OPERATOR = re.compile(
    r'^\s*(?:%[\w:, ]+ = )?"?((?:tt|ttg|ttng|arith|math|scf|cf|gpu|nvgpu)\.[\w.]+)', re.MULTILINE
)
_TTGIR = (
    *"tt.load tt.store tt.dot tt.reduce tt.broadcast tt.expand_dims tt.splat tt.addptr".split(),
    *"tt.trans tt.make_range scf.for scf.if ttg.convert_layout ttg.local_alloc".split(),
    *"ttg.local_load ttg.local_store ttg.memdesc_index ttg.async_copy_global_to_local".split(),
    *"ttg.async_wait ttng.warp_group_dot ttng.warp_group_dot_wait".split(),
)
MACHINE = (
    *("registers", "spilled_bytes", "shared_bytes"),
    *(f"sass_{name}" for name in (*_SASS, "total")),
    *(f"loop_{name}" for name in (*_SASS, "total")),
)
"""Of the binary, in order."""
CODE = (*MACHINE, *(f"ttgir_{n.replace('.', '_')}" for n in (*_TTGIR, "arith", "math", "other")))
"""Besides those the features of Triton's IR."""


def _llir_names() -> tuple[str, ...]:
    from ir_dataset.features import FEATURES

    return tuple(f"llir_{name}" for name in FEATURES)


LLIR = _llir_names()


@dataclass(frozen=True)
class CodeFeatures:
    """By the names of `CODE` and `LLIR`; `reason` says why those of LLVM's IR are NaN, or "".

    Attributes:
        reader: what read the IR.
    """

    values: Mapping[str, float] = field(default_factory=dict)
    reader: str = ""
    reason: str = ""


def features(compiled: Compiled, llvm: str) -> CodeFeatures:
    """Features of a kernel for an NVIDIA GPU.

    Args:
        llvm: version of the LLVM in Triton.
    """
    found = {name: float(compiled.facts[name]) for name in MACHINE[:3]}
    found |= sass_counts(_disassembled(compiled.binary))
    found |= ttgir_counts(compiled.ttgir)
    reader, reason, values = _llir(compiled.llir, compiled.facts["entry"], llvm)
    found |= dict(zip(LLIR, values, strict=True))
    return CodeFeatures(found, reader, reason)


def _disassembled(binary: bytes) -> str:
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as place:
        place.write(binary)
        place.flush()
        command = [knobs.nvidia.cuobjdump.path, "-sass", place.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def sass_counts(text: str) -> dict[str, float]:
    """Instructions by class, in all and in the longest loop, from cuobjdump's text; padding left out."""
    code = [(int(at, 16), op, rest) for at, op, rest in _INSTRUCTION.findall(text) if op != "NOP"]
    first = last = -1
    for at, opcode, rest in code:
        target = re.search(r"0x([0-9a-f]+)", rest) if opcode == "BRA" else None
        start = int(target.group(1), 16) if target else at
        if start < at and at - start > last - first:
            first, last = start, at
    loop = [(at, op, rest) for at, op, rest in code if first <= at <= last and first >= 0]
    found: dict[str, float] = {}
    for prefix, part in (("sass", code), ("loop", loop)):
        counts = Counter(_CLASS_OF.get(opcode, "other") for _, opcode, _ in part)
        found |= {f"{prefix}_{name}": float(counts[name]) for name in _SASS}
        found[f"{prefix}_total"] = float(len(part))
    return found


def ttgir_counts(text: str) -> dict[str, float]:
    """Operators of Triton's GPU dialect."""
    counts: Counter[str] = Counter()
    for name in _OPERATOR.findall(text):
        family = name.partition(".")[0]
        counts[name if name in _TTGIR else family if family in ("arith", "math") else "other"] += 1
    names = (*_TTGIR, "arith", "math", "other")
    return {f"ttgir_{name.replace('.', '_')}": float(counts[name]) for name in names}


def _llir(text: str, entry: str, llvm: str) -> tuple[str, str, Sequence[float]]:
    """What read it, why not, and the features of the entry point."""
    from ir_dataset.features import function_features
    from ir_dataset.ir_text import parse_module
    from ir_dataset.reader import read_module

    nothing = [float("nan")] * len(LLIR)
    reading = read_module(text.encode(), writer_llvm=llvm, allow_newer=True)
    if reading.reason:
        return reading.reader, reading.reason, nothing
    module = parse_module(reading.text)
    names = [function.name for function in module.functions]
    if entry not in names:
        return reading.reader, f"no function {entry} among {names}", nothing
    return reading.reader, "", function_features(module)[names.index(entry)].tolist()


# --- as a launch specialises ---------------------------------------------------------------------


def for_launch(text: str, arguments: Sequence[Any]) -> str:
    """The text to compile for a launch with such arguments, as Triton would when it is launched."""
    return specialised(text, argument_types(text, arguments))


def argument_types(text: str, arguments: Sequence[Any]) -> dict[str, str]:
    """By name: pointers that are aligned, numbers that are 1, divisible by 16 or need 64 bits."""
    names = _parameters(text)
    return {name: _type_of(value) for name, value in zip(names, arguments, strict=True)}


def _parameters(text: str) -> list[str]:
    """Names in the signature of `LAUNCH`, in the order in which arguments are given."""
    launched = text[text.index("\nLAUNCH = {") :]
    signature = launched[launched.index('"signature": {') : launched.index("    },")]
    return re.findall(r'^        "(\w+)": ', signature, re.MULTILINE)


def _type_of(value: Any) -> str:
    from codegen.triton_kernels.generate import pointer

    if hasattr(value, "data_ptr"):
        aligned = value.device.type == "meta" or value.data_ptr() % 16 == 0
        return pointer(value.dtype, 16 if aligned else 0)
    if isinstance(value, float):
        return "fp32"
    if value == 1:
        return "i32:1"
    kind = "i32" if -(2**31) <= value < 2**31 else "i64"
    return f"{kind}:16" if value % 16 == 0 else kind
