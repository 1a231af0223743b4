"""apt with an index of its own: source packages, although the machine's configuration has none.

The machine's Debian and Ubuntu archives are used, with `deb-src` added, from a private directory;
nothing under /etc changes. Packages that builds need are installed on the machine when run as root.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from rewriter.errors import SourceError

__all__ = ["PROFILES", "Apt", "cache_directory"]

CACHE = "REWRITER_CACHE"
"""Environment variable: where downloads that are not results are kept; default ~/.cache/rewriter."""

PROFILES = "nocheck nodoc nobiarch"
"""Build profiles: no tests, no documentation, one architecture."""

_DAY = 86_400.0

_CONFIGURATION = """\
Dir::State::lists "{place}/lists";
Dir::Cache "{place}/cache";
Dir::Etc::sourcelist "{place}/sources.list";
Dir::Etc::sourceparts "-";
APT::Sandbox::User "root";
Acquire::Languages "none";
Acquire::Retries "3";
DPkg::Lock::Timeout "900";
APT::Build-Profiles {{ {profiles} }};
"""


def cache_directory() -> Path:
    """The directory for downloads, made where it is not there."""
    place = Path(os.environ.get(CACHE) or "~/.cache/rewriter").expanduser()
    place.mkdir(parents=True, exist_ok=True)
    return place


class Apt:
    """A private index, refreshed once a day.

    Raises:
        SourceError: there is no apt here, no archive is configured, or the index cannot be had.
    """

    def __init__(self) -> None:
        if not shutil.which("apt-get"):
            raise SourceError(
                "apt-get is not on this machine: Debian's sources need a Debian or Ubuntu"
            )
        self.place = cache_directory() / "apt"
        for folder in ("lists/partial", "cache/archives/partial"):
            (self.place / folder).mkdir(parents=True, exist_ok=True)
        self._environment = {
            **os.environ,
            "APT_CONFIG": str(self.place / "apt.conf"),
            "DEBIAN_FRONTEND": "noninteractive",
            "LC_ALL": "C.UTF-8",
        }
        with self._locked():
            self._refresh()

    def showsrc(self, names: Sequence[str]) -> str:
        """Stanzas of the source packages, all versions; names that are unknown are left out."""
        return self._run(["apt-cache", "showsrc", "--only-source", *names], allowed=(0, 100))

    def download_source(self, name: str, version: str, into: Path) -> None:
        """The .dsc and what it lists, checked against the signed index.

        Raises:
            SourceError: it is not there any more.
        """
        self._run(["apt-get", "source", "--download-only", "-qq", f"{name}={version}"], cwd=into)

    def show(self, names: Sequence[str]) -> str:
        """Stanzas of the binary packages, the candidate version of each; unknown ones are left out."""
        return self._run(["apt-cache", "show", "--no-all-versions", *names], allowed=(0, 100))

    def closure(self, names: Sequence[str]) -> dict[str, str]:
        """Versions of these binary packages and of all they depend on, as if none were installed.

        Raises:
            SourceError: they cannot be installed together.
        """
        nothing = ["-o", "Dir::State::status=/dev/null", "--no-install-recommends"]
        planned = self._run(["apt-get", "--dry-run", "-qq", *nothing, "install", *names])
        found = re.findall(r"^Inst (\S+) \((\S+) ", planned, re.MULTILINE)
        return dict(sorted(found))

    def download(self, packages: Mapping[str, str], into: Path) -> None:
        """The .deb of each version, checked against the signed index."""
        wanted = [f"{name}={version}" for name, version in packages.items()]
        self._run(["apt-get", "download", "-qq", *wanted], cwd=into)

    def install_build_dependencies(self, dsc: Path) -> None:
        """What building a source package needs; removes nothing that is installed.

        Raises:
            SourceError: it cannot be installed, or is absent and this is not root.
        """
        arguments = ["build-dep", "--arch-only", str(dsc)]
        self.install(arguments, of=dsc.name)

    def install(self, arguments: Sequence[str], *, of: str) -> None:
        """Run `apt-get` with `install PACKAGES` or `build-dep DSC`, unless there is nothing to do."""
        options = ["-y", "-qq", "--no-install-recommends", "--no-remove"]
        with self._locked():
            planned = self._run(["apt-get", "--dry-run", *options, *arguments])
            wanted = sorted(
                {line.split()[1] for line in planned.splitlines() if line.startswith("Inst ")}
            )
            if not wanted:
                return
            if os.geteuid():
                raise SourceError(
                    f"{of} needs packages that root has to install:"
                    f" apt-get install {' '.join(wanted)}"
                )
            self._run(["apt-get", *options, *arguments])
            self._run(["apt-get", "clean"])

    def _refresh(self) -> None:
        stamp = self.place / "refreshed"
        if stamp.exists() and time.time() - stamp.stat().st_mtime < _DAY:
            return
        lines = _archives()
        if not lines:
            raise SourceError("no Debian or Ubuntu archive is configured in /etc/apt")
        (self.place / "sources.list").write_text("\n".join(lines) + "\n")
        profiles = " ".join(f'"{name}";' for name in PROFILES.split())
        text = _CONFIGURATION.format(place=self.place, profiles=profiles)
        (self.place / "apt.conf").write_text(text)
        self._run(["apt-get", "update", "-qq"])
        stamp.touch()

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with (self.place / "lock").open("w") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield

    def _run(
        self, command: list[str], *, cwd: Path | None = None, allowed: tuple[int, ...] = (0,)
    ) -> str:
        done = subprocess.run(
            command, cwd=cwd, env=self._environment, capture_output=True, text=True, check=False
        )
        if done.returncode not in allowed:
            tail = (done.stderr or done.stdout).strip()[-1500:]
            raise SourceError(f"{' '.join(command)} failed: {tail}")
        return done.stdout


@functools.cache
def _archives() -> tuple[str, ...]:
    """`deb` and `deb-src` lines of the machine's distribution, without third parties'."""
    found: list[str] = []
    places = [Path("/etc/apt/sources.list"), *sorted(Path("/etc/apt/sources.list.d").glob("*"))]
    for place in places:
        if place.suffix == ".sources":
            found += _deb822(place)
        elif place.suffix == ".list" and place.is_file():
            found += _one_line(place)
    return tuple(dict.fromkeys(found))


def _is_distribution(uri: str) -> bool:
    return any(name in uri.rpartition("://")[2].partition("/")[2] for name in ("debian", "ubuntu"))


def _deb822(place: Path) -> Iterator[str]:
    from debian.deb822 import Deb822

    with place.open(encoding="utf-8") as stream:
        for stanza in Deb822.iter_paragraphs(stream):
            key = stanza.get("Signed-By", "")
            options = f"[signed-by={key}] " if key.startswith("/") else ""
            for uri in filter(_is_distribution, stanza.get("URIs", "").split()):
                for suite in stanza.get("Suites", "").split():
                    rest = f"{options}{uri} {suite} {stanza.get('Components', '')}"
                    yield from (f"deb {rest}", f"deb-src {rest}")


def _one_line(place: Path) -> Iterator[str]:
    for line in place.read_text(encoding="utf-8").splitlines():
        kind, _, rest = line.partition(" ")
        if kind == "deb" and any(map(_is_distribution, rest.split())):
            yield from (line, f"deb-src {rest}")
