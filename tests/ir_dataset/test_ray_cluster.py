"""A worker and a node of a Ray cluster are killed in the middle: the dataset is the same, byte for byte."""

import json
import sqlite3
import subprocess
import sys

import pytest

pytest.importorskip("ray", reason="Ray is not installed: pip install 'rewriter[ray]'")
pytest.importorskip("pyarrow", reason="pip install 'rewriter[ir]'")
pytest.importorskip("llvmlite", reason="pip install 'rewriter[ir]'")

MODULES = 18
FUNCTION = """\
define i32 @f{number}(ptr %p, i32 %n) {{
entry:
  br label %loop
loop:
  %i = phi i32 [ 0, %entry ], [ %next, %loop ]
  %at = getelementptr i32, ptr %p, i32 %i
  %x = load i32, ptr %at
{body}
  store i32 %v{last}, ptr %at
  %next = add i32 %i, 1
  %more = icmp slt i32 %next, %n
  br i1 %more, label %loop, label %end
end:
  ret i32 %i
}}
"""

CLUSTER = """
import json, os, signal, sqlite3, subprocess, sys, time
from pathlib import Path

from ray.cluster_utils import Cluster

def done(store, stage):
    try:
        connection = sqlite3.connect(f"file:{store}/tasks.sqlite?mode=ro", uri=True, timeout=5)
        query = "SELECT count(*) FROM task WHERE stage LIKE ? AND status = 'done'"
        (count,) = connection.execute(query, (stage,)).fetchone()
        connection.close()
        return count
    except sqlite3.OperationalError:
        return 0

def busy(node):
    "Processes below the node's raylet that run a batch at this moment."
    (raylet,) = node.all_processes["raylet"]
    parents, found = {}, []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(place.name)] = int((place / "stat").read_text().rpartition(")")[2].split()[1])
            if b"ray::_run_batch" in (place / "cmdline").read_bytes():
                found.append(int(place.name))
        except OSError:
            pass  # it ended meanwhile
    return [one for one in found if raylet.process.pid in (parents[one], parents.get(parents[one]))]

def held(process, node, ready=lambda: True):
    "A worker of the node, stopped in the middle of a batch: what it has in hand cannot end."
    while process.poll() is None:
        for worker in busy(node) if ready() else ():
            os.kill(worker, signal.SIGSTOP)
            if worker in busy(node):
                return worker
            os.kill(worker, signal.SIGCONT)
        time.sleep(0.01)
    raise SystemExit("the run ended before anything was killed")

if __name__ == "__main__":
    store, *command = sys.argv[1:]
    small = {"num_cpus": 1, "object_store_memory": 80 << 20}
    cluster = Cluster(initialize_head=True, head_node_args={**small, "include_dashboard": False})
    first, second = (cluster.add_node(**small) for _ in range(2))
    process = subprocess.Popen(
        [*command, "--executor", "ray", "--ray-address", cluster.address], stdout=sys.stderr
    )
    told = {}
    os.kill(held(process, first), signal.SIGKILL)
    worker = held(process, second, lambda: 0 < done(store, "verify"))
    told["done_when_node_died"] = done(store, "%")
    cluster.remove_node(second, allow_graceful=False)
    os.kill(worker, signal.SIGKILL)  # a machine that is gone takes its processes along
    told["status"] = process.wait()
    told["nodes_left"] = len(cluster.list_all_nodes())
    cluster.shutdown()
    print(json.dumps(told))
"""


def _module(number):
    """A module unlike the others: near-duplicates would be left out."""
    lines, value = [], "%x"
    for step in range(6 + number):
        operation = ("add", "mul", "xor", "sub", "or", "shl")[(number * 7 + step * step) % 6]
        lines.append(f"  %v{step} = {operation} i32 {value}, {1 + (number * 31 + step * 17) % 29}")
        value = f"%v{step}"
    return FUNCTION.format(number=number, body="\n".join(lines), last=5 + number)


def _corpus(place):
    (place / "sources").mkdir(parents=True)
    for number in range(MODULES):
        (place / "sources" / f"m{number:02d}.ll").write_text(_module(number))
    text = (
        'name = "cluster"\n\n[[source]]\nkind = "local-tree"\npath = "sources"\nlicense = "MIT"\n'
    )
    (place / "corpus.toml").write_text(text)
    return place / "corpus.toml"


def _command(config, store, output):
    places = ["--config", config, "--store", store, "--output", output, "--jobs", "2"]
    run = [sys.executable, "-m", "rewriter", "ir", "run", *places, "--until", "pack"]
    return [str(part) for part in run]


def _files(directory):
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*.parquet"))
    }


def test_a_killed_worker_and_a_killed_node_change_nothing(tmp_path):
    """Three nodes on this machine; one loses its worker, another goes with all that ran on it."""
    config = _corpus(tmp_path / "corpus")
    script = tmp_path / "cluster.py"
    script.write_text(CLUSTER)
    alone = _command(config, tmp_path / "alone", tmp_path / "expected")
    subprocess.run(alone, check=True, capture_output=True, timeout=120)
    many = _command(config, tmp_path / "shared", tmp_path / "out")
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "shared"), *many],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["status"] == 0, done.stderr[-3000:]
    assert told["nodes_left"] == 2
    expected = _files(tmp_path / "expected")
    assert len(expected) >= 4 and _files(tmp_path / "out") == expected
    assert 0 < told["done_when_node_died"] < _tasks(tmp_path / "shared")["done"]
    assert _tasks(tmp_path / "shared") == _tasks(tmp_path / "alone")


def _tasks(store):
    connection = sqlite3.connect(store / "tasks.sqlite")
    counts = dict(connection.execute("SELECT status, count(*) FROM task GROUP BY status"))
    connection.close()
    return counts
