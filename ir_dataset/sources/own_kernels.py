"""This project's own kernels: Triton's LLVM IR, CPU kernels in C++, and what TorchInductor writes.

Triton gives IR only after passes of its own, as text of the LLVM it was built with, which is newer than
the one pinned: `optimized` and `llvm_version` say so. The others are unoptimised bitcode by clang.
"""

from __future__ import annotations

import functools
import importlib.util
import mmap
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import msgspec

from ir_dataset.extract.batch import OUTPUT, Batch, BatchUnit, sandbox_of
from ir_dataset.records import (
    BuildFailure,
    BuildResult,
    Fetched,
    License,
    Package,
    StoredFile,
    TranslationUnit,
    digest,
)
from ir_dataset.sources.inductor_texts import HEADERS, inductor_texts, why_no_inductor
from ir_dataset.sources.kernel_texts import cpp_texts, triton_texts
from ir_dataset.sources.source import BuildLimits, build_result, convert_options, lay_out
from ir_dataset.store import Store
from ir_dataset.toolchain import Toolchain
from rewriter.errors import ConfigError, SourceError

__all__ = ["OwnKernels"]

_PARTS = ("cpp", "inductor", "triton")
_TARGETS = ("cuda:sm_80", "cuda:sm_86", "cuda:sm_89", "cuda:sm_90")
_ISAS = {
    "scalar": (),
    "avx2": ("-mavx2", "-mfma", "-mf16c"),
    "avx512": ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"),
}
_CXX_FLAGS = (
    *("-std=c++17", "-O3", "-fPIC", "-fopenmp", "-ffp-contract=fast", "-fno-math-errno"),
    *("-fno-trapping-math", "-fno-signed-zeros", "-w", "-emit-llvm", "-c"),
    *("-Xclang", "-disable-llvm-passes", "-idirafter", "openmp"),
)
_OPENMP = """\
#pragma once
#ifdef __cplusplus
extern "C" {
#endif
int omp_get_thread_num(void);
int omp_get_num_threads(void);
int omp_get_max_threads(void);
int omp_in_parallel(void);
void omp_set_num_threads(int);
double omp_get_wtime(void);
#ifdef __cplusplus
}
#endif
"""
"""Of OpenMP's interface, for a clang that comes without its runtime; stands after all other headers."""

_DIRECTORY = re.compile(r'(!DIFile\(filename: "[^"]*", directory: )"[^"]*"')


