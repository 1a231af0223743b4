"""Workers that crash, hang, fill the disk or raise: one task is lost, with its reason."""

import json
import subprocess
import sys

import pytest

from ir_dataset.executor import _lost, make_executor
from ir_dataset.runner import TRANSIENT
from rewriter.errors import ConfigError

SCRIPT = """
import errno, json, os, sys, time
from pathlib import Path
from ir_dataset.executor import Work, make_executor

def perform(store, payload):
    text = payload.decode()
    if text == "crash":
        os.abort()
    if text == "hang":
        time.sleep(60)
    if text == "raise":
        raise ValueError("no such thing")
    if text == "full":
        raise OSError(errno.ENOSPC, "No space left on device")
    return store.put(payload)

if __name__ == "__main__":
    kind, root = sys.argv[1:]
    payloads = [b"a", b"crash", b"b", b"hang", b"raise", b"full", b"c"]
    found = {}
    executor = make_executor(kind, 2)
    executor.run(
        Work(perform, Path(root), payloads, 2.0),
        lambda index, outcome: found.setdefault(index, []).append((outcome.output, outcome.error_kind)),
    )
    executor.close()
    print(json.dumps(found))
"""


def _ran(tmp_path, kind):
    script = tmp_path / "work.py"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, script, kind, tmp_path / "store"],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def _check(found, root):
    assert sorted(found) == list("0123456")
    assert all(len(outcomes) == 1 for outcomes in found.values())
    kinds = [found[key][0][1] for key in sorted(found)]
    assert kinds == ["", "crash", "", "timeout", "ValueError", "disk", ""]
    for key, content in (("0", b"a"), ("2", b"b"), ("6", b"c")):
        sha = found[key][0][0]
        assert (root / "cas" / sha[:2] / sha).read_bytes() == content


def test_local_processes(tmp_path):
    _check(_ran(tmp_path, "local"), tmp_path / "store")


def test_ray(tmp_path):
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'rewriter[ray]'")
    _check(_ran(tmp_path, "ray"), tmp_path / "store")


@pytest.mark.parametrize(
    ("name", "kind"),
    [("WorkerCrashedError", "crash"), ("OutOfMemoryError", "memory"), ("NodeDiedError", "node")],
)
def test_a_lost_node_is_no_fault_of_the_task(name, kind):
    exceptions = pytest.importorskip("ray.exceptions", reason="pip install 'rewriter[ray]'")
    error = getattr(exceptions, name)
    told = _lost(error("x") if name != "WorkerCrashedError" else error(), exceptions)
    assert told.error_kind == kind and (kind in TRANSIENT) == (kind == "node")


@pytest.mark.parametrize(
    ("kind", "jobs", "field"), [("slurm", 1, "executor"), ("local", 0, "jobs")]
)
def test_bad_choices_are_named(kind, jobs, field):
    with pytest.raises(ConfigError, match=field):
        make_executor(kind, jobs)
