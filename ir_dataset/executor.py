"""Where tasks run: processes of this machine, or Ray. Same tasks, same keys, same bytes.

A task is a stage's name and an encoded input; what it gives is stored by the worker, and only the hash
comes back. Inputs may crash a worker or hang it: the task fails, with the reason, and the rest goes on.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from ir_dataset.store import Store
from rewriter.errors import ConfigError

__all__ = ["Executor", "LocalExecutor", "Outcome", "RayExecutor", "Work", "make_executor"]


@dataclass(frozen=True)
class Outcome:
    """What became of a task: the hash of its output in the store, or the kind of failure and why."""

    output: str = ""
    error_kind: str = ""
    error: str = ""
    wall_s: float = 0.0


@dataclass(frozen=True)
class Work:
    """A stage's tasks: each `payloads[i]` is one encoded input."""

    perform: Callable[[Store, bytes], str]
    """Works on one input and returns the hash of its stored output; a function that pickles."""
    store: Path
    payloads: Sequence[bytes]
    timeout_s: float
    """Wall time of one task, after which its worker is killed."""
    stop: Callable[[], bool] = lambda: False
    """Asked before a task begins: True leaves it and those after it for another run."""


OnDone = Callable[[int, Outcome], None]
"""Called in the parent with the position of the task, in whatever order they end."""


class Executor(Protocol):
    """Runs the tasks of one stage at a time."""

    def run(self, work: Work, on_done: OnDone) -> None:
        """Run all, or until `work.stop`; returns when each that ran has had its `on_done`."""
        ...

    def close(self) -> None:
        """Give back what it holds."""
        ...


Perform = Callable[[Store, bytes], str]


def run_task(perform: Perform, root: Path, payload: bytes) -> Outcome:
    """Run one task in this process. Never raises an Exception."""
    started = time.perf_counter()
    try:
        output = perform(Store(root), payload)
    except MemoryError:
        return Outcome(error_kind="memory", error="out of memory")
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        kind = "disk" if full else "os"
        return Outcome(error_kind=kind, error=str(error), wall_s=time.perf_counter() - started)
    except Exception as error:
        kind = type(error).__name__
        return Outcome(error_kind=kind, error=str(error), wall_s=time.perf_counter() - started)
    return Outcome(output=output, wall_s=time.perf_counter() - started)


def _start_worker() -> None:
    """Die with the parent, whatever ends it."""
    import ctypes
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    death_signal = 1
    ctypes.CDLL(None).prctl(death_signal, signal.SIGKILL)


class LocalExecutor:
    """A pool of processes on this machine.

    Args:
        jobs: how many at a time.
    """

    def __init__(self, jobs: int) -> None:
        self.jobs = jobs

    def run(self, work: Work, on_done: OnDone) -> None:
        """Keep `jobs` workers busy; a crashed or late worker is replaced."""
        import multiprocessing
        from concurrent.futures import FIRST_COMPLETED, wait

        from pebble import ProcessPool

        context: Any = multiprocessing.get_context("spawn")
        workers = min(self.jobs, max(len(work.payloads), 1))
        waiting = iter(enumerate(work.payloads))
        running: dict[Any, int] = {}
        with ProcessPool(max_workers=workers, context=context, initializer=_start_worker) as pool:
            try:
                while True:
                    free = 2 * workers - len(running)
                    for index, payload in () if work.stop() else islice(waiting, free):
                        arguments = (work.perform, work.store, payload)
                        running[pool.schedule(run_task, arguments, timeout=work.timeout_s)] = index
                    if not running:
                        return
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        on_done(running.pop(future), _outcome(future, work.timeout_s))
            except BaseException:
                pool.stop()
                raise

    def close(self) -> None:
        """Nothing outlives `run`."""


def _outcome(future: Any, timeout_s: float) -> Outcome:
    from concurrent.futures import TimeoutError as Late

    from pebble import ProcessExpired

    try:
        return future.result()
    except Late:
        return Outcome(error_kind="timeout", error=f"took over {timeout_s:g} s", wall_s=timeout_s)
    except ProcessExpired as error:
        code = error.exitcode
        how = f"signal {-code}" if code and code < 0 else f"exit code {code}"
        return Outcome(error_kind="crash", error=f"the worker died: {how}")


