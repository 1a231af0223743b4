"""What is read of Debian's index, packages and licences; builds themselves need a network to begin."""

import io
import tarfile

import pytest

from ir_dataset.sources import apt, debian
from ir_dataset.sources.debian import Debian
from ir_dataset.store import Store
from rewriter.errors import ConfigError, SourceError

pytest.importorskip("debian", reason="pip install 'rewriter[ir]'")

INDEX = """\
Package: lua5.4
Binary: lua5.4
Version: 5.4.4-3
Homepage: https://lua.org
Files:
 00 1 lua5.4_5.4.4-3.dsc

Package: lua5.4
Binary: lua5.4
Version: 5.4.4-3+deb12u1
Homepage: https://lua.org

Package: zlib
Binary: zlib1g
Version: 1:1.2.13.dfsg-1
"""


class FakeApt:
    """Knows INDEX; of its versions the newest is gone from the archive."""

    def showsrc(self, names):
        return INDEX

    def download_source(self, name, version, into):
        if "deb12u1" in version:
            raise SourceError(f"{name}={version}: 404")
        (into / f"{name}.dsc").write_text(version)
        with tarfile.open(into / f"{name}.debian.tar.xz", "w:xz") as packed:
            text = b"Format: https://www.debian.org/doc/packaging-manuals/copyright-format/1.0/\n"
            member = tarfile.TarInfo("debian/copyright")
            member.size = len(text)
            packed.addfile(member, io.BytesIO(text))

    def install_build_dependencies(self, dsc):
        self.installed = dsc.name


@pytest.fixture
def archive(monkeypatch):
    fake = FakeApt()
    monkeypatch.setattr(debian, "Apt", lambda: fake)
    return fake


def test_packages_have_all_their_versions_the_newest_first(archive):
    lua, zlib = Debian().discover({"packages": ["zlib", "lua5.4"]})
    assert (lua.name, lua.version, lua.project) == ("lua5.4", "5.4.4-3+deb12u1", "lua")
    assert lua.options == {"versions": ["5.4.4-3+deb12u1", "5.4.4-3"]}
    assert lua.url == "https://lua.org" and zlib.url == ""


def test_a_table_says_what_the_name_does_not(archive):
    options = {"packages": ["zlib"], "package": {"zlib": {"language": "c++", "project": "z"}}}
    (package,) = Debian().discover(options)
    assert (package.language, package.project) == ("c++", "z")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({}, "packages"),
        ({"packages": ["zlib; rm"]}, "names of Debian source packages"),
        ({"packages": ["absent"]}, "absent"),
        ({"packages": ["zlib"], "package": {"lz4": {}}}, "lz4"),
        ({"packages": ["zlib"], "color": 1}, "color"),
        ({"packages": ["zlib"], "extract": "magic"}, "magic"),
    ],
)
def test_options_are_checked(archive, options, told):
    with pytest.raises(ConfigError, match=told):
        Debian().discover(options)


def test_a_version_that_is_gone_is_replaced_by_the_one_before(archive, tmp_path):
    (package,) = Debian().discover({"packages": ["lua5.4"]})[:1]
    store = Store(tmp_path / "store")
    workspace = tmp_path / "work"
    workspace.mkdir()
    fetched = Debian().fetch(package, store, workspace)
    assert fetched.package.version == "5.4.4-3"
    assert [file.name for file in fetched.files] == ["lua5.4.debian.tar.xz", "lua5.4.dsc"]
    assert fetched.license.kind == "dep5" and fetched.license.origin == "debian/copyright"
    assert store.get(fetched.license.files[0].sha256).startswith(b"Format:")
    assert archive.installed == "lua5.4.dsc"


def test_no_version_at_all_is_told(archive, tmp_path, monkeypatch):
    (package,) = Debian().discover({"packages": ["zlib"]})[-1:]

    def gone(name, version, into):
        raise SourceError("404")

    monkeypatch.setattr(archive, "download_source", gone)
    with pytest.raises(SourceError, match="no version can be had: 404"):
        Debian().fetch(package, Store(tmp_path / "store"), tmp_path)


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("lua5.4", "lua"),
        ("libpng1.6", "libpng"),
        ("postgresql-15", "postgresql"),
        ("lz4", "lz4"),
        ("sqlite3", "sqlite3"),
        ("c-ares", "c-ares"),
    ],
)
def test_versions_of_a_package_are_of_one_family(name, family):
    assert debian._project(name) == family


def test_archives_of_the_distribution_are_used_and_no_others(tmp_path):
    (tmp_path / "a.sources").write_text(
        "Types: deb\nURIs: http://deb.debian.org/debian\nSuites: stable stable-updates\n"
        "Components: main\nSigned-By: /usr/share/keyrings/k.gpg\n\n"
        "Types: deb\nURIs: https://deb.example.com/node\nSuites: x\nComponents: main\n"
    )
    (tmp_path / "b.list").write_text(
        "# deb http://old.debian.org/debian x main\n"
        "deb [arch=amd64] http://archive.ubuntu.com/ubuntu jammy main universe\n"
        "deb https://packages.example.com/apt sdk main\n"
    )
    key = "[signed-by=/usr/share/keyrings/k.gpg] "
    assert list(apt._deb822(tmp_path / "a.sources")) == [
        f"{kind} {key}http://deb.debian.org/debian {suite} main"
        for suite in ("stable", "stable-updates")
        for kind in ("deb", "deb-src")
    ]
    assert list(apt._one_line(tmp_path / "b.list")) == [
        f"{kind} [arch=amd64] http://archive.ubuntu.com/ubuntu jammy main universe"
        for kind in ("deb", "deb-src")
    ]
