"""The drop directory becomes the same records in the same order, whatever order it was filled in."""

import json

import pytest

from ir_dataset.extract.collect import collect, files_below
from ir_dataset.records import encode
from ir_dataset.store import Store
from ir_dataset.toolchain import CCompiler

COMPILER = CCompiler("clang", ("clang",), ("clang",), "22.1.8")


def _unit(source, *arguments):
    return {
        "language": "c",
        "source_path": source,
        "source_sha256": "0" * 64,
        "directory": ".",
        "opt_level_requested": "-O2",
        "forced_o2": False,
        "arguments": list(arguments),
        "dropped_flags": [],
        "includes": ["a.h"],
    }


@pytest.fixture
def dropped(tmp_path):
    """Fills a drop directory beside a tree with a.c and b.c, in the order given."""

    def fill(order, name):
        drop, tree = tmp_path / name / "drop", tmp_path / name / "src"
        for place in (drop, tree / "sub"):
            place.mkdir(parents=True)
        for source in ("a.c", "sub/b.c"):
            (tree / source).write_text("")
        units = [_unit("a.c", "-O2"), _unit("sub/b.c"), _unit("a.c", "-O1"), _unit("gone.c")]
        for index in order:
            (drop / f"{index}.json").write_text(json.dumps(units[index]))
            (drop / f"{index}.bc").write_bytes(b"BC\xc0\xde" + units[index]["source_path"].encode())
        failure = {"kind": "compile", "reason": "no", "source_path": "a.c"}
        (drop / "9.failed.json").write_text(json.dumps(failure))
        return drop, tree

    return fill


def _collect(drop, tree, store, **options):
    options = {"before": frozenset(), **options}
    return collect(drop, tree, store, compiler=COMPILER, build_system="make", **options)


def test_order_of_arrival_does_not_matter(dropped, tmp_path):
    store = Store(tmp_path / "store")
    first = _collect(*dropped([0, 1, 2, 3], "x"), store)
    second = _collect(*dropped([3, 2, 1, 0], "y"), store)
    assert encode(first) == encode(second)
    units, failures = first
    assert [(unit.source_path, unit.arguments) for unit in units] == [
        ("a.c", ("-O1",)),
        ("a.c", ("-O2",)),
        ("sub/b.c", ()),
    ]
    assert store.get(units[0].module) == b"BC\xc0\xdea.c"
    assert units[0].compiler == "clang 22.1.8" and units[0].includes == ("a.h",)
    assert [failure.source_path for failure in failures] == ["a.c"]


def test_sources_that_are_gone_count_where_the_archive_had_them(dropped, tmp_path):
    store = Store(tmp_path / "store")
    drop, tree = dropped([0, 3], "x")
    assert len(_collect(drop, tree, store)[0]) == 1
    assert len(_collect(drop, tree, store, before=frozenset({"gone.c"}))[0]) == 2
    assert len(_collect(drop, tree, store, keep_vanished=True)[0]) == 2


def test_equal_units_are_one(dropped, tmp_path):
    drop, tree = dropped([0], "x")
    for ending in (".json", ".bc"):
        (drop / f"copy{ending}").write_bytes((drop / f"0{ending}").read_bytes())
    assert len(_collect(drop, tree, Store(tmp_path / "store"))[0]) == 1


def test_links_that_a_build_left_are_not_followed(dropped, tmp_path):
    drop, tree = dropped([0, 1], "x")
    secret = tmp_path / "secret"
    secret.write_text("secret")
    (drop / "0.bc").unlink()
    (drop / "0.bc").symlink_to(secret)
    (drop / "shim-errors.log").symlink_to(secret)
    units, failures = _collect(drop, tree, Store(tmp_path / "store"))
    assert [unit.source_path for unit in units] == ["sub/b.c"]
    assert [failure.kind for failure in failures] == ["compile"]


def test_faults_of_the_shim_are_told(dropped, tmp_path):
    drop, tree = dropped([0], "x")
    (drop / "shim-errors.log").write_text("OSError: full\nOSError: full\n")
    _, failures = _collect(drop, tree, Store(tmp_path / "store"))
    assert [(one.kind, one.reason) for one in failures if one.kind == "tool"] == [
        ("tool", "OSError: full")
    ]


def test_files_are_listed_relative(dropped):
    _, tree = dropped([], "x")
    assert files_below(tree) == {"a.c", "sub/b.c"}
