"""The shim: the build sees its own compiler, whatever the second one does."""

import json
import os
import shutil
import subprocess

import pytest

from ir_dataset.extract import hook
from ir_dataset.extract.embed import unpack_embedded
from ir_dataset.extract.hook import install_hook
from ir_dataset.toolchain import CCompiler, Toolchain

pytestmark = pytest.mark.skipif(not shutil.which("gcc"), reason="needs gcc")

WRITER = Toolchain.find().c_compiler()


class Build:
    """A workspace with the shim, in which compilers are called by name."""

    def __init__(self, place, compiler=WRITER, unit_s=60.0, embed=False):
        self.place, self.tree, self.drop = place, place / "src", place / "drop"
        self.tree.mkdir()
        environment = install_hook(
            place, seen_as=place, compiler=compiler, unit_s=unit_s, embed=embed
        )
        self.environment = {**os.environ, **environment}

    def call(self, *command, cwd=None):
        return subprocess.run(
            command,
            cwd=cwd or self.tree,
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
        )

    def units(self):
        paths = sorted(self.drop.glob("*.json"))
        found = [json.loads(path.read_text()) for path in paths if "failed" not in path.name]
        return sorted(found, key=lambda unit: (unit["source_path"], unit["arguments"]))

    def failures(self):
        return [json.loads(path.read_text()) for path in sorted(self.drop.glob("*.failed.json"))]


@pytest.fixture
def build(tmp_path):
    if WRITER is None:
        pytest.skip("needs clang or zig of the pinned LLVM")
    found = Build(tmp_path)
    (found.tree / "a.c").write_text('#include "a.h"\nint f(int x) { return x + ONE; }\n')
    (found.tree / "a.h").write_text("#define ONE 1\n")
    return found


def test_objects_are_those_of_the_real_compiler(build):
    real = shutil.which("gcc", path="/usr/local/bin:/usr/bin:/bin")
    subprocess.run([real, "-O1", "-c", "a.c", "-o", "real.o"], cwd=build.tree, check=True)
    assert build.call("gcc", "-O1", "-c", "a.c", "-o", "a.o").returncode == 0
    assert (build.tree / "a.o").read_bytes() == (build.tree / "real.o").read_bytes()


def test_the_writer_builds_where_there_is_no_other_compiler(tmp_path, monkeypatch):
    if WRITER is None:
        pytest.skip("needs clang or zig of the pinned LLVM")
    monkeypatch.setattr(hook, "_compiler_names", list)
    bare = Build(tmp_path)
    (bare.tree / "a.cpp").write_text("int twice(int x) { return 2 * x; }\n")
    bare.environment["PATH"] = str(tmp_path / "shim")
    done = bare.call(str(tmp_path / "shim" / "g++"), "-O1", "-c", "a.cpp", "-o", "a.o")
    assert done.returncode == 0 and (bare.tree / "a.o").read_bytes()[:4] == b"\x7fELF"
    assert [unit["source_path"] for unit in bare.units()] == ["a.cpp"]
    assert "clang" in bare.call(str(tmp_path / "shim" / "cc"), "--version").stdout


def test_bitcode_is_unoptimised_and_described(build):
    build.call("gcc", "-O1", "-g", "-DX=2", "-Wall", "-MD", "-MF", "a.d", "-c", "a.c", "-o", "a.o")
    (unit,) = build.units()
    assert unit["arguments"] == ["-DX=2", "-O1"]
    assert unit["source_path"] == "a.c" and unit["includes"] == ["a.h"]
    assert unit["opt_level_requested"] == "-O1" and not unit["forced_o2"]
    (module,) = build.drop.glob("*.bc")
    assert module.read_bytes()[:4] == b"BC\xc0\xde"
    assert str(build.place).encode() not in module.read_bytes()
    llvm = pytest.importorskip("llvmlite.binding")
    assert "alloca" in str(llvm.parse_bitcode(module.read_bytes()))


@pytest.mark.parametrize("level", [(), ("-O0",), ("-O3", "-O0")])
def test_code_without_a_level_gets_one(build, level):
    build.call("gcc", *level, "-c", "a.c")
    (unit,) = build.units()
    assert unit["forced_o2"] and unit["arguments"][-1] == "-O2"
    llvm = pytest.importorskip("llvmlite.binding")
    (module,) = build.drop.glob("*.bc")
    assert "optnone" not in str(llvm.parse_bitcode(module.read_bytes()))


def test_statuses_and_messages_are_the_real_ones(build):
    (build.tree / "bad.c").write_text("int f( {\n")
    done = build.call("gcc", "-c", "bad.c")
    assert done.returncode == 1 and "bad.c:1" in done.stderr
    assert build.call("gcc", "--version").stdout.startswith("gcc")
    assert build.call("gcc", "-c", "absent.c").returncode == 1
    assert build.units() == build.failures() == []


def test_a_compiler_that_is_not_there_is_not_there(build):
    name = build.place / "shim" / "gcc-999"
    os.link(build.place / "shim" / "shim.py", name)
    assert build.call(str(name), "-c", "a.c").returncode == 127


def test_flags_that_clang_refuses_are_dropped(build):
    build.call("gcc", "-O2", "-fno-tree-loop-vectorize", "-fno-ivopts", "-c", "a.c")
    (unit,) = build.units()
    assert set(unit["dropped_flags"]) <= {"-fno-tree-loop-vectorize", "-fno-ivopts"}
    assert unit["dropped_flags"] and not set(unit["dropped_flags"]) & set(unit["arguments"])


def test_several_sources_and_a_link_are_several_units(build):
    (build.tree / "main.c").write_text("int f(int);\nint main(void) { return f(-1); }\n")
    assert build.call("cc", "-O2", "a.c", "main.c", "-lm", "-o", "program").returncode == 0
    assert build.call("./program").returncode == 0
    assert [unit["source_path"] for unit in build.units()] == ["a.c", "main.c"]


