"""What reads ComPile's files reads an export: its columns in its order, one file a language."""

import pytest

pa = pytest.importorskip("pyarrow", reason="pip install 'rewriter[ir]'")

import pyarrow.parquet as pq  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

from ir_dataset.cli import app  # noqa: E402
from ir_dataset.export_compile import COMPILE_COLUMNS, export_compile  # noqa: E402
from ir_dataset.pack import ModuleRow, write_modules  # noqa: E402
from ir_dataset.store import Store  # noqa: E402
from rewriter.errors import ArtifactError  # noqa: E402

TEXTS = (
    *("license_expression", "license_source", "package_source", "struct_hash", "norm_hash"),
    *("package", "version", "project", "source_sha256", "archive_sha256", "build_system"),
    *("compiler", "llvm_version", "target_triple", "opt_level_requested", "stage", "license_tier"),
)


def _dataset(place):
    store = Store(place / "store")
    rows = []
    for language, split, number in (("c", "train", 1), ("c", "test", 2), ("zig", "ood", 3)):
        rows.append(
            ModuleRow(
                **{name: f"{name} {number}" for name in TEXTS},
                license_files=("f" * 64,),
                language=language,
                module_id=store.put(f"bitcode {number}".encode()),
                source_path="a.c",
                arguments=("-O2",),
                forced_o2=False,
                dropped_flags=(),
                n_functions=1,
                n_instructions=2,
                n_tokens_bpe=None,
                n_text_chars=3,
                reader_ok=True,
                split=split,
                dup_count=1,
            )
        )
    write_modules(place / "dataset", store, rows)
    return place / "dataset"


def test_one_file_a_language_with_the_six_columns(tmp_path):
    assert export_compile(_dataset(tmp_path), tmp_path / "out") == {"c": 2, "zig": 1}
    files = sorted(
        path.relative_to(tmp_path / "out") for path in tmp_path.rglob("out/**/*.parquet")
    )
    assert [str(path) for path in files] == [
        "data/c/train-00000.parquet",
        "data/zig/train-00000.parquet",
    ]
    table = pq.read_table(tmp_path / "out" / "data" / "c" / "train-00000.parquet")
    assert tuple(table.column_names) == COMPILE_COLUMNS
    assert table.schema.field("content").type == pa.binary()
    assert sorted(table["content"].to_pylist()) == [b"bitcode 1", b"bitcode 2"]
    assert table["license_files"].to_pylist() == [["f" * 64]] * 2


def test_the_loader_that_compile_names_reads_it(tmp_path):
    datasets = pytest.importorskip("datasets", reason="pip install datasets")
    export_compile(_dataset(tmp_path), tmp_path / "out")
    pattern = str(tmp_path / "out" / "data" / "c" / "train-*.parquet")
    rows = datasets.load_dataset(
        "parquet", data_files=pattern, split="train", cache_dir=str(tmp_path / "cache")
    )
    assert rows.column_names == list(COMPILE_COLUMNS)
    assert sorted(rows["content"]) == [b"bitcode 1", b"bitcode 2"]


def test_the_command_counts_by_language(tmp_path):
    arguments = ["export-compile", str(_dataset(tmp_path)), "-o", str(tmp_path / "out")]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0 and done.stdout == "c: 2 modules\nzig: 1 modules\n"
    done = CliRunner().invoke(app, ["export-compile", str(tmp_path), "-o", str(tmp_path / "two")])
    assert done.exit_code == 2 and "not a dataset" in done.stderr


def test_again_it_replaces_itself_and_gives_the_same_bytes(tmp_path):
    dataset = _dataset(tmp_path)
    export_compile(dataset, tmp_path / "out")
    first = (tmp_path / "out/data/c/train-00000.parquet").read_bytes()
    export_compile(dataset, tmp_path / "out")
    assert (tmp_path / "out/data/c/train-00000.parquet").read_bytes() == first


def test_places_that_are_not_allowed_are_refused(tmp_path):
    dataset = _dataset(tmp_path)
    with pytest.raises(ArtifactError, match="not a dataset"):
        export_compile(tmp_path / "absent", tmp_path / "out")
    with pytest.raises(ArtifactError, match="inside the dataset"):
        export_compile(dataset, dataset / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("mine")
    with pytest.raises(ArtifactError, match="holds other files"):
        export_compile(dataset, tmp_path / "full")
    (dataset / "data" / "zig" / "ood-00000.parquet").write_bytes(b"damaged")
    with pytest.raises(ArtifactError, match="ood-00000"):
        export_compile(dataset, tmp_path / "out")
    assert not (tmp_path / "out").exists()
