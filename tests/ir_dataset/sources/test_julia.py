"""Julia packages: what is read of Pkg and of images. Julia itself is a script here."""

import pytest

from ir_dataset.sources import find_source
from ir_dataset.sources.julia import members
from ir_dataset.sources.source import BuildLimits
from ir_dataset.store import Store
from ir_dataset.toolchain import Toolchain
from rewriter.errors import ConfigError, SourceError
from tests.ir_dataset.sources import fake_tools

SOURCE = find_source("julia")
PACKAGE = {
    "Project.toml": 'name = "Tiny"\nuuid = "00000000-0000-0000-0000-000000000001"\n',
    "LICENSE": "All rights reserved",
    "src/Tiny.jl": 'module Tiny\ninclude("more.jl")\nend\n',
    "src/more.jl": "f(x::Int) = 2x\n",
}
JULIA = """
import os, shutil, sys
from pathlib import Path

def archive(parts):
    names, data = b"", b""
    for name, content in parts:
        short = name.encode() + b"/"
        if len(short) > 16:
            short = b"/%d" % len(names)
            names += name.encode() + b"/\\n"
        data += member(short, content)
    return b"!<arch>\\n" + member(b"//", names) + data

def member(name, content):
    header = b"%-16s%-12d%-6d%-6d%-8o%-10d`\\n" % (name, 0, 0, 0, 0o644, len(content))
    return header + content + b"\\n" * (len(content) % 2)

arguments = sys.argv[1:]
if arguments == ["--version"]:
    print("julia version RELEASE")
    sys.exit()
if "-e" in arguments:
    print(os.path.dirname(os.path.realpath(__file__)), end="")
    sys.exit()
assert arguments[:3] == ["--startup-file=no", "--history-file=no", "--color=no"], arguments
depot = Path(os.environ["JULIA_DEPOT_PATH"].removesuffix(":"))
assert os.environ["JULIA_IMAGE_THREADS"] == "1"
if arguments[3] == "fetch.jl":
    name, version, path = arguments[4:]
    assert "Pkg.add" in open("fetch.jl").read()
    if name == "Absent":
        sys.exit("ERROR: The following package names could not be resolved: Absent")
    place = Path(path).absolute() if path else depot / "packages" / name / "abcde"
    if not path:
        (place / "src").mkdir(parents=True)
        (place / "src" / f"{name}.jl").write_text(f"module {name} end # {version}")
    Path("project", "Manifest.toml").write_text("x")
    print(f"rewriter-package\\t{version or '1.2.3'}\\t{place}")
else:
    project, script, name, output = arguments[3:]
    assert (project, script) == ("--project=project", "build.jl")
    assert "--output-unopt-bc $output" in open("build.jl").read()
    assert Path("project", "Manifest.toml").exists()
    place = Path("package") if Path("package").exists() else depot / "packages" / name / "abcde"
    text = (place / "src" / f"{name}.jl").read_bytes()
    print("rewriter-llvm 16.0.6")
    if b"silent" in text:
        sys.exit()
    parts = [("text_unopt#0.bc", b"BC\\xc0\\xde" + text), ("metadata_unopt#0.bc", b"BC\\xc0\\xdetable")]
    Path(output).write_bytes(archive(parts))
"""


def _tool(monkeypatch, release="1.11.2"):
    return fake_tools.on_path(monkeypatch, julia=JULIA.replace("RELEASE", release))


def test_a_package_of_the_registry_becomes_its_image(tmp_path, monkeypatch):
    store = Store(tmp_path / "store")
    with _tool(monkeypatch):
        newest, pinned = SOURCE.discover({"packages": ["JSON", "Dates@1.11"], "license": "MIT"})[
            ::-1
        ]
        built = fake_tools.fetch_and_build(SOURCE, newest, store, BuildLimits())
        dated = fake_tools.fetch_and_build(SOURCE, pinned, store, BuildLimits())
        assert built == fake_tools.fetch_and_build(SOURCE, newest, store, BuildLimits())
    assert (built.package.version, dated.package.version) == ("1.2.3", "1.11")
    (unit,) = built.units
    assert built.complete and built.license.expression == "MIT"
    assert (unit.source_path, unit.llvm_version) == ("src/JSON.jl", "16.0.6")
    assert unit.compiler == "julia 1.11.2" and unit.language == "julia"
    assert store.get(unit.module) == b"BC\xc0\xdemodule JSON end # "
    assert store.get(unit.source_sha256) == b"module JSON end # "


