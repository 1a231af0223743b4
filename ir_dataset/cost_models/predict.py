"""Sizes of the functions of one module, told by stored models: from IR, or from C that clang makes IR of.

The models learned from IR as front ends write it for optimisation. What was optimised before, or written
at -O0 (whose functions are marked `optnone`), is outside of what they know.
"""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ir_dataset.cost_models import stored
from ir_dataset.cost_models.size import KINDS, SizeAnswer, SizeModel
from ir_dataset.executor import LocalExecutor, Outcome, Work
from ir_dataset.extract.hook import unoptimised
from ir_dataset.features import FEATURES, ModuleFeatures
from ir_dataset.records import decode, encode
from ir_dataset.stages import STAGES, ModuleInput
from ir_dataset.store import Store
from ir_dataset.toolchain import Toolchain
from rewriter.errors import ArtifactError, ConfigError, SourceError

__all__ = ["ModuleSizes", "load_size_models", "predict_sizes"]

_C = (".c",)
_CXX = (".cc", ".cpp", ".cxx")
_IR = (".ll", ".bc")
_ALLOWED = f"a file that ends in one of {', '.join((*_IR, *_C, *_CXX))}"
_SECONDS = 300.0


@dataclass(frozen=True)
class ModuleSizes:
    """Names of a module's functions, and what each model says of all of them, in that order."""

    names: tuple[str, ...]
    answers: Mapping[str, SizeAnswer]
    """By level, `Oz` and `O2`."""


def load_size_models(directory: Path | None = None) -> dict[str, SizeModel]:
    """The models by level that ship with the package, or those in a directory that training wrote.

    Raises:
        ConfigError: the directory has none.
        ArtifactError: one is damaged, of another version, or learned from other features than today's.
    """
    if directory is None:
        places = {kind: stored.shipped(f"size_{kind.lower()}") for kind in KINDS}
    else:
        every = {kind: directory / f"size_{kind.lower()}.json.gz" for kind in KINDS}
        places = {kind: path for kind, path in every.items() if path.is_file()}
    if not places:
        raise ConfigError("models", str(directory), "a directory with size_oz or size_o2.json.gz")
    return {kind: _load(path) for kind, path in places.items()}


def _load(path: Path) -> SizeModel:
    try:
        model = SizeModel.load(path)
    except (KeyError, TypeError) as error:
        told = f"{path} was written by another version ({error}): train it again"
        raise ArtifactError(told) from error
    if model.names != FEATURES:
        raise ArtifactError(f"{path} learned from other features: train it again")
    return model


def predict_sizes(path: Path, models: Mapping[str, SizeModel]) -> ModuleSizes:
    """Bytes of machine code of each function that a module defines.

    The file is read in a process of its own, since LLVM ends the process on some damaged input.

    Raises:
        ConfigError: there is no such file, or its ending is not known.
        SourceError: it is C or C++ and does not compile, or there is no compiler.
        ArtifactError: it is no module, or defines no function.
    """
    if not path.is_file() or path.suffix not in (*_IR, *_C, *_CXX):
        raise ConfigError("module", str(path), _ALLOWED)
    data = path.read_bytes() if path.suffix in _IR else _compile(path)
    features = _features(path, data)
    if not features.names:
        raise ArtifactError(f"{path} defines no function")
    table = features.matrix()
    answers = {kind: model.predict(table) for kind, model in models.items()}
    return ModuleSizes(features.names, answers)


def _features(path: Path, data: bytes) -> ModuleFeatures:
    with tempfile.TemporaryDirectory(prefix="rewriter-") as place:
        store = Store(Path(place))
        asked = ModuleInput(module=store.put(data), writer_llvm="", allow_newer=True)
        ended: list[Outcome] = []
        work = Work(STAGES["featurise"].perform, store.root, [encode(asked)], _SECONDS)
        LocalExecutor(1).run(work, lambda _, outcome: ended.append(outcome))
        (outcome,) = ended
        if outcome.error_kind:
            told = outcome.error.rpartition("cannot be read: ")[2]
            raise ArtifactError(f"{path} cannot be read: {told}")
        found = decode(store.get(outcome.output), ModuleFeatures)
        store.close()
        return found


def _compile(path: Path) -> bytes:
    """Unoptimised bitcode, as for -O2 before LLVM's first pass."""
    compiler = Toolchain.find().need_c_compiler()
    with tempfile.TemporaryDirectory(prefix="rewriter-") as place:
        target = Path(place) / "module.bc"
        command = [*unoptimised(compiler, cxx=path.suffix in _CXX), str(path), "-o", str(target)]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=_SECONDS, check=False
            )
        except subprocess.TimeoutExpired as error:
            raise SourceError(f"{path} is not compiled after {_SECONDS:g} s") from error
        if done.returncode or not target.is_file():
            raise SourceError(f"{path} does not compile: {done.stderr.strip()[-1000:]}")
        return target.read_bytes()