class _Options(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    parts: tuple[str, ...] = _PARTS
    targets: tuple[str, ...] = ("cuda:sm_80", "cuda:sm_90")
    isas: tuple[str, ...] = ("scalar", "avx2", "avx512")
    per_operator: int = 12


class OwnKernels:
    """Options, all with defaults.

    `parts` (all): of `cpp`, `inductor`, `triton`; one without its tools is left out, with a word in the
    log. `targets` (`cuda:sm_80`, `cuda:sm_90`): of Triton. `isas` (`scalar`, `avx2`, `avx512`): of C++.
    `per_operator` (12): configurations of each kernel.
    """

    name: ClassVar[str] = "own-kernels"
    version: ClassVar[str] = "1"
    languages: ClassVar[tuple[str, ...]] = ("c++", "triton")

    def missing(self, toolchain: Toolchain) -> str | None:
        """None where at least one part can be built."""
        reasons = [_why_not(part, toolchain) for part in _PARTS]
        return None if None in reasons else "; ".join(filter(None, reasons))

    def discover(self, options: Mapping[str, Any]) -> Sequence[Package]:
        """One package for each part, its version with a hash of what they come from.

        Raises:
            ConfigError: an option is unknown, of a wrong type or value.
        """
        wanted = _options(options)
        toolchain = Toolchain.find()
        packages = []
        for part in sorted(set(wanted.parts)):
            if _why_not(part, toolchain) is not None:
                continue
            packages.append(
                Package(
                    source=self.name,
                    name=f"rewriter-{part}",
                    version=_version(part),
                    language="triton" if part == "triton" else "c++",
                    project="rewriter",
                    options={
                        "part": part,
                        "per_operator": wanted.per_operator,
                        "variants": list(wanted.targets if part == "triton" else wanted.isas),
                    },
                )
            )
        return packages

    def fetch(self, package: Package, store: Store, workspace: Path) -> Fetched:
        """Generate the texts; the network is not used."""
        count = package.options["per_operator"]
        part = package.options["part"]
        if part == "triton":
            texts = triton_texts(count)
        elif part == "cpp":
            texts = cpp_texts(count)
        else:
            texts = inductor_texts(workspace)
        files = tuple(_stored(store, name, text) for name, text in sorted(texts.items()))
        notice = Path(__file__).parents[2] / "LICENSE"
        found = (store.put_file(notice, "LICENSE"),) if notice.is_file() else ()
        license_ = License(
            kind="spdx", expression="Apache-2.0", origin="pyproject.toml", files=found
        )
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
        """Compile each text for each variant."""
        if fetched.package.options["part"] == "triton":
            return _build_triton(fetched, store)
        return _build_cpp(fetched, store, workspace, toolchain, limits)


def _options(options: Mapping[str, Any]) -> _Options:
    wanted = convert_options(options, _Options, "parts, targets, isas, per_operator")
    for field, values, allowed in (
        ("parts", wanted.parts, _PARTS),
        ("targets", wanted.targets, _TARGETS),
        ("isas", wanted.isas, tuple(_ISAS)),
    ):
        for value in values:
            if value not in allowed:
                raise ConfigError(f"source.{field}", value, f"of {', '.join(allowed)}")
    if wanted.per_operator < 1:
        raise ConfigError("source.per_operator", wanted.per_operator, "at least 1")
    return wanted


def _why_not(part: str, toolchain: Toolchain) -> str | None:
    if part == "triton":
        found = importlib.util.find_spec("triton")
        return None if found else "triton is not installed: pip install 'rewriter[gpu]'"
    compiler = toolchain.c_compiler()
    if compiler is None or compiler.kind != "clang":
        return "no clang of the pinned LLVM: apt-get install clang-22"
    return why_no_inductor() if part == "inductor" else None


def _version(part: str) -> str:
    """With what writes the IR, and a hash of what the texts are generated from."""
    from importlib.metadata import version

    folders = {"cpp": "codegen/cpp_kernels", "triton": "codegen/triton_kernels"}
    if part == "inductor":
        places = [Path(__file__).with_name("inductor_texts.py")]
    else:
        here = Path(__file__).with_name("kernel_texts.py")
        folder = Path(__file__).parents[2] / folders[part]
        places = [here, *sorted(one for one in folder.iterdir() if one.is_file())]
    texts = digest([one.read_text(encoding="utf-8") for one in places])[:12]
    made_by = {"triton": "triton", "inductor": "torch"}.get(part)
    tool = f".{made_by}-{version(made_by)}" if made_by else ""
    return f"{version('rewriter')}+{texts}{tool}"


def _stored(store: Store, name: str, text: str) -> StoredFile:
    data = text.encode()
    return StoredFile(name=name, sha256=store.put(data), size=len(data))


def _build_triton(fetched: Fetched, store: Store) -> BuildResult:
    """Operator by operator, so that one that does not compile leaves the others."""
    from importlib.metadata import version

    from codegen.compile import KernelCompileError, compile_texts

    llvm = triton_llvm()
    units, failures = [], []
    for target in fetched.package.options["variants"]:
        for group in _by_operator(fetched.files):
            texts = {Path(one.name).stem: store.get(one.sha256).decode() for one in group}
            hashes = {Path(one.name).stem: one for one in group}
            try:
                compiled = compile_texts(texts, target)
            except KernelCompileError as error:
                reason = str(error)[-1500:]
                failures += [
                    BuildFailure(kind="compile", reason=reason, source_path=one.name)
                    for one in group
                ]
                continue
            for name, result in compiled.items():
                text = _DIRECTORY.sub(r'\1"."', result.llir).encode()
                units.append(
                    TranslationUnit(
                        module=store.put(text),
                        size=len(text),
                        language="triton",
                        source_path=hashes[name].name,
                        source_sha256=hashes[name].sha256,
                        compiler=f"triton {version('triton')}",
                        llvm_version=llvm,
                        arguments=("--target", target),
                        build_system="triton",
                        opt_level_requested="-O3",
                        optimized=True,
                    )
                )
    if not units:
        raise SourceError(f"rewriter-triton: nothing compiled: {failures[0].reason}")
    return build_result(fetched, units, failures)


def _by_operator(files: Sequence[StoredFile]) -> list[list[StoredFile]]:
    groups: dict[str, list[StoredFile]] = {}
    for file in files:
        groups.setdefault(file.name.rpartition("_")[0], []).append(file)
    return [groups[name] for name in sorted(groups)]


@functools.cache
def triton_llvm() -> str:
    """LLVM's version, as it stands in Triton's library; its Python interface does not tell."""
    place = importlib.util.find_spec("triton")
    library = Path(place.origin or "").parent / "_C" / "libtriton.so" if place else Path()
    if not library.is_file():
        return ""
    with (
        library.open("rb") as stream,
        mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data,
    ):
        found = re.search(rb"\b(\d\d\.\d\.\d)git\b", data)
        return f"{found[1].decode()}git" if found else ""


def _build_cpp(
    fetched: Fetched, store: Store, workspace: Path, toolchain: Toolchain, limits: BuildLimits
) -> BuildResult:
    compiler = toolchain.need_c_compiler()
    tree = workspace / "src"
    (tree / "openmp").mkdir(parents=True)
    (tree / "openmp" / "omp.h").write_text(_OPENMP)
    lay_out(fetched.files, store, tree)
    inductor = fetched.package.options["part"] == "inductor"
    include, shown = (), ()
    if inductor:
        shown = HEADERS.directories()
        include = tuple(part for place in shown for part in ("-isystem", str(place)))
    units = []
    for file in fetched.files:
        for isa in fetched.package.options["variants"]:
            if inductor and isa == "scalar":
                continue  # it was written for vectors
            flags = (*_CXX_FLAGS, *_ISAS[isa], *(HEADERS.flags(isa) if inductor else ()))
            unit = TranslationUnit(
                module="",
                size=0,
                language="c++",
                source_path=file.name,
                source_sha256=file.sha256,
                compiler=compiler.label,
                llvm_version=compiler.llvm_version,
                arguments=flags,
                build_system="torch.compile" if inductor else "rewriter",
                opt_level_requested="-O3",
            )
            command = (*compiler.cxx, *flags, *include, "-o", OUTPUT, file.name)
            units.append(BatchUnit(unit=unit, attempts=(command,)))
    places = (Path(compiler.c[0]).resolve().parent, *shown)
    sandbox = sandbox_of(workspace, limits, *places)
    return Batch(units=units, environment={}).run(fetched, store, sandbox, limits)
