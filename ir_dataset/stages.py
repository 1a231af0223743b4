"""The stages that work on one input at a time: names, versions, what they take and give.

A stage's key is its name, its version and its input; raise the version when the same input gives
something else, and only what follows from it runs again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ir_dataset import embedding, tokens
from ir_dataset.features import ModuleFeatures, featurise
from ir_dataset.ir_text import parse_module
from ir_dataset.labels import ModuleLabels, label_module
from ir_dataset.license import UnitLicense, decide
from ir_dataset.reader import read_module
from ir_dataset.records import (
    BuildResult,
    Fetched,
    Package,
    Record,
    decode,
    digest,
    encode,
)
from ir_dataset.sources import find_source
from ir_dataset.sources.source import BuildLimits
from ir_dataset.store import Store
from ir_dataset.toolchain import Toolchain
from ir_dataset.verify import ModuleSummary, verify_module

__all__ = [
    "STAGES",
    "BuildInput",
    "DiscoverInput",
    "EncodeInput",
    "Encoding",
    "FetchInput",
    "LabelInput",
    "LicenseInput",
    "ModuleInput",
    "Packages",
    "Stage",
    "UnitLicenses",
    "Vocabularies",
    "VocabularyInput",
]


@dataclass(frozen=True)
class Stage:
    """One stage: `function(store, input) -> output`."""

    version: str
    function: Callable[[Store, Any], Any]
    input: type[Any]
    output: Any
    timeout_s: float
    """Wall time of one task; stages with limits of their own end before this."""

    def perform(self, store: Store, payload: bytes) -> str:
        """Run on an encoded input; returns the hash of the stored output."""
        return store.put(encode(self.function(store, decode(payload, self.input))))


class DiscoverInput(Record, frozen=True):
    """A `[[source]]` table."""

    kind: str
    options: dict[str, Any]
    version: str
    """Of the plug-in."""


class Packages(Record, frozen=True):
    """What a source has, sorted by name."""

    packages: tuple[Package, ...]


class FetchInput(Record, frozen=True):
    """A package to fetch."""

    package: Package
    version: str


class BuildInput(Record, frozen=True):
    """A fetched package to build."""

    fetched: Fetched
    version: str
    toolchain: str
    """Fingerprint of the compilers, so that new ones build again."""
    wall_s: float
    unit_s: float
    memory_bytes: int
    disk_bytes: int
    jobs: int


class ModuleInput(Record, frozen=True):
    """A module to read."""

    module: str
    writer_llvm: str
    allow_newer: bool


class LicenseInput(Record, frozen=True):
    """A build result in the store, by hash."""

    build: str


class UnitLicenses(Record, frozen=True):
    """One licence a unit, in the units' order."""

    units: tuple[UnitLicense, ...]


class VocabularyInput(Record, frozen=True):
    """What the byte-pair and the embedding vocabulary are trained on: modules, in this order."""

    modules: tuple[ModuleInput, ...]
    tokens: int
    seed: int
    text_bytes: int
    """Text that is read; modules beyond it are not."""


class Vocabularies(Record, frozen=True):
    """Both vocabularies in the store, by hash."""

    tokenizer: str
    embedding: str
    text_bytes: int


class EncodeInput(Record, frozen=True):
    """A module to count tokens of and to embed."""

    module: ModuleInput
    tokenizer: str
    embedding: str


class Encoding(Record, frozen=True):
    """A module in the vocabularies' terms."""

    module: str
    n_tokens: int
    vectors: bytes
    """float32, little-endian, [functions, `embedding.DIMENSION`]."""


class LabelInput(Record, frozen=True, omit_defaults=True):
    """A module to compile."""

    module: str
    toolchain: str
    timeout_s: float
    show_unused: bool = False
    """See `label_module`."""


def _discover(store: Store, task: DiscoverInput) -> Packages:
    found = find_source(task.kind).discover(task.options)
    return Packages(packages=tuple(sorted(found, key=lambda package: package.name)))


def _fetch(store: Store, task: FetchInput) -> Fetched:
    with store.workspace(digest("fetch", task)) as workspace:
        return find_source(task.package.source).fetch(task.package, store, workspace)


def _build(store: Store, task: BuildInput) -> BuildResult:
    limits = BuildLimits(
        wall_s=task.wall_s,
        unit_s=task.unit_s,
        memory_bytes=task.memory_bytes,
        disk_bytes=task.disk_bytes,
        jobs=task.jobs,
    )
    source = find_source(task.fetched.package.source)
    with store.workspace(digest("build", task)) as workspace:
        return source.build(
            task.fetched, store, workspace, toolchain=Toolchain.find(), limits=limits
        )


def _verify(store: Store, task: ModuleInput) -> ModuleSummary:
    return verify_module(
        store, task.module, writer_llvm=task.writer_llvm, allow_newer=task.allow_newer
    )


def _license(store: Store, task: LicenseInput) -> UnitLicenses:
    return UnitLicenses(units=decide(store, decode(store.get(task.build), BuildResult)))


def _featurise(store: Store, task: ModuleInput) -> ModuleFeatures:
    return featurise(store, task.module, writer_llvm=task.writer_llvm, allow_newer=task.allow_newer)


def _text(store: Store, task: ModuleInput) -> str:
    data = store.get(task.module)
    return read_module(data, writer_llvm=task.writer_llvm, allow_newer=task.allow_newer).text


def _vocabulary(store: Store, task: VocabularyInput) -> Vocabularies:
    texts: list[str] = []
    triplets: Counter[embedding.Triplet] = Counter()
    size = 0
    for module in task.modules:
        if size > task.text_bytes:
            break
        texts.append(_text(store, module))
        size += len(texts[-1])
        triplets += embedding.count_triplets(parse_module(texts[-1]).functions)
    trained = embedding.train_vocabulary(triplets, seed=task.seed)
    return Vocabularies(
        tokenizer=store.put(tokens.train_tokenizer(texts, task.tokens)),
        embedding=store.put(encode(trained)),
        text_bytes=size,
    )


def _encode(store: Store, task: EncodeInput) -> Encoding:
    text = _text(store, task.module)
    vocabulary = decode(store.get(task.embedding), embedding.Vocabulary)
    vectors = embedding.embed_functions(parse_module(text).functions, vocabulary)
    (n_tokens,) = tokens.count(store.get(task.tokenizer), [text])
    return Encoding(module=task.module.module, n_tokens=n_tokens, vectors=vectors.tobytes())


def _label(store: Store, task: LabelInput) -> ModuleLabels:
    return label_module(store, task.module, timeout_s=task.timeout_s, show_unused=task.show_unused)


DAY = 86_400.0

STAGES: dict[str, Stage] = {
    "discover": Stage("1", _discover, DiscoverInput, Packages, 600),
    "fetch": Stage("1", _fetch, FetchInput, Fetched, 1200),
    "build": Stage("1", _build, BuildInput, BuildResult, DAY),
    "verify": Stage("1", _verify, ModuleInput, ModuleSummary, 300),
    "license": Stage("2", _license, LicenseInput, UnitLicenses, 600),
    "featurise": Stage("1", _featurise, ModuleInput, ModuleFeatures, 300),
    "vocabulary": Stage("1", _vocabulary, VocabularyInput, Vocabularies, 3600),
    "encode": Stage("1", _encode, EncodeInput, Encoding, 300),
    "label": Stage("1", _label, LabelInput, ModuleLabels, DAY),
}
"""The table: one line a stage."""
