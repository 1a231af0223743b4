"""The text of a step: phases whose shares threads claim, and waits where one needs another's results."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from codegen.kernel import safe_name
from codegen.step.value import Place, Value

__all__ = ["Arena", "Parameters", "Segment", "step_text"]

_ALIGN = 16
"""Floats of a cache line: no two buffers share one."""


class Arena:
    """Floats for everything a step computes on its way."""

    def __init__(self) -> None:
        self.size = 0

    def take(self, count: int) -> Place:
        """Room for `count` floats that nothing else uses."""
        place = Place(None, self.size)
        self.size += -(-count // _ALIGN) * _ALIGN
        return place


class Parameters:
    """Pointers that a phase takes, so that its text says nothing of where they point."""

    def __init__(self) -> None:
        self.types: list[str] = []
        self.arguments: list[str] = []
        self.reads: list[Place] = []
        self.writes: list[Place] = []

    def read(self, value: Value) -> str:
        """The name of a pointer to the first element of a tensor that is read."""
        self.reads.append(value.place)
        return self._add(f"const {value.place.element}*", value, constant=True)

    def write(self, value: Value) -> str:
        """The same for one that is written."""
        self.writes.append(value.place)
        return self._add(f"{value.place.element}*", value, constant=False)

    def _add(self, kind: str, value: Value, *, constant: bool) -> str:
        self.types.append(kind)
        start = "" if value.start == 0 else f" + ({value.start})"
        self.arguments.append(value.place.pointer(constant) + start)
        return f"p{len(self.types) - 1}"


@dataclass
class Segment:
    """Phases that run one after another in one parallel region; `index` keeps its names apart.

    No thread waits for another at a phase's end, only for shares that are not done where the next
    phase needs them.
    """

    index: int = 0
    functions: dict[str, str] = field(default_factory=dict)
    """Text of parameters and body to the function's name; equal layers share their functions."""
    lines: list[str] = field(default_factory=list)
    headers: dict[str, None] = field(default_factory=dict)
    phases: int = 0
    _unfinished: list[tuple[int, int]] = field(default_factory=list)
    _pending_reads: set[Place] = field(default_factory=set)
    _pending_writes: set[Place] = field(default_factory=set)

    def phase(
        self,
        name: str,
        body: str,
        parameters: Parameters,
        headers: Iterable[str],
        source: str,
        shares: int,
    ) -> None:
        """Append a call.

        Args:
            name: of the function, if it is new.
            shares: into how many the work is cut; the body does the one called `thread`.
            body: C++ statements over the parameters, `entries`, `capacity`, `thread`, `num_threads`.
            source: the node it comes from, for readers.
        """
        reads, writes = set(parameters.reads), set(parameters.writes)
        if (reads | writes) & self._pending_writes or writes & self._pending_reads:
            self.wait()
        self._pending_reads |= reads
        self._pending_writes |= writes
        self.headers |= dict.fromkeys(headers)
        declared = ", ".join(f"{kind} p{i}" for i, kind in enumerate(parameters.types))
        text = f"({declared}, STEP) {{\n{_indented(body)}\n}}"
        function = self.functions.setdefault(
            text, f"{safe_name(name)}_{self.index}_{len(self.functions)}"
        )
        given = ", ".join(parameters.arguments)
        self.lines.append(
            f"PHASE({self.phases}, {shares}, {function}({given}, STEP_ARGUMENTS));"
            f"  // {safe_name(source)}"
        )
        self._unfinished.append((self.phases, shares))
        self.phases += 1

    def wait(self) -> None:
        """All results so far are visible to all threads from here on."""
        for phase, shares in self._unfinished:
            self.lines.append(f"rw::await(shares[{phase}], {shares});")
        self._unfinished.clear()
        self._pending_reads.clear()
        self._pending_writes.clear()


def step_text(segments: list[Segment]) -> str:
    """One C++ function `segment<i>` for each segment; headers are named, not inlined."""
    headers = dict.fromkeys(h for segment in segments for h in segment.headers)
    parts = [f'#include "{name}"' for name in ("parallel.h", *headers)]
    parts += [
        "\n#define STEP int64_t entries, int64_t capacity, int thread, int num_threads",
        "#define STEP_ARGUMENTS entries, capacity, thread, num_threads",
        "#define PHASE(i, count, call) \\",
        "    rw::claim(shares[i], count, [&](int thread, int num_threads) { call; })\n",
    ]
    for segment in segments:
        parts += [
            f"static __attribute__((noinline)) void {name}{text}\n"
            for text, name in segment.functions.items()
        ]
        calls = "\n".join(f"        {line}" for line in segment.lines)
        parts.append(
            f'extern "C" void segment{segment.index}(\n    void* const* pointers, float* arena,'
            f" rw::Shares* shares, int64_t entries,\n    int64_t capacity, int threads) {{\n"
            f"    for (int i = 0; i < {segment.phases}; ++i) shares[i].next = shares[i].done = 0;\n"
            f"    rw::parallel(threads, [&](int, int) {{\n{calls}\n    }});\n}}\n"
        )
    return "\n".join(parts)


def _indented(body: str) -> str:
    return "\n".join(f"    {line}" if line else "" for line in body.splitlines())
