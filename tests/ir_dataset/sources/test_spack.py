"""Spack packages: the shim stands for the compiler. Spack itself is a script; gcc and clang are real."""

import shutil

import pytest

from ir_dataset.sources import find_source
from ir_dataset.sources.source import BuildLimits
from ir_dataset.sources.spack import licenses
from ir_dataset.store import Store
from ir_dataset.toolchain import Toolchain
from rewriter.errors import ConfigError, SourceError
from tests.ir_dataset.sources import fake_tools

SOURCE = find_source("spack")
COMPILERS = pytest.mark.skipif(
    Toolchain.find().c_compiler() is None or not shutil.which("g++"),
    reason="needs gcc, and clang or zig of the pinned LLVM",
)
INFO = """\
AutotoolsPackage:   squares

Description:
    Squares of numbers.

Homepage: https://squares.example.org

Licenses:
    MIT    @2:
    Zlib
"""
SPACK = '''
import json, os, subprocess, sys
from pathlib import Path

arguments = sys.argv[1:]
if arguments == ["--version"]:
    print("RELEASE (0123abcd)")
    sys.exit()
assert os.environ["SPACK_DISABLE_LOCAL_CONFIG"] == "1"
if arguments[0] == "info":
    print("""INFO""")
    sys.exit()
settings = []
while arguments[0] in ("-c", "-e"):
    if arguments[0] == "-c":
        settings.append(arguments[1])
    place, arguments = Path(arguments[1]), arguments[2:]
told = json.loads((place / "spack.yaml").read_text())["spack"]
(spec,) = told["specs"]
name = spec.partition("@")[0]
external = told["packages"]["gcc"]["externals"][0]
lock = place / "spack.lock"
if arguments == ["concretize", "--fresh"]:
    if name == "absent":
        sys.exit("==> Error: Package 'absent' not found.")
    assert Path(external["extra_attributes"]["compilers"]["c"]).exists()
    specs = {"h1": {"name": name, "version": "2.1"}, "h2": {"name": "gcc", "external": external}}
    lock.write_text(json.dumps({"concrete_specs": specs}))
elif arguments[:3] == ["mirror", "create", "-a"]:
    mirror = Path(arguments[4], name)
    mirror.mkdir(parents=True)
    (mirror / "square.c").write_text("#include <dep.h>\\\\nint square(int x) { return x * x + DEP; }")
    (mirror / "dep.c").write_text("int dep(void) { return 3; }")
    recipes = Path(os.environ["SPACK_USER_CACHE_PATH"], "package_repos")
    recipes.mkdir(parents=True)
    (recipes / "squares.py").write_text("license('MIT')")
elif arguments[0] == "install":
    assert "--only-concrete" in arguments
    specs = json.loads(lock.read_text())["concrete_specs"]
    compiler = specs["h2"]["external"]["extra_attributes"]["compilers"]["c"]
    assert Path(os.environ["SPACK_USER_CACHE_PATH"], "package_repos", "squares.py").exists()
    mirror = Path(told["mirrors"]["fetched"].removeprefix("file://"), name)
    prefix = Path(told["config"]["install_tree"]["root"], "dep-1-h3", "include")
    if "dependencies" in arguments:
        (setting,) = settings
        stage = Path(setting.partition("[")[2].rstrip("]"), "builder", "spack-stage-dep-1-h3")
        part = "dep.c"
        prefix.mkdir(parents=True)
        (prefix / "dep.h").write_text("#define DEP 3\\\\n")
    else:
        assert "--keep-stage" in arguments and not settings
        stage = Path(told["config"]["build_stage"][0], "builder", f"spack-stage-{name}-2.1-h1")
        part = "square.c"
    source = stage / "spack-src" / "lib"
    source.mkdir(parents=True)
    text = (mirror / part).read_text()
    (source / part).write_text("int broken(" if name == "broken" else text)
    command = [compiler, "-O2", f"-I{prefix}", "-c", f"lib/{part}", "-o", "out.o"]
    sys.exit(subprocess.run(command, cwd=stage / "spack-src").returncode)
else:
    sys.exit(f"unknown {arguments}")
'''


