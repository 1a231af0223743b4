"""Builds are held: by time, disk, memory, network and user; and nothing is left of them."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ir_dataset.extract import sandbox as module
from ir_dataset.extract.sandbox import BUILD_ROOT, ISOLATION, Sandbox
from rewriter.errors import ConfigError, SourceError

PATH = {"PATH": "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"}
REASON = module._no_namespaces()
isolated = pytest.mark.skipif(bool(REASON), reason=f"namespaces are not allowed: {REASON}")

ESCAPING = "setsid sh -c 'while :; do sleep 0.05; echo >> ../tmp/alive; done' & sleep 60"
"""A grandchild in a session of its own, which killing the group does not reach."""


def _run(place, text, **limits):
    return Sandbox(workspace=place, **limits).run(["sh", "-c", text], PATH)


def _still_writes(path):
    size = path.stat().st_size
    time.sleep(0.4)
    return path.stat().st_size != size


@pytest.fixture(params=["required", "none"])
def either(request, monkeypatch):
    if request.param == "required" and REASON:
        pytest.skip(f"namespaces are not allowed: {REASON}")
    monkeypatch.setenv(ISOLATION, request.param)
    return request.param


def test_status_and_output_come_back(tmp_path, either):
    finished = _run(tmp_path, "echo out; echo err >&2; exit 7")
    assert (finished.status, finished.limit) == (7, "")
    assert finished.tail == "out\nerr\n"


def test_the_end_of_a_long_output_is_kept(tmp_path, either):
    finished = _run(tmp_path, "seq 100000; echo last")
    assert len(finished.tail) == 64 << 10 and finished.tail.endswith("100000\nlast\n")


def test_a_late_build_is_killed_with_its_grandchildren(tmp_path, either):
    finished = _run(tmp_path, ESCAPING, wall_s=1.0)
    assert finished.limit == "timeout" and finished.status != 0 and finished.wall_s < 10
    assert (tmp_path / "tmp/alive").stat().st_size > 0
    assert not _still_writes(tmp_path / "tmp/alive")


def test_what_a_build_leaves_running_is_killed(tmp_path, either):
    finished = _run(tmp_path, ESCAPING.replace("sleep 60", "sleep 0.3"))
    assert finished.limit == "" and finished.status == 0
    assert not _still_writes(tmp_path / "tmp/alive")


def test_a_build_that_fills_the_disk_is_stopped(tmp_path, either):
    text = "i=0; while :; do i=$((i + 1)); head -c 1M /dev/zero > $i; sleep 0.02; done"
    finished = _run(tmp_path, text, disk_bytes=8 << 20, wall_s=60)
    assert finished.limit == "disk"


def test_files_and_memory_are_limited(tmp_path, either):
    assert _run(tmp_path, "head -c 3M /dev/zero > big", disk_bytes=1 << 20).status != 0
    program = "import sys; sys.exit(len(bytearray(1 << 28)) == 0)"
    command = ["/usr/bin/python3", "-IS", "-c", program]
    assert Sandbox(workspace=tmp_path, memory_bytes=1 << 30).run(command, PATH).status == 0
    assert Sandbox(workspace=tmp_path, memory_bytes=128 << 20).run(command, PATH).status != 0


def test_the_environment_is_minimal(tmp_path, either, monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "x")
    finished = _run(tmp_path, "env")
    assert "SECRET_TOKEN" not in finished.tail
    assert "SOURCE_DATE_EPOCH=" in finished.tail and "LC_ALL=C.UTF-8" in finished.tail


@isolated
def test_there_is_no_network(tmp_path):
    finished = _run(tmp_path, "cat /proc/net/dev")
    names = [line.split(":")[0].strip() for line in finished.tail.splitlines() if ":" in line]
    assert [name for name in names if name and "/" not in name and " " not in name] == ["lo"]


@isolated
def test_the_place_is_the_same_for_every_workspace(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        finished = _run(tmp_path / name, "pwd; echo $HOME; touch ../src/made")
        assert finished.tail == f"{BUILD_ROOT}/src\n{BUILD_ROOT}/home\n"
        assert (tmp_path / name / "src/made").exists()


@isolated
def test_homes_are_hidden_but_for_what_is_shown(tmp_path):
    home = Path.home()
    if not os.access(home, os.W_OK):
        pytest.skip("needs a home of its own")
    name = f"rewriter-sandbox-test-{os.getpid()}"
    shown, hidden = home / f"{name}-shown", home / f"{name}-hidden"
    try:
        for place in (shown, hidden):
            place.mkdir()
            (place / "file").write_text(place.name)
        text = f"cat {shown}/file; ls {hidden}; touch {shown}/new"
        finished = _run(tmp_path, text, shown=(shown,))
        assert finished.tail.startswith(shown.name)
        assert "No such file" in finished.tail and not (shown / "new").exists()
    finally:
        for place in (shown, hidden):
            (place / "file").unlink()
            place.rmdir()


@isolated
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_root_builds_as_nobody_else(tmp_path):
    finished = _run(tmp_path, "id -u; id -g; cat /proc/self/status | grep -E 'CapEff|NoNewPrivs'")
    user, group, *rest = finished.tail.split()
    assert int(user) >= 61184 and user == group
    assert rest == ["CapEff:", "0" * 16, "NoNewPrivs:", "1"]
    assert _run(tmp_path, "echo > /etc/rewriter-test").status != 0
    assert _run(tmp_path, "rm ../output.log").status != 0  # nor put a link in its place


@isolated
def test_nothing_outlives_a_killed_parent(tmp_path):
    script = (
        "import sys; from pathlib import Path; from ir_dataset.extract.sandbox import Sandbox;"
        f"Sandbox(workspace=Path({str(tmp_path)!r})).run(['sh', '-c', {ESCAPING!r}], {PATH!r})"
    )
    parent = subprocess.Popen([sys.executable, "-c", script])
    alive = tmp_path / "tmp/alive"
    deadline = time.monotonic() + 20
    while not alive.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    time.sleep(0.2)
    assert alive.exists() and not _still_writes(alive)


def test_isolation_is_waived_by_name_alone(tmp_path, monkeypatch):
    monkeypatch.setenv(ISOLATION, "perhaps")
    with pytest.raises(ConfigError, match="required, none"):
        _run(tmp_path, "true")
    monkeypatch.setenv(ISOLATION, "required")
    monkeypatch.setattr(module, "_no_namespaces", lambda: "unshare failed: not permitted")
    with pytest.raises(SourceError, match=f"not permitted.*{ISOLATION}=none"):
        _run(tmp_path, "true")