def test_equal_compilations_are_one_unit(build):
    for output in ("a.o", "b.o"):
        build.call("gcc", "-O2", "-c", "a.c", "-o", output)
    build.call("gcc", "-O2", "-fPIC", "-c", "a.c", "-o", "c.o")
    assert len(build.units()) == 2


@pytest.mark.parametrize(
    "path", ["conftest.c", "CMakeFiles/CMakeTmp/x.c", "meson-private/tmp1/t.c", "ztest7.c"]
)
def test_probes_are_left_out(build, path):
    place = build.tree / path
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text("int f;\n")
    assert build.call("gcc", "-c", path, "-o", "x.o").returncode == 0
    assert build.units() == []


def test_other_uses_of_the_compiler_are_left_out(build):
    (build.place / "outside.c").write_text("int f;\n")
    (build.tree / "s.s").write_text("")
    for command in (
        ["-E", "a.c"],
        ["-MM", "a.c"],
        ["-c", "s.s"],
        ["-c", "../outside.c"],
        ["-x", "c", "-c", "/dev/null", "-o", "x.o"],
    ):
        assert build.call("gcc", *command).returncode == 0
    assert build.units() == []


def test_standard_input_reaches_the_compiler_and_is_left_out(build):
    done = subprocess.run(
        ["gcc", "-x", "c", "-c", "-", "-o", "x.o"],
        input=b"int f;",
        cwd=build.tree,
        env=build.environment,
        check=False,
    )
    assert done.returncode == 0 and (build.tree / "x.o").exists()
    assert build.units() == []


def test_what_only_clang_refuses_is_a_failure(build):
    text = (
        "void g(void) { int n = 3; int f(int x) { return x + n; } f(1); }\n"  # GNU nested functions
    )
    (build.tree / "nested.c").write_text(text)
    assert build.call("gcc", "-c", "nested.c").returncode == 0
    (failure,) = build.failures()
    assert failure["kind"] == "compile" and "function definition" in failure["reason"]
    assert failure["source_path"] == "nested.c"


def test_old_c_that_gcc_accepts_gives_bitcode(build):
    (build.tree / "old.c").write_text("f(x) { char *p = x; return g(p); }\n")
    build.call("gcc", "-std=gnu89", "-Werror=format", "-c", "old.c")
    assert build.failures() == [] and len(build.units()) == 1


def test_response_files_and_languages_are_read(build):
    if not shutil.which("g++"):
        pytest.skip("needs g++")
    (build.tree / "flags").write_text('-DTEXT="a b" -std=c++17')
    (build.tree / "d.c").write_text("struct A { A() {} };\nA a;\n")
    assert build.call("g++", "@flags", "-c", "d.c").returncode == 0
    assert build.call("gcc", "-x", "c++", "-c", "d.c").returncode == 0
    assert [unit["language"] for unit in build.units()] == ["c++", "c++"]


def _fake(place, text):
    script = place / "writer"
    script.write_text(f"#!/bin/sh\n{text}\n")
    script.chmod(0o755)
    return CCompiler("clang", (str(script),), (str(script),), "22.1.8")


@pytest.mark.parametrize(
    ("text", "kind"), [("sleep 60", "timeout"), ("kill -9 $$", "compile"), ("exit 3", "compile")]
)
def test_a_writer_that_misbehaves_is_a_failure_and_the_build_goes_on(tmp_path, text, kind):
    build = Build(tmp_path, _fake(tmp_path, text), unit_s=0.5)
    (build.tree / "a.c").write_text("int f;\n")
    assert build.call("gcc", "-c", "a.c").returncode == 0
    assert (build.tree / "a.o").exists()
    assert [failure["kind"] for failure in build.failures()] == [kind]


def test_a_fault_of_the_shim_is_a_line_in_its_log(tmp_path):
    build = Build(tmp_path, _fake(tmp_path, "exit 0"))  # says that it wrote, and did not
    (build.tree / "a.c").write_text("int f;\n")
    assert build.call("gcc", "-c", "a.c").returncode == 0
    assert "FileNotFoundError" in (build.drop / "shim-errors.log").read_text()
    shutil.rmtree(build.drop)
    assert build.call("gcc", "-c", "a.c").returncode == 0


def test_objects_can_carry_the_bitcode_instead(tmp_path):
    clang = Toolchain.find().c_compiler()
    if clang is None or clang.kind != "clang":
        pytest.skip("needs clang of the pinned LLVM")
    build = Build(tmp_path, clang, embed=True)
    (build.tree / "a.c").write_text("int f(int x) { return x; }\n")
    (build.tree / "s.s").write_text("")
    for command in (["-O2", "-c", "a.c", "-o", "a.o"], ["-c", "s.s"], ["-O1", "-c", "a.c"]):
        assert build.call("gcc", *command).returncode == 0
    (build.drop / f"{'0' * 32}.o").write_bytes(b"no object")
    unpack_embedded(build.drop)
    units = build.units()
    assert [unit["opt_level_requested"] for unit in units] == ["-O1", "-O2"]
    modules = [path.read_bytes() for path in build.drop.glob("*.bc")]
    assert len(modules) == 2 and all(module[:4] == b"BC\xc0\xde" for module in modules)
    assert list(build.drop.glob("*.o")) == []


def test_starting_it_is_cheap(build):
    text = (build.place / "shim" / "gcc").read_text()
    assert text.splitlines()[0].endswith(" -IS")
    top = [line for line in text.splitlines() if line.startswith(("import ", "from "))]
    assert top == ["from __future__ import annotations", "import os", "import sys"]
