"""Rust crates as Debian packs them: each built as the one dependency of an empty crate.

Built directly, half of all crates want development dependencies that Debian leaves out. Every crate of
the build is compiled to unoptimised bitcode, since a flag for one alone would compile others twice; only
the package's own is kept, as each of the others may be a package of its own. The release profile is
used, so rustc's own inlining has run; LLVM's passes have not.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import tarfile
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

import msgspec

from ir_dataset.extract.build import why
from ir_dataset.extract.sandbox import Sandbox
from ir_dataset.records import (
    BuildFailure,
    BuildResult,
    Fetched,
    License,
    Package,
    TranslationUnit,
)
from ir_dataset.sources.apt import Apt
from ir_dataset.sources.source import BuildLimits, build_result, convert_options, lay_out
from ir_dataset.store import Store
from ir_dataset.toolchain import Toolchain
from rewriter.errors import ConfigError, SourceError

__all__ = ["DebianCrates"]

_NAME = re.compile(r"[a-z0-9][a-z0-9.-]*")
_REGISTRY = "usr/share/cargo/registry"
_PLATFORMS = ("winapi", "windows", "core-foundation", "security-framework", "rustc-std-workspace")
"""Crates of other systems, and ones with nothing in them: no packages of their own."""
_RUSTFLAGS = ("--emit=llvm-bc,link", "-Cno-prepopulate-passes", "--cap-lints=allow")
_TIME = re.compile(r" in (?:\d+m )?[\d.]+s$", re.MULTILINE)
"""How long the build took, which is another each time."""
_PATH = {"PATH": "/usr/local/bin:/usr/bin:/bin"}

_MANIFEST = """\
[package]
name = "rewriter-shim"
version = "0.0.0"
edition = "2021"
[dependencies]
"{crate}" = {{ version = "={version}", features = [{features}] }}
[profile.release]
codegen-units = 1
"""

_CONFIGURATION = f"""\
[source.crates-io]
replace-with = "debian"
[source.debian]
directory = "{_REGISTRY}"
[net]
offline = true
[term]
color = "never"
"""


class _Options(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    packages: tuple[str, ...]
    dependencies: bool = False
    features: dict[str, tuple[str, ...]] = {}


class DebianCrates:
    """`packages`: crates by Debian's name, `serde-json` for librust-serde-json-dev.

    `dependencies` (false): also every crate that they depend on, as packages of their own.
    `features.CRATE`: further features to build with, which have to be installable.
    """

    name: ClassVar[str] = "debian-crates"
    version: ClassVar[str] = "1"
    languages: ClassVar[tuple[str, ...]] = ("rust",)

    def missing(self, toolchain: Toolchain) -> str | None:
        """Needs apt, and cargo and rustc of the pinned LLVM."""
        for tool, package in (("apt-get", "apt"), ("dpkg-deb", "dpkg")):
            if not shutil.which(tool):
                return f"{tool} is not installed: apt-get install {package} (Debian or Ubuntu only)"
        return toolchain.why_absent("cargo") or toolchain.why_not("rustc")

    def discover(self, options: Mapping[str, Any]) -> Sequence[Package]:
        """The crates in the versions of the archive's index.

        Raises:
            ConfigError: an option is unknown or of a wrong type, or the archive has no such crate.
        """
        wanted = _options(options)
        apt = Apt()
        names = {_package(crate) for crate in wanted.packages}
        if wanted.dependencies:
            names |= {name for name in apt.closure(sorted(names)) if _is_crate(name)}
        found = _stanzas(apt.show(sorted(names)))
        packages = []
        for name in sorted(names):
            crate = _crate(name)
            if name not in found:
                raise ConfigError("source.packages", crate, "crates that the archives have")
            packages.append(
                Package(
                    source=self.name,
                    name=crate,
                    version=found[name]["Version"],
                    language="rust",
                    project=crate,
                    options={"features": list(wanted.features.get(crate, ()))},
                )
            )
        return packages

    def fetch(self, package: Package, store: Store, workspace: Path) -> Fetched:
        """The crate and all it depends on; the licence is what Cargo.toml states.

        The project is the repository that Cargo.toml names, since families share one.
        """
        apt = Apt()
        debian = _package(package.name)
        closure = _closure(apt, package)
        apt.download(
            {name: version for name, version in closure.items() if name.startswith("librust-")},
            workspace,
        )
        archives = sorted(workspace.glob("*.deb"))
        own = next(path for path in archives if path.name.startswith(f"{debian}_"))
        manifest, texts = _read_crate(own)
        about = manifest["package"]
        repository = str(about.get("repository") or about.get("homepage") or "")
        package = msgspec.structs.replace(
            package,
            project=_family(repository) or package.name,
            url=repository,
            options={
                **package.options,
                "crate": about["name"],
                "crate_version": str(about["version"]),
            },
        )
        expression = _spdx(str(about.get("license", "")))
        license_ = License(
            kind="spdx" if expression else "none",
            expression=expression,
            origin="Cargo.toml" if expression else "",
            files=tuple(store.put_file(path, path.name) for path in texts),
        )
        files = tuple(store.put_file(path) for path in archives)
        return Fetched(package=package, files=files, license=license_)

    def build(
        self,
        fetched: Fetched,
        store: Store,
        workspace: Path,
        *,
        toolchain: Toolchain,
        limits: BuildLimits,
    ) -> BuildResult:
        """`cargo build --release` of the empty crate, without a network."""
        sysroot = _sysroot(toolchain.need("rustc"))
        sandbox = Sandbox(
            workspace=workspace,
            shown=(sysroot,),
            wall_s=limits.wall_s,
            memory_bytes=limits.memory_bytes,
            disk_bytes=limits.disk_bytes,
        )
        _lay_out(fetched, store, workspace, sandbox)
        seen = sandbox.seen_as / "src" / _REGISTRY
        flags = [*_RUSTFLAGS, f"--remap-path-prefix={seen}=."]
        environment = {
            "PATH": f"{sysroot / 'bin'}:{_PATH['PATH']}",
            "CARGO_HOME": str(sandbox.seen_as / "home" / "cargo"),
            "CARGO_ENCODED_RUSTFLAGS": "\x1f".join(flags),
            "CARGO_INCREMENTAL": "0",
        }
        command = ["cargo", "build", "--release", "--offline", "-v", "-j", str(limits.jobs)]
        finished = sandbox.run(
            [*command, "--manifest-path", "shim/Cargo.toml", "--config", "shim/config.toml"],
            environment,
        )
        commands = _commands(workspace / "output.log")
        version = toolchain.llvm_version("rustc")
        release = _release(sysroot)
        units = list(_units(fetched.package, workspace, commands, store, release, version))
        if not units:
            raise SourceError(f"{fetched.package.name}: {why(finished)}: {finished.tail[-1500:]}")
        complete = finished.status == 0 and not finished.limit
        stopped = BuildFailure(kind=finished.limit or "build", reason=why(finished))
        log = store.put(_TIME.sub("", finished.tail).encode())
        failures = () if complete else (stopped,)
        return build_result(fetched, units, failures, complete=complete, log=log)


def _options(options: Mapping[str, Any]) -> _Options:
    wanted = convert_options(options, _Options, "packages = [names], dependencies, features")
    for name in wanted.packages:
        if not _NAME.fullmatch(name):
            raise ConfigError("source.packages", name, "crates by Debian's name: `-` for `_`")
    unknown = sorted(set(wanted.features) - set(wanted.packages))
    if unknown:
        raise ConfigError("source.features", unknown, "names that `packages` has too")
    return wanted


def _package(crate: str) -> str:
    return f"librust-{crate}-dev"


def _crate(package: str) -> str:
    return package.removeprefix("librust-").removesuffix("-dev")


def _is_crate(package: str) -> bool:
    """Whether a package holds a crate; names with `+` stand for features of one."""
    crate = _crate(package)
    return package == _package(crate) and "+" not in crate and not crate.startswith(_PLATFORMS)


def _stanzas(text: str) -> dict[str, Mapping[str, str]]:
    from debian.deb822 import Packages

    stanzas = Packages.iter_paragraphs(text.splitlines(), use_apt_pkg=False)
    return {stanza["Package"]: stanza for stanza in stanzas}


def _closure(apt: Apt, package: Package) -> dict[str, str]:
    """With what its default features need, which Debian packs apart, and the features asked for."""
    exact = f"{_package(package.name)}={package.version}"
    features = [_package(f"{package.name}+{one}") for one in package.options["features"]]
    try:
        return apt.closure([exact, _package(f"{package.name}+default"), *features])
    except SourceError:
        return apt.closure([exact, *features])  # it has none, or they are part of it


def _read_crate(archive: Path) -> tuple[dict[str, Any], list[Path]]:
    """The crate's Cargo.toml, and its licence texts, written beside the archive."""
    place = archive.with_suffix("")
    place.mkdir()
    packed = place / "data.tar"
    with packed.open("wb") as stream:
        subprocess.run(["dpkg-deb", "--fsys-tarfile", str(archive)], stdout=stream, check=True)
    manifest, texts = None, []
    with tarfile.open(packed) as tar:
        for member in tar:
            found = re.fullmatch(rf"\./{_REGISTRY}/[^/]+/([^/]+)", member.name)
            stream = tar.extractfile(member) if found and member.isfile() else None
            if not found or stream is None:
                continue
            if found[1] == "Cargo.toml":
                manifest = tomllib.loads(stream.read().decode("utf-8"))
            elif re.match(r"(LICEN[CS]E|COPYING|COPYRIGHT|UNLICENSE)", found[1], re.IGNORECASE):
                texts.append(place / found[1])
                texts[-1].write_bytes(stream.read())
    if manifest is None:
        raise SourceError(f"{archive.name} holds no Cargo.toml")
    return manifest, sorted(texts)