def _tool(monkeypatch, release="1.0.2"):
    text = SPACK.replace("\\\\n", "\\n").replace("RELEASE", release).replace("INFO", INFO)
    return fake_tools.on_path(monkeypatch, spack=text)


@COMPILERS
def test_the_packages_own_units_are_kept(tmp_path, monkeypatch):
    store = Store(tmp_path / "store")
    with _tool(monkeypatch):
        (package,) = SOURCE.discover({"packages": ["squares@2.1 +fast"]})
        assert (package.name, package.version) == ("squares", "newest")
        built = fake_tools.fetch_and_build(SOURCE, package, store, BuildLimits())
        assert built == fake_tools.fetch_and_build(SOURCE, package, store, BuildLimits())
    assert (built.package.version, built.package.url) == ("2.1", "https://squares.example.org")
    assert built.license.expression == "MIT AND Zlib" and built.license.origin == "package.py"
    assert built.complete and built.failures == ()
    (unit,) = built.units
    assert (unit.source_path, unit.language) == ("lib/square.c", "c")
    assert unit.includes == ("/usr/include/spack/dep-1-h3/include/dep.h",)
    assert unit.opt_level_requested == "-O2" and unit.build_system == "spack"
    assert store.get(unit.module)[:4] == b"BC\xc0\xde"


@COMPILERS
def test_what_spack_says_is_told(tmp_path, monkeypatch):
    store = Store(tmp_path / "store")
    with _tool(monkeypatch):
        absent, broken = SOURCE.discover({"packages": ["broken", "absent"], "license": "MIT"})
        with pytest.raises(SourceError, match=r"absent: spack .*concretize.* not found"):
            fake_tools.fetch_and_build(SOURCE, absent, store, BuildLimits())
        with pytest.raises(SourceError, match="broken: the build ended with status 1"):
            fake_tools.fetch_and_build(SOURCE, broken, store, BuildLimits())


@COMPILERS
def test_an_older_spack_will_not_do(monkeypatch):
    with _tool(monkeypatch, "0.23.1"):
        assert SOURCE.missing(Toolchain.find()).startswith("spack is 0.23.1, needed is 1.0")
    with _tool(monkeypatch):
        assert SOURCE.missing(Toolchain.find()) is None


def test_without_spack_it_says_where_to_get_it():
    assert SOURCE.missing(Toolchain(())) == "spack is not installed: https://spack.io"


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({}, "packages"),
        ({"packages": ["Zlib"]}, "Zlib"),
        ({"packages": ["zlib; rm"]}, "zlib; rm"),
        ({"packages": ["zlib"], "color": 1}, "color"),
    ],
)
def test_options_that_are_not_allowed_are_errors(options, told):
    with pytest.raises(ConfigError, match=told):
        SOURCE.discover(options)


@pytest.mark.parametrize(
    ("lines", "expression"),
    [
        ("    Zlib\n", "Zlib"),
        ("    Apache-2.0 OR MIT\n", "Apache-2.0 OR MIT"),
        (
            "    Apache-2.0 OR MIT    @1:\n    GPL-2.0-only         @:0\n",
            "(Apache-2.0 OR MIT) AND GPL-2.0-only",
        ),
        ("    None\n", ""),
        ("", ""),
    ],
)
def test_licences_of_recipes(lines, expression):
    assert licenses(f"Homepage: https://x\n\nLicenses: \n{lines}\nOther:\n    x\n") == expression
    assert licenses("Homepage: https://x\n") == ""


@COMPILERS
def test_the_real_tool(tmp_path):
    reason = SOURCE.missing(Toolchain.find())
    if reason is not None:
        pytest.skip(reason)
    (package,) = SOURCE.discover({"packages": ["zlib"]})
    built = fake_tools.fetch_and_build(SOURCE, package, Store(tmp_path / "s"), BuildLimits())
    assert built.complete and built.units
