"""Runs many compilations beside each other, each with its own time limit, inside the sandbox.

A script of its own: standard library only. Reads the file it is given, see `batch.py`, and appends one
line a unit to the results, so that what was compiled before a build is stopped counts.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

__all__ = ["main"]

_MESSAGE = 2000


def main() -> int:
    """Compile everything; 0 whatever the units gave."""
    with open(sys.argv[1], encoding="utf-8") as stream:
        plan = json.load(stream)
    waiting = plan["units"]
    for number in range(plan["rounds"]):
        last = number + 1 == plan["rounds"]
        with ThreadPoolExecutor(plan["jobs"]) as pool:
            found = list(pool.map(lambda unit: _compile(unit, plan), waiting))
        failed = [unit for unit, result in zip(waiting, found, strict=True) if result["reason"]]
        progress = len(failed) < len(waiting)
        final = last or not progress
        _append(plan, [result for result in found if final or not result["reason"]])
        if final or not failed:
            break
        waiting = failed
    return 0


_LOCK = threading.Lock()


def _append(plan: dict[str, Any], results: list[dict[str, Any]]) -> None:
    with _LOCK, open(plan["results"], "a", encoding="utf-8") as stream:
        for result in results:
            if result is not None and not result.get("written"):
                stream.write(json.dumps(result) + "\n")


def _compile(unit: dict[str, Any], plan: dict[str, Any]) -> dict[str, Any]:
    """The first attempt that gives a file."""
    result: dict[str, Any] = {}
    for number, command in enumerate(unit["attempts"]):
        result = _run(unit, number, command, plan)
        if not result["reason"]:
            _append(plan, [result])
            return {**result, "written": True}
    return result


def _run(
    unit: dict[str, Any], number: int, command: list[str], plan: dict[str, Any]
) -> dict[str, Any]:
    output = os.path.join(plan["drop"], unit["key"] + ".bc")
    partial = output + ".part"
    command = [part.replace("{output}", partial) for part in command]
    started = time.monotonic()
    status, text = _finish(command, plan["unit_s"])
    reason = kind = ""
    if status is None:
        kind, reason = "timeout", f"no end after {plan['unit_s']:g} s"
    elif status < 0:
        kind, reason = "compile", f"the compiler ended by signal {-status}"
    elif status or not os.path.exists(partial):
        kind, reason = "compile", _first_error(text) or f"the compiler ended with status {status}"
    else:
        os.replace(partial, output)
    return {
        "key": unit["key"],
        "attempt": number,
        "kind": kind,
        "reason": reason,
        "seconds": round(time.monotonic() - started, 3),
    }


def _finish(command: list[str], seconds: float) -> tuple[int | None, str]:
    """Status, None where it was too slow, and what was printed."""
    child = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        text, _ = child.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        child.communicate()
        return None, ""
    return child.returncode, text[-64_000:].decode("utf-8", "replace")


def _first_error(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    wanted = [line for line in lines if "error" in line.lower()] or lines
    return wanted[0][:_MESSAGE] if wanted else ""


if __name__ == "__main__":
    sys.exit(main())
