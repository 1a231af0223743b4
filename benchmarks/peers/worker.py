"""A candidate in a process of its own, told over a pipe what to do.

Runtimes that share a process share its OpenMP, its allocator and its processors; apart, each one can
be stopped while another has its turn. Requests and replies are one line of JSON each:

    prepare  module model_dir dtype                     -> {}
    load     module model_dir dtype threads options     -> facts
    prefill  tokens capacity logits                     -> ms
    step     tokens untimed logits                      -> ms of each token but the first `untimed`
    profile  tokens                                     -> phases of a step, and what each takes

`logits` is "" or a .npy file to write, [tokens, vocab_size] fp32 (one row for a prefill). A reply with
`unavailable` or `error` tells why there is no other. Whatever libraries print goes to standard error.
"""

from __future__ import annotations

import ctypes
import dataclasses
import importlib
import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from peers.peer import Peer, Unavailable

PR_SET_PDEATHSIG = 1


def main() -> None:
    """Serve until the pipe is closed."""
    _die_with_parent()
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    worker = Worker()
    for line in sys.stdin:
        request = json.loads(line)
        _answer(worker, request.pop("do"), request, replies)


def _answer(worker: Worker, do: str, request: dict[str, Any], replies: TextIO) -> None:
    try:
        reply = getattr(worker, do)(**request)
    except Unavailable as error:
        reply = {"unavailable": str(error)}
    except Exception as error:  # whatever a runtime raises is for the table of results
        reply = {"error": f"{type(error).__name__}: {error}"}
    replies.write(json.dumps(reply) + "\n")
    replies.flush()


def _die_with_parent() -> None:
    """A stopped process would not see its pipe close."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


class Worker:
    """The requests."""

    peer: Peer

    def prepare(self, module: str, model_dir: str, dtype: str) -> dict[str, Any]:
        """Convert the model where this candidate needs that."""
        implementation = importlib.import_module(f"peers.{module}")
        if hasattr(implementation, "prepare"):
            implementation.prepare(Path(model_dir), dtype)
        return {}

    def load(
        self, module: str, model_dir: str, dtype: str, threads: int, options: dict[str, str]
    ) -> dict[str, Any]:
        """Read the weights; the reply is what the candidate tells about itself."""
        implementation = importlib.import_module(f"peers.{module}")
        self.peer = implementation.load(Path(model_dir), dtype, threads, **options)
        return dataclasses.asdict(self.peer.facts)

    def prefill(self, tokens: Sequence[int], capacity: int, logits: str) -> dict[str, Any]:
        """A fresh state behind a prompt."""
        start = time.perf_counter()
        row = self.peer.prefill(tokens, capacity)
        ms = (time.perf_counter() - start) * 1e3
        if logits:
            np.save(logits, _numbers(row)[None])
        return {"ms": ms}

    def step(self, tokens: Sequence[int], untimed: int, logits: str) -> dict[str, Any]:
        """One token after the other, each timed until its logits are there."""
        ms, rows = list[float](), list[np.ndarray]()
        for token in tokens:
            start = time.perf_counter()
            row = self.peer.step(token)
            ms.append((time.perf_counter() - start) * 1e3)
            if logits:
                rows.append(_numbers(row))
        if logits:
            np.save(logits, np.stack(rows))
        return {"ms": ms[untimed:]}

    def profile(self, tokens: Sequence[int]) -> dict[str, Any]:
        """Where the time of a step goes, of candidates that can tell."""
        if not hasattr(self.peer, "profile"):
            raise Unavailable("it cannot tell where its time goes")
        return {"phases": self.peer.profile(tokens)}  # pyright: ignore[reportAttributeAccessIssue]


def _numbers(row: Any) -> np.ndarray:
    """A copy in fp32 of a tensor or an array of any dtype."""
    if hasattr(row, "float"):
        row = row.detach().float().numpy()
    return np.array(row, dtype=np.float32)


if __name__ == "__main__":
    main()
