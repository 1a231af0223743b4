"""A build in the sandbox with the shim: what it gave counts, ended or not."""

import shutil

import pytest

from ir_dataset.extract import sandbox
from ir_dataset.extract.build import HookedBuild
from ir_dataset.records import Fetched, License, Package
from ir_dataset.sources.source import BuildLimits
from ir_dataset.store import Store
from ir_dataset.toolchain import Toolchain
from rewriter.errors import SourceError

COMPILER = Toolchain.find().c_compiler()
REASON = sandbox._no_namespaces()

pytestmark = [
    pytest.mark.skipif(COMPILER is None, reason="needs clang or zig of the pinned LLVM"),
    pytest.mark.skipif(not shutil.which("gcc"), reason="needs gcc"),
    pytest.mark.skipif(bool(REASON), reason=f"namespaces are not allowed: {REASON}"),
]

FETCHED = Fetched(
    package=Package(source="test", name="p", version="1", language="c", project="p"),
    files=(),
    license=License(kind="none"),
)


def _run(place, text, **limits):
    store = Store(place / "store")
    workspace = place / "work"
    (workspace / "src").mkdir(parents=True)
    for name in ("a", "b"):
        (workspace / "src" / f"{name}.c").write_text(
            f"const char *{name}(void) {{ return __FILE__; }}\n"
        )
    build = HookedBuild.prepare(workspace, COMPILER, BuildLimits(**limits))
    return build.run(FETCHED, store, ["sh", "-c", text], "sh", {}), store


def test_a_build_that_ends_is_complete(tmp_path):
    text = (
        'gcc -O2 -c "$PWD/a.c" && gcc -c b.c -o b.o && echo int c\\; > c.c && gcc -c c.c && rm c.c'
    )
    result, store = _run(tmp_path, text)
    assert [unit.source_path for unit in result.units] == ["a.c", "b.c"]
    assert result.complete and result.failures == ()
    for unit in result.units:
        assert b"rewriter-build" not in store.get(unit.module)


def test_a_build_that_fails_keeps_what_it_gave(tmp_path):
    result, store = _run(tmp_path, "gcc -c a.c && echo telling && exit 2")
    assert [unit.source_path for unit in result.units] == ["a.c"]
    assert not result.complete
    assert [(one.kind, one.reason) for one in result.failures] == [
        ("build", "the build ended with status 2")
    ]
    assert store.get(result.log) == b"telling\n"


def test_a_build_that_is_stopped_keeps_what_it_gave(tmp_path):
    result, _ = _run(tmp_path, "gcc -c a.c; sleep 60", wall_s=2.5)
    assert [unit.source_path for unit in result.units] == ["a.c"]
    assert [one.kind for one in result.failures] == ["timeout"] and not result.complete


def test_a_build_that_gives_nothing_is_an_error(tmp_path):
    with pytest.raises(SourceError, match=r"p: the build ended with status 1: no rule"):
        _run(tmp_path, "echo no rule; exit 1")