class RayExecutor:
    """Tasks on a Ray cluster whose nodes see the store's directory.

    Tasks travel in batches, since one costs Ray a millisecond. A batch whose worker or node dies is tried
    again by Ray, on another node where its own is gone; a batch that fails for good is run task by task,
    so that one bad input takes nothing else with it. A task that its worker dies of has crashed; one that
    only lost its node, again and again, is `node`, which says nothing of the task.

    Args:
        address: of a running cluster; None starts one here with `jobs` CPUs.
        jobs: CPUs of a cluster started here.
        batch: tasks sent at a time.

    Raises:
        ConfigError: Ray is not installed, or there is no cluster at the address.
    """

    def __init__(self, jobs: int, address: str | None = None, batch: int = 32) -> None:
        try:
            import ray
        except ImportError as error:
            allowed = "local, or ray once `pip install 'rewriter[ray]'` was run"
            raise ConfigError("executor", "ray", allowed) from error
        self.batch, self._ray = batch, ray
        try:
            if address:
                ray.init(address=address, log_to_driver=False)
            else:
                ray.init(num_cpus=jobs, include_dashboard=False, log_to_driver=False)
        except ConnectionError as error:
            raise ConfigError("ray-address", address, f"a running cluster ({error})") from error
        self._run = ray.remote(max_retries=3)(_run_batch)

    def run(self, work: Work, on_done: OnDone) -> None:
        """Send batches, then singles where a batch was lost."""
        size = max(1, min(self.batch, -(-len(work.payloads) // self._parallel())))
        positions = list(range(len(work.payloads)))
        batches = [positions[start : start + size] for start in range(0, len(positions), size)]
        lost = [index for batch, _ in self._send(work, batches, on_done) for index in batch]
        for batch, error in self._send(work, [[index] for index in lost], on_done):
            on_done(batch[0], _lost(error, self._ray.exceptions))

    def close(self) -> None:
        """Leave the cluster; one that was started here ends."""
        self._ray.shutdown()

    def _parallel(self) -> int:
        return max(1, int(self._ray.cluster_resources().get("CPU", 1)))

    def _send(
        self, work: Work, batches: list[list[int]], on_done: OnDone
    ) -> list[tuple[list[int], Exception]]:
        """Run batches; returns those that gave nothing, and what Ray said."""
        waiting, pending = iter(batches), {}
        lost: list[tuple[list[int], Exception]] = []
        while True:
            free = 2 * self._parallel() - len(pending)
            for batch in () if work.stop() else islice(waiting, free):
                payloads = [work.payloads[index] for index in batch]
                sent = self._run.remote(work.perform, work.store, payloads, work.timeout_s)
                pending[sent] = batch
            if not pending:
                return lost
            (done,), _ = self._ray.wait(list(pending), num_returns=1)
            batch = pending.pop(done)
            try:
                outcomes = self._ray.get(done)
            except self._ray.exceptions.RayError as error:
                lost.append((batch, error))
                continue
            for index, outcome in zip(batch, outcomes, strict=True):
                on_done(index, outcome)


def _lost(error: Exception, exceptions: Any) -> Outcome:
    """What a task is told to have met that gave nothing, alone and however often it was tried."""
    if isinstance(error, exceptions.OutOfMemoryError):
        return Outcome(
            error_kind="memory", error="Ray ended the worker: its node ran out of memory"
        )
    if isinstance(error, exceptions.WorkerCrashedError):
        return Outcome(error_kind="crash", error="the worker died")
    return Outcome(error_kind="node", error=f"Ray lost it: {type(error).__name__}")


def _run_batch(
    perform: Perform, root: Path, payloads: Sequence[bytes], timeout_s: float
) -> list[Outcome]:
    """In a Ray worker: each task in turn, stopped by an alarm where it is late."""
    outcomes = []
    for payload in payloads:
        with _alarm(timeout_s):
            try:
                outcomes.append(run_task(perform, root, payload))
            except _Late:
                late = f"took over {timeout_s:g} s"
                outcomes.append(Outcome(error_kind="timeout", error=late, wall_s=timeout_s))
    return outcomes


class _Late(BaseException):
    """Raised by the alarm; no `except Exception` of a stage stops it."""


@contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    import signal
    import threading

    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(*_: Any) -> None:
        raise _Late

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def make_executor(kind: str, jobs: int, address: str | None = None) -> Executor:
    """`local` or `ray`.

    Raises:
        ConfigError: another kind, fewer than one job, or Ray is not there.
    """
    if jobs < 1:
        raise ConfigError("jobs", jobs, "at least 1")
    if kind == "local":
        return LocalExecutor(jobs)
    if kind == "ray":
        return RayExecutor(jobs, address)
    raise ConfigError("executor", kind, "local or ray")
