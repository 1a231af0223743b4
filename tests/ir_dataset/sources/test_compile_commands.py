"""Entries of a compilation database are compiled where they say, with the flags they have."""

import json

import pytest

from ir_dataset.sources import find_source
from ir_dataset.sources.source import BuildLimits
from ir_dataset.store import Store
from ir_dataset.toolchain import Toolchain
from rewriter.errors import ConfigError, SourceError

SOURCE = find_source("compile-commands")
TOOLCHAIN = Toolchain.find()


@pytest.fixture
def database(tmp_path):
    root = tmp_path / "project"
    (root / "build").mkdir(parents=True)
    (root / "a.c").write_text("int f(void) { return X; }\n")
    (root / "b.cc").write_text("int g() { return X; }\n")
    (tmp_path / "outside.c").write_text("int h;\n")
    build = str(root / "build")
    entries = [
        {
            "directory": build,
            "file": "../a.c",
            "command": "/usr/bin/cc -DX='1 + 1' -O1 -c ../a.c -o a.o",
        },
        {
            "directory": build,
            "file": str(root / "b.cc"),
            "arguments": ["c++", "-DX=2", "-c", str(root / "b.cc")],
        },
        {"directory": build, "file": "../../outside.c", "command": "cc -c ../../outside.c"},
    ]
    path = root / "build/compile_commands.json"
    path.write_text(json.dumps(entries))
    return path


def _build(path, place, **options):
    store = Store(place / "store")
    (package,) = SOURCE.discover({"path": str(path), "root": str(path.parents[1]), **options})
    fetched = SOURCE.fetch(package, store, place)
    with store.workspace("build") as workspace:
        return SOURCE.build(
            fetched, store, workspace, toolchain=TOOLCHAIN, limits=BuildLimits(jobs=2)
        )


@pytest.mark.skipif(TOOLCHAIN.c_compiler() is None, reason="needs clang or zig of the pinned LLVM")
def test_entries_below_the_root_are_units(database, tmp_path):
    built = _build(database, tmp_path, license="MIT")
    assert [(unit.source_path, unit.arguments) for unit in built.units] == [
        ("a.c", ("-DX=1 + 1", "-O1")),
        ("b.cc", ("-DX=2", "-O2")),
    ]
    assert built.license.expression == "MIT" and built.package.name == "project"
    assert not (database.parent / "a.o").exists()


@pytest.mark.skipif(TOOLCHAIN.c_compiler() is None, reason="needs clang or zig of the pinned LLVM")
def test_a_database_without_sources_of_its_own_is_told(database, tmp_path):
    database.write_text(json.dumps(json.loads(database.read_text())[2:]))
    with pytest.raises(SourceError, match="no entry of a source below"):
        _build(database, tmp_path)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{", "compilation database"),
        ('[{"file": "a.c"}]', "directory"),
        ('[{"file": "a", "directory": "/"}]', "command"),
    ],
)
def test_files_that_are_no_database_are_told(tmp_path, text, told):
    (tmp_path / "db.json").write_text(text)
    with pytest.raises(ConfigError, match=told):
        SOURCE.discover({"path": str(tmp_path / "db.json")})


def test_the_version_follows_the_sources(database):
    (before,) = SOURCE.discover({"path": str(database)})
    (database.parents[1] / "a.c").write_text("int f(void) { return 3; }\n")
    assert SOURCE.discover({"path": str(database)})[0].version != before.version
