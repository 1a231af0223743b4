"""The other end of a worker's pipe: requests, turns, and what a worker takes of the memory."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["Client", "Failed", "room_for_more"]

BENCHMARKS = Path(__file__).parents[1]
PATIENCE_S = 900


class Failed(Exception):
    """A candidate gave a reason for not going on, ended, or took too long."""

    def __init__(self, reason: str, *, unavailable: bool = False) -> None:
        super().__init__(reason)
        self.unavailable = unavailable


class Client:
    """A worker, stopped whenever it has nothing to do.

    Args:
        python: the interpreter that runs it.
        threads: OpenMP threads.
        log: file for whatever its libraries print.
    """

    def __init__(self, python: str, threads: int, log: Path) -> None:
        quiet = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TQDM_DISABLE": "1"}
        own: Mapping[str, str] = {**quiet, "OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}
        self._log = log
        with log.open("w", encoding="utf-8") as output:
            self._process = subprocess.Popen(
                [python, "-m", "peers.worker"],
                cwd=BENCHMARKS,
                env={**os.environ, **own},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                start_new_session=True,  # its own process group: compilers it starts stop with it
            )

    def call(self, do: str, **arguments: Any) -> dict[str, Any]:
        """One request. Raises Failed."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._signal(signal.SIGCONT)
        try:
            self._process.stdin.write(json.dumps({"do": do, **arguments}).encode() + b"\n")
            self._process.stdin.flush()
            ready, _, _ = select.select([self._process.stdout], [], [], PATIENCE_S)
            line = self._process.stdout.readline() if ready else b""
        except BrokenPipeError:
            ready, line = [self._process.stdout], b""
        if not ready:
            raise Failed(f"{do} took longer than {PATIENCE_S} s")
        if not line:
            raise Failed(f"the process ended in {do} ({self._how_it_ended()})")
        self._signal(signal.SIGSTOP)
        reply = json.loads(line)
        for kind in ("unavailable", "error"):
            if kind in reply:
                raise Failed(reply[kind], unavailable=kind == "unavailable")
        return reply

    def memory_bytes(self, kind: str = "Pss") -> int:
        """Resident bytes, of shared pages its share; 0 where the system does not tell.

        `kind`: "Pss" for all, "Pss_File" for those mapped from files, which the system may drop.
        """
        return _kibibytes(Path(f"/proc/{self._process.pid}/smaps_rollup")).get(kind, 0) * 1024

    def close(self) -> None:
        """End it, also if it is stopped."""
        self._signal(signal.SIGKILL)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def _how_it_ended(self) -> str:
        code = self._process.wait()
        how = f"exit code {code}" if code >= 0 else signal.Signals(-code).name
        return f"{how}; {self._log} has what it printed"


def room_for_more(clients: list[Client]) -> int:
    """Bytes that another worker could take without pushing out what these have mapped."""
    available = _kibibytes(Path("/proc/meminfo")).get("MemAvailable")
    if available is None:
        return 2**63
    return available * 1024 - sum(client.memory_bytes("Pss_File") for client in clients)


def _kibibytes(path: Path) -> dict[str, int]:
    """Fields of a file of `Name:  123 kB` lines."""
    if not path.is_file():
        return {}
    lines = (line.split() for line in path.read_text(encoding="utf-8").splitlines())
    return {p[0].rstrip(":"): int(p[1]) for p in lines if len(p) == 3 and p[2] == "kB"}
