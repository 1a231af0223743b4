"""Runs a package's build: no root, no network, no home, limited, and nothing left when it ends.

Builds execute foreign code. On Linux the command gets namespaces of its own: without a network, with
nothing of the user's home but what is shown to it, and with a process tree that the kernel kills as one.
The workspace is mounted at one fixed place, so that paths in what compilers write are always the same.
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rewriter.errors import ConfigError, SourceError

__all__ = ["BUILD_ROOT", "ISOLATION", "Finished", "Sandbox"]

BUILD_ROOT = Path("/tmp/rewriter-build")
"""Where every build sees its workspace."""

ISOLATION = "REWRITER_IR_ISOLATION"
"""Environment variable: `required` (default), or `none` to run builds as the caller, with its network."""

_WRITABLE = ("src", "home", "tmp", "drop")
_TAIL = 64 << 10
_FIRST_UID, _NUM_UIDS = 61184, 4336  # systemd's range of users that come and go

_SETUP = r"""
set -e
stage=$1; workspace=$2; user=$3; shift 3
mount -t tmpfs -o mode=755 rewriter "$stage"
mkdir "$stage/workspace"
mount --bind "$workspace" "$stage/workspace"
number=0
while [ "$1" != -- ]; do  # places inside homes that the build may see
    mkdir "$stage/$number"
    mount --bind "$1" "$stage/$number"
    mount -o remount,bind,ro "$stage/$number"
    eval "shown$number=\$1"
    number=$((number + 1)); shift
done
shift
for home in "$HOME_OF_CALLER" /root /home; do
    if [ -d "$home" ] && [ "$home" != / ]; then mount -t tmpfs -o mode=755 rewriter "$home"; fi
done
index=0
while [ $index -lt $number ]; do
    eval "place=\$shown$index"
    mkdir -p "$place"
    mount --bind "$stage/$index" "$place"
    index=$((index + 1))
done
mount --bind "$stage/workspace" "$stage"
unset HOME_OF_CALLER
cd "$stage/src"
set +e
if [ "$user" = caller ]; then
    setpriv --no-new-privs --inh-caps=-all --ambient-caps=-all "$@" &
else
    setpriv --reuid "$user" --regid "$user" --clear-groups --no-new-privs --inh-caps=-all \
        --bounding-set=-all "$@" &
