"""A corpus becomes a directory: tables, vocabularies, counts, card and models, in one step."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from ir_dataset import pack
from ir_dataset.audit import audit_split, require_clean
from ir_dataset.features import FEATURES
from ir_dataset.records import BuildResult
from ir_dataset.split import ModuleSplit
from rewriter.export.directory import check_target, replaced, write_json

if TYPE_CHECKING:
    import numpy as np

    from ir_dataset.pipeline import Corpus, Kept, Pipeline

__all__ = ["MANIFEST", "RUN", "publish"]

MANIFEST = "manifest.json"
FEATURE = "feature_"
"""Before the names of features in the table of functions."""
RUN = "run.json"
"""Times and what was reused. It and the card, which tells them, are all that differs between two runs over
the same objects; the manifest leaves both out."""


def publish(corpus: Corpus, pipeline: Pipeline, output: Path, *, card: bool, train: bool) -> None:
    """Write the dataset; the directory that was there before goes only when all of it is written.

    Raises:
        VerificationError: the split leaks. ArtifactError: `output` holds something else.
    """
    check_target(output)
    audit = audit_split(corpus.items, corpus.split, corpus.control)
    require_clean(audit)
    progress = pipeline.runner.progress
    with replaced(output) as place:
        progress.stage("pack", 1, 0)
        _write_tables(corpus, pipeline, place)
        _write_text(place / "audit.json", {**msgspec.to_builtins(audit), "clean": audit.clean})
        _write_text(place / "summary.json", _summary(corpus, pipeline))
        _write_provenance(corpus, place / "provenance.jsonl")
        _write_vocabularies(corpus, pipeline, place)
        progress.advance("", False)
        if train:
            progress.stage("train", 1, 0)
            _train(place)
            progress.advance("", False)
        _write_text(place / RUN, pipeline.summary())
        if card:
            from ir_dataset.card import write_card

            progress.stage("card", 1, 0)
            write_card(place)
            progress.advance("", False)
        _write_manifest(place)


def _write_text(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n", encoding="utf-8")


# --- tables ------------------------------------------------------------------------------------


def _write_tables(corpus: Corpus, pipeline: Pipeline, place: Path) -> None:
    store = pipeline.runner.store
    chosen = {one.module: one for one in corpus.split.modules}
    rows = [
        _module_row(one, corpus, chosen[one.summary.module].split)
        for one in corpus.kept
        if chosen[one.summary.module].split
    ]
    pack.write_modules(place, store, rows)
    packed = [one for one in corpus.kept if chosen[one.summary.module].split]
    packed.sort(key=lambda one: one.summary.module)
    functions = [row for one in packed for row in _function_rows(one, chosen[one.summary.module])]
    numbers = _numbers(corpus, packed)
    pack.write_functions(place / "functions.parquet", functions, numbers, _vectors(corpus, packed))
    pack.write_labels(place / "labels.parquet", _label_rows(corpus, packed))
    texts = {sha: one.unit.license.expression for one in packed for sha in one.unit.license.files}
    pack.write_licenses(place / "licenses.parquet", store, texts)


def _module_row(one: Kept, corpus: Corpus, split: str) -> pack.ModuleRow:
    unit, summary, package = one.unit.unit, one.summary, one.unit.package
    encoding = corpus.encodings.get(summary.module)
    return pack.ModuleRow(
        license_expression=one.unit.license.expression,
        license_source=one.unit.license.origin,
        license_files=one.unit.license.files,
        package_source=package.url,
        language=unit.language,
        module_id=summary.module,
        struct_hash=summary.struct_hash,
        norm_hash=summary.norm_hash,
        package=package.name,
        version=package.version,
        project=package.project,
        source_path=unit.source_path,
        source_sha256=unit.source_sha256,
        archive_sha256=one.unit.archive_sha256,
        build_system=unit.build_system,
        compiler=unit.compiler,
        llvm_version=unit.llvm_version,
        target_triple=summary.target_triple,
        arguments=unit.arguments,
        opt_level_requested=unit.opt_level_requested,
        forced_o2=unit.forced_o2,
        stage="opt" if unit.optimized else "unopt",
        dropped_flags=unit.dropped_flags,
        n_functions=summary.n_functions,
        n_instructions=summary.n_instructions,
        n_tokens_bpe=encoding.n_tokens if encoding else None,
        n_text_chars=summary.text_chars,
        reader_ok=summary.reader_ok,
        license_tier=one.unit.license.tier,
        split=split,
        dup_count=one.dup_count,
    )


def _function_rows(one: Kept, chosen: ModuleSplit) -> list[pack.FunctionRow]:
    package = one.unit.package
    return [
        pack.FunctionRow(
            module_id=one.summary.module,
            name=function.name,
            language=one.unit.unit.language,
            project=package.project,
            fn_hash=function.fn_hash,
            norm_hash=function.norm_hash,
            cluster_id=cluster,
            n_instructions=function.n_instructions,
            n_blocks=function.n_blocks,
            split=chosen.split if inside else "",
            duplicate=duplicate,
        )
        for function, cluster, duplicate, inside in zip(
            one.summary.functions, one.cluster, one.duplicate, chosen.functions, strict=True
        )
    ]


def _numbers(corpus: Corpus, packed: list[Kept]) -> dict[str, np.ndarray]:
    """Columns by name, NaN where unknown: sizes of machine code and features."""
    import numpy as np

    total = sum(len(one.summary.functions) for one in packed)
    features = np.full((total, len(FEATURES)), np.nan, np.float32)
    sizes = {f"size_{kind.lower()}": np.full(total, np.nan, np.float32) for kind in _kinds(corpus)}
    start = 0
    for one in packed:
        names = [function.name for function in one.summary.functions]
        stop = start + len(names)
        found = corpus.features.get(one.summary.module)
        if found is not None:
            features[start:stop] = found.matrix()
        labels = corpus.labels.get(one.summary.module)
        for way in labels.sizes if labels else ():
            known = dict(zip(way.names, way.sizes, strict=True))
            sizes[f"size_{way.kind.lower()}"][start:stop] = [known.get(n, np.nan) for n in names]
        start = stop
    return sizes | {f"{FEATURE}{name}": features[:, at] for at, name in enumerate(FEATURES)}


def _kinds(corpus: Corpus) -> list[str]:
    return sorted({way.kind for labels in corpus.labels.values() for way in labels.sizes})


def _vectors(corpus: Corpus, packed: list[Kept]) -> np.ndarray | None:
    """[functions, width], zeros where a module was not embedded; None where none was."""
    import numpy as np

    from ir_dataset.embedding import DIMENSION

    if not corpus.encodings:
        return None
    parts = []
    for one in packed:
        found = corpus.encodings.get(one.summary.module)
        count = len(one.summary.functions)
        if found is None:
            parts.append(np.zeros((count, DIMENSION), np.float32))
        else:
            parts.append(np.frombuffer(found.vectors, "<f4").reshape(count, DIMENSION))
    return np.concatenate(parts) if parts else np.zeros((0, DIMENSION), np.float32)


def _label_rows(corpus: Corpus, packed: list[Kept]) -> list[tuple[str, str, str, float, str, str]]:
    return [
        (one.summary.module, name, way.kind, float(size), "bytes", way.tools)
        for one in packed
        if one.summary.module in corpus.labels
        for way in corpus.labels[one.summary.module].sizes
        for name, size in zip(way.names, way.sizes, strict=True)
    ]


# --- counts --------------------------------------------------------------------------------------


def _summary(corpus: Corpus, pipeline: Pipeline) -> dict[str, Any]:
    """What the card tells: everything but times."""
    failures = Counter(
        (built.package.language, failure.kind)
        for built in corpus.builds
        for failure in built.failures
    )
    labels = list(corpus.labels.values())
    encoded = list(corpus.encodings.values())
    chars = {one.summary.module: one.summary.text_chars for one in corpus.kept}
    return {
        "name": pipeline.config.name,
        "seed": pipeline.config.seed,
        "license_tier": pipeline.config.license_tier,
        "toolchain": pipeline.toolchain.fingerprint(),
        "sources_skipped": pipeline.skipped,
        "packages_built": len(corpus.builds),
        "packages_complete": sum(built.complete for built in corpus.builds),
        "packages": [_package(built) for built in corpus.builds],
        "units": len(corpus.units),
        "unit_failures": [
            {"language": language, "kind": kind, "count": count}
            for (language, kind), count in sorted(failures.items())
        ],
        "dedup": corpus.deduplicated.counts,
        "languages": _languages(corpus),
        "tiers": _tiers(corpus),
        "splits": dict(sorted(Counter(one.split for one in corpus.split.modules).items())),
        "labelled_modules": len(labels),
        "label_failures": sum(len(one.failures) for one in labels),
        "tokens": {
            "vocabulary": pipeline.config.tokens.vocabulary,
            "modules": len(encoded),
            "tokens": sum(one.n_tokens for one in encoded),
            "chars": sum(chars.get(one.module, 0) for one in encoded),
        },
    }


def _package(built: BuildResult) -> dict[str, Any]:
    return {
        "source": built.package.source,
        "name": built.package.name,
        "version": built.package.version,
        "language": built.package.language,
        "units": len(built.units),
        "failures": len(built.failures),
        "complete": built.complete,
    }


def _languages(corpus: Corpus) -> dict[str, dict[str, int]]:
    found: dict[str, Counter[str]] = {}
    for unit in corpus.units:
        counts = found.setdefault(unit.unit.language, Counter())
        counts["units"] += 1
        counts["bytes"] += unit.unit.size
        if unit.summary is not None:
            counts["functions"] += unit.summary.n_functions
    for one in corpus.kept:
        counts = found.setdefault(one.unit.unit.language, Counter())
        counts["kept_modules"] += 1
        counts["kept_bytes"] += one.unit.unit.size
        counts["kept_functions"] += one.summary.n_functions
        counts["kept_instructions"] += one.summary.n_instructions
        counts["kept_chars"] += one.summary.text_chars
        counts["unique_functions"] += one.duplicate.count(False)
    return {language: dict(sorted(counts.items())) for language, counts in sorted(found.items())}


def _tiers(corpus: Corpus) -> dict[str, dict[str, int]]:
    found: dict[str, Counter[str]] = {}
    for unit in corpus.units:
        found.setdefault(unit.unit.language, Counter())[unit.license.tier] += 1
    return {language: dict(sorted(tiers.items())) for language, tiers in sorted(found.items())}


def _write_provenance(corpus: Corpus, path: Path) -> None:
    lines = [
        json.dumps(
            {
                **msgspec.to_builtins(built.package),
                "units": len(built.units),
                "complete": built.complete,
                "failures": [msgspec.to_builtins(failure) for failure in built.failures],
                "license": msgspec.to_builtins(built.license),
            },
            sort_keys=True,
        )
        for built in corpus.builds
    ]
    path.write_text("".join(line + "\n" for line in sorted(lines)), encoding="utf-8")


def _write_vocabularies(corpus: Corpus, pipeline: Pipeline, place: Path) -> None:
    store = pipeline.runner.store
    for name, sha in (("tokenizer.json", corpus.tokenizer), ("ir2vec.json", corpus.embedding)):
        if sha:
            (place / name).write_bytes(store.get(sha))


def _train(place: Path) -> None:
    from ir_dataset.cost_models.fit_dataset import fit_dataset

    figures = fit_dataset(place)
    _write_text(place / "models.json", figures)


def _write_manifest(place: Path) -> None:
    timed = {RUN, "card.html"}
    files = sorted(path for path in place.rglob("*") if path.is_file() and path.name not in timed)
    hashes = {
        path.relative_to(place).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }
    write_json(place / MANIFEST, {"format": 1, "files": hashes})