def test_a_package_of_ones_own_includes_its_files(tmp_path, monkeypatch):
    place = fake_tools.lay_out(tmp_path / "Tiny", PACKAGE)
    with _tool(monkeypatch):
        (package,) = SOURCE.discover({"path": str(place), "project": "tiny"})
        built = fake_tools.fetch_and_build(SOURCE, package, Store(tmp_path / "s"), BuildLimits())
    assert (package.name, package.project, package.url) == ("Tiny", "tiny", "")
    (unit,) = built.units
    assert unit.includes == ("src/more.jl",)
    assert built.license.kind == "none" and [one.name for one in built.license.files] == ["LICENSE"]


def test_what_gives_nothing_says_so(tmp_path, monkeypatch):
    files = {**PACKAGE, "src/Tiny.jl": "silent"}
    place = fake_tools.lay_out(tmp_path / "Tiny", files)
    store = Store(tmp_path / "s")
    with _tool(monkeypatch):
        (package,) = SOURCE.discover({"path": str(place)})
        with pytest.raises(SourceError, match="Tiny: Julia wrote no bitcode"):
            fake_tools.fetch_and_build(SOURCE, package, store, BuildLimits())
        (package,) = SOURCE.discover({"packages": ["Absent"]})
        with pytest.raises(SourceError, match="could not be resolved: Absent"):
            fake_tools.fetch_and_build(SOURCE, package, store, BuildLimits())


def test_an_older_julia_will_not_do(monkeypatch):
    with _tool(monkeypatch, "1.10.4"):
        assert SOURCE.missing(Toolchain.find()).startswith("julia is 1.10.4, needed is 1.11")
    with _tool(monkeypatch, "1.12.0"):
        assert SOURCE.missing(Toolchain.find()) is None
    told = SOURCE.missing(Toolchain(()))
    assert told == "julia is not installed: https://julialang.org/downloads"


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({}, "source.packages"),
        ({"packages": ["JSON; rm"]}, "JSON; rm"),
        ({"packages": ["JSON@new"]}, "Name@version"),
        ({"path": "nowhere"}, "source.path"),
        ({"packages": "JSON"}, "packages"),
    ],
)
def test_options_that_are_not_allowed_are_errors(options, told):
    with pytest.raises(ConfigError, match=told):
        SOURCE.discover(options)


def test_members_of_archives():
    def member(name, content):
        header = b"%-16s%-12d%-6d%-6d%-8o%-10d`\n" % (name, 0, 0, 0, 0, len(content))
        return header + content + b"\n" * (len(content) % 2)

    start = b"!<arch>\n"
    names = b"a_long_name_indeed.bc/\nanother_long_name.bc/\n"
    whole = start + member(b"/", b"index") + member(b"//", names) + member(b"/0", b"one")
    whole += member(b"/23", b"two!") + member(b"text_unopt#0.bc/", b"three")
    assert list(members(whole)) == [
        ("a_long_name_indeed.bc", b"one"),
        ("another_long_name.bc", b"two!"),
        ("text_unopt#0.bc", b"three"),
    ]
    with pytest.raises(SourceError, match="damaged"):
        list(members(whole[:-4]))
    with pytest.raises(SourceError, match="not an archive"):
        list(members(b"BC"))


def test_the_real_tool(tmp_path):
    reason = SOURCE.missing(Toolchain.find())
    if reason is not None:
        pytest.skip(reason)
    files = {**PACKAGE, "src/more.jl": "f(x::Int) = 2x\nprecompile(f, (Int,))\n"}
    (package,) = SOURCE.discover({"path": str(fake_tools.lay_out(tmp_path / "Tiny", files))})
    built = fake_tools.fetch_and_build(SOURCE, package, Store(tmp_path / "s"), BuildLimits())
    assert built.complete and built.units