def _spdx(text: str) -> str:
    """Older manifests put a slash where SPDX has OR."""
    return re.sub(r"\s*/\s*", " OR ", text.strip())


def _family(repository: str) -> str:
    """`serde` of https://github.com/serde-rs/serde, or of a directory in it."""
    found = re.match(r"https?://[^/]+/[^/]+/([^/#?]+)", repository)
    return found[1].removesuffix(".git").lower() if found else ""


def _sysroot(rustc: Path) -> Path:
    """Of the compiler itself, which rustup's command of the same name only starts."""
    done = subprocess.run(
        [str(rustc), "--print", "sysroot"], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SourceError(f"{rustc} --print sysroot: {done.stderr.strip()[-300:]}")
    return Path(done.stdout.strip())


def _release(sysroot: Path) -> str:
    command = [str(sysroot / "bin" / "rustc"), "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout.split()[1]


def _lay_out(fetched: Fetched, store: Store, workspace: Path, sandbox: Sandbox) -> None:
    """Unpack the packages into `src`, and write the empty crate."""
    lay_out(fetched.files, store, workspace / "packed")
    loop = 'for one in ../packed/*.deb; do dpkg-deb -x "$one" . || exit 1; done'
    finished = sandbox.run(["sh", "-c", loop], _PATH)
    if finished.status or finished.limit:
        raise SourceError(f"{fetched.package.name} cannot be unpacked: {finished.tail[-500:]}")
    shim = workspace / "src" / "shim"
    (shim / "src").mkdir(parents=True)
    (shim / "src" / "lib.rs").write_text("")
    options = fetched.package.options
    manifest = _MANIFEST.format(
        crate=options["crate"],
        version=options["crate_version"],
        features=", ".join(f'"{feature}"' for feature in options["features"]),
    )
    (shim / "Cargo.toml").write_text(manifest)
    (shim / "config.toml").write_text(_CONFIGURATION)


def _commands(log: Path) -> dict[str, tuple[str, ...]]:
    """Arguments of each rustc that cargo ran, by the suffix of the files it wrote."""
    found = {}
    for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
        ran = re.match(r"\s+Running `(.*)`$", line)
        suffix = re.search(r"extra-filename=(-[0-9a-f]+)", line)
        if ran and suffix:
            words = shlex.split(ran[1])
            start = next((i for i, word in enumerate(words) if word == "--crate-name"), 0)
            found[suffix[1]] = tuple(_without_places(words[start:]))
    return found


def _without_places(words: Sequence[str]) -> Iterator[str]:
    """Less input, output, and what only says where things lie."""
    skip = False
    for index, word in enumerate(words):
        following = words[index + 1] if index + 1 < len(words) else ""
        if skip:
            skip = False
        elif word in ("--out-dir", "-L", "--extern") or (
            word == "-C" and following.startswith(("metadata=", "extra-filename=", "incremental="))
        ):
            skip = True
        elif not word.endswith(".rs") and not word.startswith(
            ("--remap-path-prefix", "--diagnostic")
        ):
            yield word


def _units(
    package: Package,
    workspace: Path,
    commands: Mapping[str, tuple[str, ...]],
    store: Store,
    release: str,
    version: str,
) -> Iterator[TranslationUnit]:
    """Modules made from the package's own files: the library, and the program that configures it."""
    target = workspace / "src" / "shim" / "target" / "release"
    registry = workspace / "src" / _REGISTRY
    crate = f"{package.options['crate']}-{package.options['crate_version']}"
    tree = next(
        (path for path in (registry / crate, registry / package.options["crate"]) if path.is_dir()),
        registry / crate,
    )
    for module in sorted([*target.glob("deps/*.bc"), *target.glob("build/*/*.bc")]):
        listed = module.with_suffix(".d")
        if module.is_symlink() or listed.is_symlink() or not listed.is_file():
            continue
        sources = _sources(listed, tree.name)
        if not sources or not (tree / sources[0]).is_file():
            continue
        stored = store.put_file(module)
        arguments = commands.get(module.stem[module.stem.rindex("-") :], ())
        yield TranslationUnit(
            module=stored.sha256,
            size=stored.size,
            language="rust",
            source_path=sources[0],
            source_sha256=store.put_file(tree / sources[0]).sha256,
            compiler=f"rustc {release}",
            llvm_version=version,
            arguments=arguments,
            build_system="cargo",
            opt_level_requested=next(
                (f"-O{word[10:]}" for word in arguments if word.startswith("opt-level=")), ""
            ),
            includes=tuple(sorted(sources[1:])),
        )


def _sources(listed: Path, tree: str) -> list[str]:
    """Files of the crate that a module was made from, its root first; empty for other crates' modules."""
    line = listed.read_text(encoding="utf-8", errors="replace").partition("\n")[0]
    _, _, rest = line.partition(": ")
    paths = [part.replace("\\ ", " ") for part in re.split(r"(?<!\\) ", rest.strip()) if part]
    found = []
    for path in paths:
        parts = PurePosixPath(path).parts
        if tree in parts:
            found.append("/".join(parts[parts.index(tree) + 1 :]))
    return found if paths and tree in PurePosixPath(paths[0]).parts else []
