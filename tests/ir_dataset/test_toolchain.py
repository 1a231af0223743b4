"""Which tools are found, of which LLVM, and what is said of those that are not."""

import pickle

import pytest

from ir_dataset.toolchain import LLVM_BIN, LLVM_MAJOR, Toolchain
from rewriter.errors import ConfigError, SourceError


@pytest.fixture
def tools(tmp_path, monkeypatch):
    """A directory of tools that goes before all others; `add(name, what --version prints)`."""
    monkeypatch.setenv(LLVM_BIN, str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path / "nothing") + ":/bin:/usr/bin")
    Toolchain.find.cache_clear()

    def add(name, text):
        script = tmp_path / name
        script.write_text(f"#!/bin/sh\necho '{text}'\n")
        script.chmod(0o755)
        Toolchain.find.cache_clear()
        return script

    yield add
    Toolchain.find.cache_clear()


def test_the_directory_of_the_environment_goes_first(tools):
    script = tools("opt", "LLVM (http://llvm.org/):\n  LLVM version 22.9.1")
    toolchain = Toolchain.find()
    assert toolchain.get("opt") == script
    assert toolchain.llvm_version("opt") == "22.9.1" and toolchain.reads("opt")


def test_names_with_the_version_go_first(tools):
    tools("llc", "LLVM version 14.0.6")
    script = tools(f"llc-{LLVM_MAJOR}", "LLVM version 22.1.8")
    assert Toolchain.find().get("llc") == script


def test_other_generations_are_told_and_not_used(tools):
    tools("clang", "Debian clang version 19.1.7")
    toolchain = Toolchain.find()
    assert any(text.startswith("clang is LLVM 19.1.7, wanted is 22") for text in toolchain.mixed())
    compiler = toolchain.c_compiler()
    assert compiler is None or compiler.kind == "zig"
    rows = {row.name: row for row in toolchain.matrix()}
    assert rows["clang"].status == "mixed" and rows["clang"].llvm_version == "19.1.7"


def test_clang_goes_before_zig(tools):
    script = tools("clang", "clang version 22.1.0")
    compiler = Toolchain.find().need_c_compiler()
    assert compiler.c == (str(script),) and compiler.label == "clang 22.1.0"


def test_rustc_tells_two_versions(tools):
    script = tools("rustc", "rustc 1.95.0\nrelease: 1.95.0\nLLVM version: 22.1.2")
    toolchain = Toolchain((("rustc", str(script)),))
    assert toolchain.llvm_version("rustc") == "22.1.2" and toolchain.why_not("rustc") is None


def test_a_tool_of_another_generation_says_which(tools):
    script = tools("flang", "flang version 19.1.7")
    toolchain = Toolchain((("flang", str(script)),))
    assert toolchain.why_absent("flang") is None
    assert toolchain.why_not("flang") == f"{script} is of LLVM 19.1.7: apt-get install flang-22"


def test_absent_tools_say_how_to_get_them():
    nothing = Toolchain(())
    assert nothing.get("opt") is None and nothing.llvm_version("opt") == ""
    with pytest.raises(SourceError, match="flang is not installed: apt-get install flang-22"):
        nothing.need("flang")
    assert (
        nothing.why_absent("flang")
        == nothing.why_not("flang")
        == ("flang is not installed: apt-get install flang-22")
    )
    with pytest.raises(SourceError, match=r"clang-22.*pip install 'rewriter\[zig\]'"):
        nothing.need_c_compiler()
    assert {row.status for row in nothing.matrix()} == {"absent"}
    assert all(row.install for row in nothing.matrix())
    assert nothing.mixed() == ()


def test_names_and_directories_are_checked(monkeypatch, tmp_path):
    with pytest.raises(ConfigError, match="clang, "):
        Toolchain(()).get("gcc")
    monkeypatch.setenv(LLVM_BIN, str(tmp_path / "absent"))
    Toolchain.find.cache_clear()
    with pytest.raises(ConfigError, match=LLVM_BIN):
        Toolchain.find()


def test_the_fingerprint_follows_versions_not_places(tools):
    first = Toolchain((("opt", str(tools("a", "LLVM version 22.1.8"))),))
    second = Toolchain((("opt", str(tools("b", "LLVM version 22.1.8"))),))
    third = Toolchain((("opt", str(tools("c", "LLVM version 22.1.9"))),))
    assert first.fingerprint() == second.fingerprint() != third.fingerprint()


def test_it_travels_between_processes():
    found = Toolchain.find()
    assert pickle.loads(pickle.dumps(found)) == found
