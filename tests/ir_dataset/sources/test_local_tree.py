"""A directory of sources and IR becomes units, with clang and LLVM or with what pip brings."""

import pytest

from ir_dataset.records import encode
from ir_dataset.sources import find_source
from ir_dataset.sources.source import BuildLimits
from ir_dataset.store import Store
from ir_dataset.toolchain import Toolchain
from rewriter.errors import ConfigError, SourceError

SOURCE = find_source("local-tree")
EVERYTHING = Toolchain.find()
PIP = Toolchain(tuple(tool for tool in EVERYTHING.paths if tool[0] in ("zig", "llvmlite")))
APT = Toolchain(tuple(tool for tool in EVERYTHING.paths if tool[0] not in ("zig", "llvmlite")))
MODULE = "define i32 @f(i32 %x) {\n  %y = add i32 %x, 1\n  ret i32 %y\n}\n"


@pytest.fixture
def tree(tmp_path):
    place = tmp_path / "project"
    (place / "sub").mkdir(parents=True)
    (place / "LICENSE").write_text("MIT License")
    (place / "a.c").write_text('#include "sub/a.h"\nint f(int x) { return x + ONE; }\n')
    (place / "sub/a.h").write_text("#define ONE 1\n")
    (place / "sub/b.cpp").write_text(
        "template <class T> T g(T x) { return x; }\nint h() { return g(1); }\n"
    )
    (place / "m.ll").write_text(MODULE)
    return place


def _build(tree, place, toolchain, **options):
    store = Store(place)
    (package,) = SOURCE.discover({"path": str(tree), **options})
    with store.workspace("fetch") as workspace:
        fetched = SOURCE.fetch(package, store, workspace)
    with store.workspace("build") as workspace:
        built = SOURCE.build(fetched, store, workspace, toolchain=toolchain, limits=BuildLimits())
    return built, store


@pytest.mark.parametrize("toolchain", [PIP, APT], ids=["pip", "apt"])
def test_each_file_is_a_unit(tree, tmp_path, toolchain):
    if toolchain.c_compiler() is None or not (
        toolchain.reads("llvmlite") or toolchain.reads("llvm-as")
    ):
        pytest.skip("needs a C compiler and a reader of the pinned LLVM")
    built, store = _build(tree, tmp_path / "store", toolchain)
    assert [(unit.source_path, unit.language) for unit in built.units] == [
        ("a.c", "c"),
        ("m.ll", "c"),
        ("sub/b.cpp", "c++"),
    ]
    assert built.units[0].includes == ("sub/a.h",) and built.units[0].arguments == ("-O2",)
    assert built.units[0].compiler == toolchain.need_c_compiler().label
    assert built.complete and built.failures == ()
    for unit in built.units:
        assert store.get(unit.module)[:4] == b"BC\xc0\xde"
        assert str(tmp_path).encode() not in store.get(unit.module)


def test_results_do_not_depend_on_the_store(tree, tmp_path):
    if EVERYTHING.c_compiler() is None or not EVERYTHING.reads("llvmlite"):
        pytest.skip("needs a C compiler and llvmlite of the pinned LLVM")
    (tree / "path.c").write_text("const char *f(void) { return __FILE__; }\n")
    first, _ = _build(tree, tmp_path / "one", EVERYTHING)
    second, _ = _build(tree, tmp_path / "other/place", EVERYTHING)
    assert encode(first) == encode(second)


def test_files_that_are_no_ir_are_failures(tree, tmp_path):
    if not EVERYTHING.reads("llvmlite"):
        pytest.skip("needs llvmlite")
    for name in ("a.c", "sub/b.cpp"):
        (tree / name).unlink()
    (tree / "bad.ll").write_text("define i32 @f( {\n")
    only = Toolchain(tuple(tool for tool in EVERYTHING.paths if tool[0] == "llvmlite"))
    built, _ = _build(tree, tmp_path / "store", only, optimized=True, language="rust")
    assert [unit.source_path for unit in built.units] == ["m.ll"]
    assert built.units[0].optimized and built.units[0].language == "rust"
    (failure,) = built.failures
    assert failure.source_path == "bad.ll" and "parsing error" in failure.reason


def test_the_licence_is_the_configurations_or_the_texts(tree, tmp_path):
    store = Store(tmp_path / "store")
    (package,) = SOURCE.discover({"path": str(tree)})
    fetched = SOURCE.fetch(package, store, tmp_path)
    assert (fetched.license.kind, [file.name for file in fetched.license.files]) == (
        "none",
        ["LICENSE"],
    )
    (package,) = SOURCE.discover({"path": str(tree), "license": "MIT"})
    stated = SOURCE.fetch(package, store, tmp_path).license
    assert (stated.kind, stated.expression, stated.origin) == ("spdx", "MIT", "configuration")


def test_the_version_follows_the_files(tree):
    (before,) = SOURCE.discover({"path": str(tree)})
    assert before.name == before.project == "project"
    assert SOURCE.discover({"path": str(tree)}) == [before]
    (tree / "sub/a.h").write_text("#define ONE 2\n")
    assert SOURCE.discover({"path": str(tree)})[0].version != before.version


def test_what_cannot_be_is_told(tmp_path, tree):
    with pytest.raises(ConfigError, match="a directory"):
        SOURCE.discover({"path": str(tmp_path / "absent")})
    with pytest.raises(ConfigError, match="colour"):
        SOURCE.discover({"path": str(tree), "colour": "red"})
    (tmp_path / "empty").mkdir()
    with pytest.raises(SourceError, match=r"no unit \(no \.c"):
        _build(tmp_path / "empty", tmp_path / "store", EVERYTHING)
    assert "pip install" in SOURCE.missing(Toolchain(()))
