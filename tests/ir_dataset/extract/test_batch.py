"""Many compilations in one sandbox: retries, attempts, limits, and what is kept."""

import sys

import pytest

from ir_dataset.extract.batch import OUTPUT, Batch, BatchUnit
from ir_dataset.extract.sandbox import ISOLATION, Sandbox
from ir_dataset.records import Fetched, License, Package, TranslationUnit
from ir_dataset.sources.source import BuildLimits
from ir_dataset.store import Store
from rewriter.errors import SourceError

PACKAGE = Package(source="s", name="n", version="1", language="c", project="p")
FETCHED = Fetched(package=PACKAGE, files=(), license=License(kind="none"))


def _unit(path, *scripts, labels=()):
    unit = TranslationUnit(
        module="",
        size=0,
        language="c",
        source_path=path,
        source_sha256="0" * 64,
        compiler="c 1",
        llvm_version="22.1.8",
        arguments=("-c",),
        build_system="none",
    )
    attempts = tuple((sys.executable, "-c", script, OUTPUT) for script in scripts)
    return BatchUnit(unit=unit, attempts=attempts, labels=labels)


WRITE = "import sys; open(sys.argv[1], 'w').write({!r})"
FAIL = "raise SystemExit('error: no such module')"


@pytest.fixture
def build(tmp_path, monkeypatch):
    monkeypatch.setenv(ISOLATION, "none")
    store = Store(tmp_path / "store")

    def run(*units, rounds=1, **limits):
        workspace = tmp_path / "workspace"
        workspace.mkdir()
        given = BuildLimits(**{"wall_s": 30.0, "unit_s": 10.0, **limits})
        sandbox = Sandbox(workspace=workspace, wall_s=given.wall_s)
        batch = Batch(units=units, environment={}, rounds=rounds)
        return batch.run(FETCHED, store, sandbox, given), store

    return run


def test_units_are_stored_in_order_and_failures_say_why(build):
    result, store = build(
        _unit("b.c", WRITE.format("b")), _unit("a.c", WRITE.format("a")), _unit("c.c", FAIL)
    )
    assert [unit.source_path for unit in result.units] == ["a.c", "b.c"]
    assert [store.get(unit.module) for unit in result.units] == [b"a", b"b"]
    (failure,) = result.failures
    assert (failure.kind, failure.source_path) == ("compile", "c.c")
    assert "no such module" in failure.reason
    assert result.complete


def test_the_first_attempt_that_succeeds_counts_and_is_told(build):
    labels = (("first",), ("second",))
    result, store = build(_unit("a.c", FAIL, WRITE.format("x"), labels=labels))
    assert result.units[0].arguments == ("-c", "second")
    assert store.get(result.units[0].module) == b"x"
    assert not result.failures


def test_what_waits_for_a_module_is_tried_again_after_it(build):
    needs = "import pathlib, sys; pathlib.Path(sys.argv[1]).write_text(open('m.mod').read())"
    gives = "import time; time.sleep(0.2); open('m.mod', 'w').write('m');" + WRITE.format("m")
    result, _ = build(_unit("user.f", needs), _unit("z_module.f", gives), rounds=3, jobs=2)
    assert [unit.source_path for unit in result.units] == ["user.f", "z_module.f"]


def test_a_slow_unit_is_stopped_and_the_others_kept(build):
    slow = "import time; time.sleep(30)"
    result, _ = build(_unit("a.c", slow), _unit("b.c", WRITE.format("b")), unit_s=0.5)
    assert [unit.source_path for unit in result.units] == ["b.c"]
    assert result.failures[0].kind == "timeout"
    assert result.complete


def test_a_stopped_build_keeps_what_it_gave(build):
    slow = "import time; time.sleep(30)"
    result, _ = build(_unit("a.c", WRITE.format("a")), _unit("b.c", slow), wall_s=2.0)
    assert [unit.source_path for unit in result.units] == ["a.c"]
    assert not result.complete
    assert {failure.kind for failure in result.failures} == {"timeout"}


def test_a_batch_that_gives_nothing_raises(build):
    with pytest.raises(SourceError, match=r"nothing compiled: .*no such module"):
        build(_unit("a.c", FAIL))