fi
wait $!
"""
"""First process of the namespaces. It stays, as the one whose death takes all others with it."""


@dataclass(frozen=True)
class Finished:
    """How a command ended."""

    status: int
    limit: str
    """`timeout` or `disk` where it was stopped for that, else empty."""
    tail: str
    """The end of what it printed, standard error included."""
    wall_s: float


@dataclass(frozen=True, kw_only=True)
class Sandbox:
    """A workspace, and what a command in it may take.

    Args:
        workspace: its `src`, `home`, `tmp` and `drop` are made; there alone the command may write.
        shown: files and directories under the caller's home that the command needs, read-only.
        wall_s: seconds before everything is killed.
        memory_bytes: address space of each process.
        disk_bytes: growth of the workspace.
    """

    workspace: Path
    shown: tuple[Path, ...] = ()
    wall_s: float = 900.0
    memory_bytes: int = 4 << 30
    disk_bytes: int = 8 << 30

    @property
    def isolated(self) -> bool:
        """Whether commands get namespaces of their own.

        Raises:
            SourceError: the system does not allow it, and the environment does not waive it.
            ConfigError: the environment variable has a value that is not allowed.
        """
        wanted = os.environ.get(ISOLATION, "required")
        if wanted not in ("required", "none"):
            raise ConfigError(ISOLATION, wanted, "required, none")
        if wanted == "none":
            return False
        reason = _no_namespaces()
        if reason:
            raise SourceError(
                f"builds cannot be isolated here ({reason}); {ISOLATION}=none runs them as you,"
                " with your files and network in reach"
            )
        return True

    @property
    def seen_as(self) -> Path:
        """Where the command sees the workspace."""
        return BUILD_ROOT if self.isolated else self.workspace

    def run(
        self, command: Sequence[str], environment: Mapping[str, str], *, network: bool = False
    ) -> Finished:
        """Run in `src` to the end or to a limit; afterwards none of its processes is left.

        Args:
            command: program and arguments.
            environment: on top of a minimal one; `PATH` has to be in it.
            network: leave the network on, for fetching what only foreign code knows how to.
        """
        for folder in _WRITABLE:
            (self.workspace / folder).mkdir(exist_ok=True)
        log = self.workspace / "output.log"
        started = time.monotonic()
        with log.open("wb") as output:
            child = subprocess.Popen(
                self._wrapped(command, network),
                env={**self._environment(), **environment},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=self.workspace / "src",
                start_new_session=True,
            )
            limit = self._wait(child, started)
        with log.open("rb") as stream:
            stream.seek(max(0, log.stat().st_size - _TAIL))
            tail = stream.read().decode("utf-8", "replace")
        return Finished(child.returncode, limit, tail, time.monotonic() - started)

    def _hand_over(self) -> None:
        """What may be written to belongs to the user that builds; the rest can be read, whatever umask."""
        os.chmod(self.workspace, 0o755)
        for top in os.scandir(self.workspace):
            given = top.name in _WRITABLE
            for place in _below(top):
                if given:
                    os.chown(place, self._user, self._user, follow_symlinks=False)
                elif not os.path.islink(place):
                    os.chmod(place, os.stat(place).st_mode | (0o555 if top.is_dir() else 0o444))

    @property
    def _user(self) -> int:
        """A user that is nobody else's, by the workspace."""
        return _FIRST_UID + zlib.crc32(str(self.workspace).encode()) % _NUM_UIDS

    @property
    def _marker(self) -> str:
        """By which processes are found again where no namespace holds them together."""
        return f"REWRITER_IR_BUILD={zlib.crc32(str(self.workspace).encode()):08x}-{os.getpid()}"

    def _environment(self) -> dict[str, str]:
        seen = self.seen_as
        name, _, value = self._marker.partition("=")
        return {
            name: value,
            "HOME": str(seen / "home"),
            "TMPDIR": str(seen / "tmp"),
            "LC_ALL": "C.UTF-8",
            "TZ": "UTC",
            "SOURCE_DATE_EPOCH": "315532800",
            "USER": "builder",
            "LOGNAME": "builder",
            "PYTHONHASHSEED": "0",
            "HOME_OF_CALLER": os.path.expanduser("~"),
        }

    def _wrapped(self, command: Sequence[str], network: bool) -> list[str]:
        limits = ["prlimit", f"--as={self.memory_bytes}", f"--fsize={self.disk_bytes}", "--core=0"]
        limits += ["--nproc=4096", "--nofile=4096"]
        if not self.isolated:
            return ["setpriv", "--pdeathsig", "KILL", *limits, *command]
        BUILD_ROOT.mkdir(exist_ok=True)
        root = os.geteuid() == 0
        if root:
            self._hand_over()
        shown = [str(path) for path in _needing_mounts(self.shown)]
        user = str(self._user) if root else "caller"
        setup = [str(BUILD_ROOT), str(self.workspace), user, *shown, "--", *limits, *command]
        return [*_unshare(network), "sh", "-c", _SETUP, "sandbox", *setup]

    def _wait(self, child: subprocess.Popen[bytes], started: float) -> str:
        """Empty, or the limit that it was killed for."""
        pause = 1.0
        try:
            while True:
                left = self.wall_s - (time.monotonic() - started)
                try:
                    child.wait(max(0.0, min(pause, left)))
                    return ""
                except subprocess.TimeoutExpired:
                    if left <= pause and time.monotonic() - started >= self.wall_s:
                        return "timeout"
                looked = time.monotonic()
                if _used_bytes(self.workspace) > self.disk_bytes:
                    return "disk"
                pause = min(30.0, max(1.0, 20 * (time.monotonic() - looked)))
        finally:
            self._kill(child)

    def _kill(self, child: subprocess.Popen[bytes]) -> None:
        if child.poll() is None:
            child.kill()
        if not self.isolated:
            _kill_marked(self._marker)
        child.wait()


def _unshare(network: bool = False) -> list[str]:
    spaces = ["--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
    if not network:
        spaces.append("--net")
    if os.geteuid():
        spaces += ["--user", "--map-current-user", "--keep-caps"]
    return ["setpriv", "--pdeathsig", "KILL", "unshare", *spaces]


@functools.cache
def _no_namespaces() -> str:
    """Why there are none, or empty."""
    for tool in ("unshare", "setpriv", "prlimit", "mount"):
        if not shutil.which(tool):
            return f"{tool} of util-linux is not installed"
    done = subprocess.run(
        [*_unshare(), "sh", "-c", "mount -t tmpfs rewriter /tmp"],
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stderr.strip().rpartition("\n")[2] if done.returncode else ""


def _needing_mounts(paths: Sequence[Path]) -> list[Path]:
    """Those under a home: everything else is there as it is."""
    homes = {Path.home(), Path("/root"), Path("/home")}
    real = {path for given in paths for path in (given, given.resolve())}
    return sorted(path for path in real if homes & set(path.parents))


def _below(top: os.DirEntry[str]) -> Iterator[str]:
    yield top.path
    if top.is_dir(follow_symlinks=False):
        for folder, folders, names in os.walk(top.path):
            yield from (os.path.join(folder, name) for name in (*folders, *names))


def _used_bytes(place: Path) -> int:
    total, folders = 0, [str(place)]
    while folders:
        try:
            with os.scandir(folders.pop()) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(entry.path)
                    else:
                        total += entry.stat(follow_symlinks=False).st_blocks * 512
        except OSError:
            continue  # it was there a moment ago: builds delete files
    return total


def _kill_marked(marker: str) -> None:
    """Kill whatever has the marker in its environment, until there is nothing."""
    import contextlib
    import signal

    for _ in range(20):
        found = []
        for place in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                dead = (place / "stat").read_text().rpartition(")")[2].split()[0] == "Z"
                if marker.encode() in (place / "environ").read_bytes() and not dead:
                    found.append(int(place.name))
        if not found:
            return
        for process in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        time.sleep(0.05)
