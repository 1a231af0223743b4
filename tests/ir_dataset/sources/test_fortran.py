"""A small source package becomes units, modules before their users or not."""

import shutil
import subprocess

import pytest

from ir_dataset.records import Fetched, License, Package
from ir_dataset.sources import find_source
from ir_dataset.sources.source import BuildLimits
from ir_dataset.store import Store
from ir_dataset.toolchain import Toolchain

SOURCE = find_source("fortran")
TOOLS = Toolchain.find()
FILES = {
    "debian/control": "Source: tiny\nMaintainer: A <a@b.c>\n\nPackage: tiny\nArchitecture: any\n",
    "debian/changelog": "tiny (1) unstable; urgency=low\n\n  * x\n\n -- A <a@b.c>  "
    "Thu, 01 Jan 1970 00:00:00 +0000\n",
    "debian/source/format": "3.0 (native)\n",
    "SRC/a.f90": "subroutine a(x)\n  use z\n  real(kind=wp) :: x\n  x = x + one\nend subroutine\n",
    "SRC/sub/b.f": "      SUBROUTINE B(N)\n      INCLUDE 'n.inc'\n      N = M\n      END\n",
    "SRC/sub/n.inc": "      INTEGER N, M\n      PARAMETER (M = 3)\n",
    "SRC/z.F90": "module z\n#define W 8\n  integer, parameter :: wp = W\n"
    "  real(kind=wp), parameter :: one = 1\nend module\n",
    "TESTING/left.f90": "program left\nend program\n",
    "SRC/bad.f90": "this is no Fortran\n",
}


@pytest.fixture
def fetched(tmp_path):
    if SOURCE.missing(TOOLS) is not None:
        pytest.skip(SOURCE.missing(TOOLS))
    if shutil.which("dpkg-source") is None:
        pytest.skip("dpkg-source makes the package: apt-get install dpkg-dev")
    for name, text in FILES.items():
        place = tmp_path / "tiny" / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text)
    subprocess.run(
        ["dpkg-source", "-q", "-b", "tiny"], cwd=tmp_path, check=True, capture_output=True
    )
    store = Store(tmp_path / "store")
    files = tuple(store.put_file(path) for path in sorted(tmp_path.glob("tiny_1.*")))
    package = Package(
        source="fortran",
        name="tiny",
        version="1",
        language="fortran",
        project="tiny",
        options={"directories": ["SRC"], "limit": 0},
    )
    return Fetched(package=package, files=files, license=License(kind="none")), store


def _build(fetched, store):
    with store.workspace("build") as workspace:
        return SOURCE.build(fetched, store, workspace, toolchain=TOOLS, limits=BuildLimits(jobs=2))


def test_each_file_is_a_unit_whatever_the_order(fetched):
    built = _build(*fetched)
    assert [unit.source_path for unit in built.units] == ["SRC/a.f90", "SRC/sub/b.f", "SRC/z.F90"]
    assert built.units[1].includes == ("SRC/sub/n.inc",)
    assert "-cpp" in built.units[2].arguments and "-cpp" not in built.units[0].arguments
    (failure,) = built.failures
    assert (failure.kind, failure.source_path) == ("compile", "SRC/bad.f90")
    for unit in built.units:
        assert unit.language == "fortran" and unit.compiler.startswith("flang 22.")
        assert fetched[1].get(unit.module)[:4] == b"BC\xc0\xde"
    assert _build(*fetched) == built
