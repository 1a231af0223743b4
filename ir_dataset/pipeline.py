"""The pipeline, from a corpus file to a dataset: what runs after what."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ir_dataset.config import Config, SourceTable
from ir_dataset.dedup import Deduplicated, Entry, deduplicate
from ir_dataset.features import ModuleFeatures
from ir_dataset.labels import ModuleLabels
from ir_dataset.license import UnitLicense
from ir_dataset.reader import is_newer
from ir_dataset.records import BuildResult, Fetched, Package, TranslationUnit, decode, digest
from ir_dataset.runner import Runner, Task
from ir_dataset.sources import find_source
from ir_dataset.split import FunctionKey, Split, SplitInput, assign, assign_randomly
from ir_dataset.stages import (
    BuildInput,
    DiscoverInput,
    EncodeInput,
    Encoding,
    FetchInput,
    LabelInput,
    LicenseInput,
    ModuleInput,
    VocabularyInput,
)
from ir_dataset.toolchain import Toolchain
from ir_dataset.verify import ModuleSummary
from rewriter.errors import SourceError

__all__ = ["ORDER", "Corpus", "Kept", "Pipeline", "Unit"]

ORDER = tuple(
    "discover fetch build verify license dedup featurise label split encode pack card train".split()
)
"""Stages by name; a run may end after any of them."""

UNCHANGING = frozenset({"debian", "debian-crates", "pypi-sdist"})
"""Sources whose answer to `discover` is kept: what a registry has now is not what the corpus is of."""


@dataclass(frozen=True)
class Unit:
    """A unit with all that the stages for single modules said of it."""

    package: Package
    unit: TranslationUnit
    license: UnitLicense
    summary: ModuleSummary | None
    """None where reading it crashed or took too long."""
    archive_sha256: str


@dataclass(frozen=True)
class Kept:
    """A module of the dataset."""

    unit: Unit
    dup_count: int
    duplicate: tuple[bool, ...]
    cluster: tuple[int, ...]

    @property
    def summary(self) -> ModuleSummary:
        """What reading it told."""
        assert self.unit.summary is not None
        return self.unit.summary


@dataclass(frozen=True)
class Corpus:
    """Everything that is packed."""

    builds: tuple[BuildResult, ...]
    units: tuple[Unit, ...]
    deduplicated: Deduplicated
    kept: tuple[Kept, ...]
    """Modules of tiers that may be packed."""
    split: Split
    control: Split
    items: tuple[SplitInput, ...]
    features: dict[str, ModuleFeatures]
    labels: dict[str, ModuleLabels]
    encodings: dict[str, Encoding]
    tokenizer: str
    embedding: str


class Pipeline:
    """One corpus over one store.

    Args:
        config, sources: the corpus file.
        runner: the store, where tasks run, and who is told.
        limit: at most this many packages of each source.
    """

    def __init__(
        self,
        config: Config,
        sources: Sequence[SourceTable],
        runner: Runner,
        *,
        limit: int | None = None,
    ) -> None:
        self.config, self.sources, self.runner, self.limit = config, sources, runner, limit
        self.toolchain = Toolchain.find()
        self.skipped: dict[str, str] = {}
        """Sources that cannot run on this machine, and why."""

    def run(self, until: str, output: Path | None = None) -> dict[str, Any]:
        """Run up to a stage; returns the counts that a summary shows.

        Raises:
            SourceError: no source can run here, or nothing came of any.
            ArtifactError: the output directory holds something else, or cannot be written.
        """
        last = ORDER.index(until)
        packages = self.discover()
        fetched = self.fetch(packages) if last >= ORDER.index("fetch") else []
        shas = self.build(fetched) if last >= ORDER.index("build") else []
        if last > ORDER.index("build"):
            if not shas:
                told = "; ".join(f"{name}: {why}" for name, why in self.skipped.items())
                raise SourceError(f"no package was built: {told or 'see the failures'}")
            corpus = self.analyse(shas, last)
            if last >= ORDER.index("pack") and output is not None:
                from ir_dataset.publish import publish

                publish(
                    corpus, self, output, card=last >= ORDER.index("card"), train=until == "train"
                )
        return self.summary()

    def summary(self) -> dict[str, Any]:
        """What each stage did in this run, and what was skipped."""
        return {
            "stages": [vars(one) for one in self.runner.summaries],
            "skipped": self.skipped,
        }

    # --- from sources to bitcode ---------------------------------------------------------------

    def discover(self) -> list[Package]:
        """The packages of every source that can run here."""
        tasks = []
        for table in self.sources:
            source = find_source(table.kind)
            reason = source.missing(self.toolchain)
            if reason is None:
                asked = DiscoverInput(
                    kind=table.kind, options=table.options, version=source.version
                )
                tasks.append(Task(table.kind, asked))
            else:
                self.skipped[table.kind] = reason
        kept = {task.label for task in tasks} & UNCHANGING
        found = self.runner.records("discover", [task for task in tasks if task.label in kept])
        fresh = [task for task in tasks if task.label not in kept]
        found += self.runner.records("discover", fresh, again=True)
        return [
            package
            for listed in found
            if listed is not None
            for package in listed.packages[: self.limit]
        ]

    def fetch(self, packages: Sequence[Package]) -> list[Fetched]:
        """The packages that could be had."""
        tasks = [
            Task(
                package.name,
                FetchInput(package=package, version=find_source(package.source).version),
            )
            for package in packages
        ]
        return [fetched for fetched in self.runner.records("fetch", tasks) if fetched is not None]

    def build(self, fetched: Sequence[Fetched]) -> list[str]:
        """Hashes of the build results."""
        limits = self.config.build
        tasks = [
            Task(
                item.package.name,
                BuildInput(
                    fetched=item,
                    version=find_source(item.package.source).version,
                    toolchain=self.toolchain.fingerprint(),
                    wall_s=limits.wall_s,
                    unit_s=limits.unit_s,
                    memory_bytes=int(limits.memory_gib * 2**30),
                    disk_bytes=int(limits.disk_gib * 2**30),
                    jobs=limits.jobs,
                ),
            )
            for item in fetched
        ]
        return [sha for sha in self.runner.map("build", tasks) if sha is not None]

    # --- from bitcode to a corpus ----------------------------------------------------------------

    def analyse(self, shas: Sequence[str], last: int) -> Corpus:
        """Read, license, deduplicate, describe, label and split what was built."""
        builds = tuple(decode(self.runner.store.get(sha), BuildResult) for sha in shas)
        units = self._units(shas, builds)
        deduplicated, kept = self._kept(units)
        inputs = {one.summary.module: self._input(one.unit.unit) for one in kept}
        features = self._features(inputs) if last >= ORDER.index("featurise") else {}
        labels = self._labels(kept) if last >= ORDER.index("label") else {}
        items = tuple(_split_input(one) for one in kept)
        wanted = self.config.split
        split = assign(
            items,
            seed=self.config.seed,
            train=wanted.train,
            validation=wanted.validation,
            held_out_language=wanted.held_out_language,
        )
        control = assign_randomly(items, seed=self.config.seed)
        tokenizer, vocabulary, encodings = "", "", {}
        if last >= ORDER.index("encode"):
            tokenizer, vocabulary, encodings = self._encodings(inputs, split)
        return Corpus(
            builds=builds,
            units=units,
            deduplicated=deduplicated,
            kept=kept,
            split=split,
            control=control,
            items=items,
            features=features,
            labels=labels,
            encodings=encodings,
            tokenizer=tokenizer,
            embedding=vocabulary,
        )

    def _input(self, unit: TranslationUnit) -> ModuleInput:
        return ModuleInput(
            module=unit.module,
            writer_llvm=unit.llvm_version,
            allow_newer=self.config.allow_newer_writers and is_newer(unit.llvm_version),
        )

    def _units(self, shas: Sequence[str], builds: Sequence[BuildResult]) -> tuple[Unit, ...]:
        seen = {unit.module: unit for built in builds for unit in built.units}
        tasks = [Task(unit.source_path, self._input(unit)) for _, unit in sorted(seen.items())]
        summaries = {
            one.module: one for one in self.runner.records("verify", tasks) if one is not None
        }
        asked = [
            Task(built.package.name, LicenseInput(build=sha))
            for sha, built in zip(shas, builds, strict=True)
        ]
        units = []
        for built, licenses in zip(builds, self.runner.records("license", asked), strict=True):
            archive = built.package.options.get("sha256", "")
            for number, unit in enumerate(built.units):
                license_ = licenses.units[number] if licenses else _unlicensed(number, unit)
                summary = summaries.get(unit.module)
                units.append(Unit(built.package, unit, license_, summary, str(archive)))
        return tuple(units)

    def _kept(self, units: Sequence[Unit]) -> tuple[Deduplicated, tuple[Kept, ...]]:
        """One of each module, and of these the ones that the licence gate lets through."""
        read = [unit for unit in units if unit.summary is not None]
        entries = [
            Entry(
                summary=unit.summary,  # pyright: ignore[reportArgumentType]
                project=unit.package.project,
                package=unit.package.name,
                version=unit.package.version,
                source_path=unit.unit.source_path,
                tier=unit.license.tier,
            )
            for unit in read
        ]
        self.runner.progress.stage("dedup", 1, 0)
        deduplicated = deduplicate(entries)
        self.runner.progress.advance("", False)
        allowed = ("a",) if self.config.license_tier == "a" else ("a", "b")
        kept = tuple(
            Kept(read[one.entry], one.dup_count, one.duplicate, one.cluster)
            for one in deduplicated.modules
            if read[one.entry].license.tier in allowed
        )
        return deduplicated, kept

    def _features(self, inputs: dict[str, ModuleInput]) -> dict[str, ModuleFeatures]:
        tasks = [Task(sha[:12], asked) for sha, asked in sorted(inputs.items())]
        found = self.runner.records("featurise", tasks)
        return {one.module: one for one in found if one is not None}

    def _labels(self, kept: Sequence[Kept]) -> dict[str, ModuleLabels]:
        """Of a sample by hash, no project with more than its share."""
        wanted = self.config.label
        counts: Counter[str] = Counter()
        tasks = []
        for one in sorted(kept, key=lambda one: digest(self.config.seed, one.summary.module)):
            project = one.unit.package.project
            if len(tasks) >= wanted.max_modules:
                break
            if counts[project] < wanted.max_modules_per_project:
                counts[project] += 1
                asked = LabelInput(
                    module=one.summary.module,
                    toolchain=self.toolchain.fingerprint(),
                    timeout_s=wanted.timeout_s,
                    show_unused=one.unit.unit.language == "zig",
                )
                tasks.append(Task(one.unit.unit.source_path, asked))
        found = self.runner.records("label", tasks)
        return {one.module: one for one in found if one is not None}

    def _encodings(
        self, inputs: dict[str, ModuleInput], split: Split
    ) -> tuple[str, str, dict[str, Encoding]]:
        """Vocabularies from the training set; tokens and vectors of a sample by hash."""
        options = self.config.tokens
        ordered = sorted(inputs, key=lambda sha: digest(self.config.seed, "tokens", sha))
        training = {one.module for one in split.modules if one.split == "train"}
        asked = VocabularyInput(
            modules=tuple(inputs[sha] for sha in ordered if sha in training),
            tokens=options.vocabulary,
            seed=self.config.seed,
            text_bytes=int(options.train_text_mib * 2**20),
        )
        vocabularies = self.runner.one("vocabulary", Task("", asked))
        tasks = [
            Task(
                sha[:12],
                EncodeInput(
                    module=inputs[sha],
                    tokenizer=vocabularies.tokenizer,
                    embedding=vocabularies.embedding,
                ),
            )
            for sha in ordered[: options.max_modules]
        ]
        found = self.runner.records("encode", tasks)
        encodings = {one.module: one for one in found if one is not None}
        return vocabularies.tokenizer, vocabularies.embedding, encodings


def _unlicensed(number: int, unit: TranslationUnit) -> UnitLicense:
    why = "the licence could not be decided"
    return UnitLicense(
        unit=number, module=unit.module, tier="none", expression="", origin="", why=why
    )


def _split_input(kept: Kept) -> SplitInput:
    keys = tuple(
        FunctionKey(function.norm_hash, cluster, function.n_instructions)
        for function, cluster in zip(kept.summary.functions, kept.cluster, strict=True)
    )
    package = kept.unit.package
    return SplitInput(kept.summary.module, package.project, kept.unit.unit.language, keys)
