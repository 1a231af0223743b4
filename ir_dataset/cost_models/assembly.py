"""What x86 assembly tells about a function: its innermost loops, counted and put through llvm-mca.

A loop here is a label that a later conditional jump of the same function goes back to, with no other
label between. The busiest of them, by instructions on vectors, stands for the function.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping

from rewriter.errors import ConfigError

__all__ = ["FEATURES", "busiest_loops", "count_loop", "cycles"]

FEATURES = (
    *("loop_instructions", "loop_fma", "loop_arithmetic", "loop_loads", "loop_stores"),
    *("loop_shuffles", "loop_stack", "loop_prefetch", "loop_512", "loop_scalar"),
    *("mca_cycles", "mca_uops", "function_instructions", "function_stack"),
)
"""In order; `mca_*` are of one round of the loop."""

_FUNCTION = re.compile(r"^(body_\w+):", re.MULTILINE)
_LABEL = re.compile(r"^(\.L\w+):")
_JUMP = re.compile(r"^\tj(?!mp)\w+\t(\.L\w+)")
_ROUNDS = 100


def busiest_loops(assembly: str) -> dict[str, tuple[list[str], list[str]]]:
    """By function: the instructions of its busiest innermost loop (may be none), and all of them."""
    found = {}
    starts = [*_FUNCTION.finditer(assembly)]
    ends = [match.start() for match in starts[1:]] + [len(assembly)]
    for match, end in zip(starts, ends, strict=True):
        lines = assembly[match.end() : end].splitlines()
        whole = [line.strip() for line in lines if _is_instruction(line)]
        found[match.group(1)] = max(_loops(lines), key=_vector_work, default=[]), whole
    return found


def _loops(lines: list[str]) -> Iterable[list[str]]:
    label, begin = "", 0
    for position, line in enumerate(lines):
        if match := _LABEL.match(line):
            label, begin = match.group(1), position + 1
        elif (match := _JUMP.match(line)) and match.group(1) == label:
            yield [x.strip() for x in lines[begin : position + 1] if _is_instruction(x)]


def _is_instruction(line: str) -> bool:
    return line.startswith("\t") and not line.startswith(("\t.", "\t#"))


def _vector_work(loop: list[str]) -> tuple[int, int]:
    return sum("mm" in line for line in loop), len(loop)


def count_loop(loop: list[str], whole: list[str]) -> dict[str, float]:
    """`FEATURES` less those of llvm-mca."""

    def number(pattern: str, lines: list[str] = loop) -> float:
        return float(sum(re.search(pattern, line) is not None for line in lines))

    return {
        "loop_instructions": float(len(loop)),
        "loop_fma": number(r"^vf(n?m)(add|sub)"),
        "loop_arithmetic": number(r"^v(add|sub|mul|div|max|min|sqrt)[ps]s"),
        "loop_loads": number(r"\(.*\).*,"),
        "loop_stores": number(r", ?-?\w*\([^)]*\)$"),
        "loop_shuffles": number(r"^v(perm|shuf|unpck|insert|extract|blend|pack|broadcast)"),
        "loop_stack": number(r"\(%r[sb]p\)"),
        "loop_prefetch": number(r"^prefetch"),
        "loop_512": number("zmm"),
        "loop_scalar": number(r"^v\w+ss\b"),
        "function_instructions": float(len(whole)),
        "function_stack": number(r"\(%r[sb]p\)", whole),
    }


def cycles(
    loops: Mapping[str, list[str]], cpu: str = "sapphirerapids"
) -> dict[str, dict[str, float]]:
    """Cycles and micro-operations of a round of each loop, as llvm-mca simulates it.

    Raises:
        ConfigError: there is no llvm-mca, or it refused the text.
    """
    tool = shutil.which("llvm-mca-22") or shutil.which("llvm-mca")
    if tool is None:
        raise ConfigError("llvm-mca", None, "installed (package llvm-22)")
    parts = []
    for name, loop in loops.items():
        # The line between keeps the assembler from joining two comments.
        body = "\n".join(f"\t{line}" for line in loop if not line.startswith("j"))
        parts.append(
            f"# LLVM-MCA-BEGIN {name}\n\t.text\n{body}\n\t.text\n# LLVM-MCA-END\n\t.text\n"
        )
    command = [tool, "-json", f"-mcpu={cpu}", f"-iterations={_ROUNDS}", "-mtriple=x86_64"]
    run = subprocess.run(command, input="".join(parts), capture_output=True, text=True, timeout=300)
    if run.returncode != 0:
        raise ConfigError("llvm-mca", run.stderr.strip()[:400], "x86 assembly that it reads")
    found = {}
    for region in json.loads(run.stdout)["CodeRegions"]:
        summary = region["SummaryView"]
        found[region["Name"]] = {
            "mca_cycles": summary["TotalCycles"] / _ROUNDS,
            "mca_uops": summary["TotaluOps"] / _ROUNDS,
        }
    return found
