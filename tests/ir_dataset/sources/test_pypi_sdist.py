"""What is read of an sdist: requirements of its build, licence, and the archive itself."""

import io
import tarfile
import zipfile

import pytest

from ir_dataset.sources import archive, pypi_sdist
from ir_dataset.sources.pypi_sdist import PypiSdist
from ir_dataset.store import Store
from rewriter.errors import ConfigError, SourceError

FILES = {
    "p-1/PKG-INFO": b"Metadata-Version: 2.4\nName: p\nLicense-Expression: MIT OR Apache-2.0\n",
    "p-1/pyproject.toml": b'[build-system]\nrequires = ["setuptools>=70", "cython"]\n',
    "p-1/LICENSE.txt": b"MIT License",
    "p-1/p.egg-info/PKG-INFO": b"License-Expression: WRONG\n",
    "p-1/p.c": b"int f;\n",
}


def _sdist(path, files=FILES):
    with tarfile.open(path, "w:gz") as packed:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            packed.addfile(member, io.BytesIO(data))
    return path


def _zip(path):
    with zipfile.ZipFile(path, "w") as packed:
        for name, data in FILES.items():
            packed.writestr(name, data)
    return path


@pytest.mark.parametrize(("make", "name"), [(_sdist, "p-1.tar.gz"), (_zip, "p-1.zip")])
def test_an_archive_tells_its_licence_and_requirements(tmp_path, make, name):
    members = pypi_sdist._texts(make(tmp_path / name))
    assert set(members) == {"PKG-INFO", "pyproject.toml", "LICENSE.txt"}
    assert pypi_sdist._requires(members["pyproject.toml"]) == ["setuptools>=70", "cython"]
    license_ = pypi_sdist._license(members, Store(tmp_path / "store"))
    assert (license_.kind, license_.expression) == ("spdx", "MIT OR Apache-2.0")
    assert [file.name for file in license_.files] == ["LICENSE.txt"]


@pytest.mark.parametrize(
    ("classifiers", "expression"),
    [
        (["License :: OSI Approved :: MIT License"], "MIT"),
        (
            ["License :: OSI Approved", "License :: OSI Approved :: Apache Software License"],
            "Apache-2.0",
        ),
        (
            [
                "License :: OSI Approved :: MIT License",
                "License :: OSI Approved :: Mozilla Public License 2.0 (MPL 2.0)",
            ],
            "MIT AND MPL-2.0",
        ),
        (["License :: OSI Approved :: BSD License"], ""),
        (["License :: OSI Approved :: MIT License", "License :: Other/Proprietary License"], ""),
        (["Programming Language :: C"], ""),
    ],
)
def test_classifiers_count_where_they_name_one_licence(tmp_path, classifiers, expression):
    text = "".join(f"Classifier: {line}\n" for line in classifiers).encode()
    license_ = pypi_sdist._license({"PKG-INFO": text}, Store(tmp_path))
    assert license_.expression == expression
    assert license_.kind == ("spdx" if expression else "none")


def test_setuptools_builds_what_says_nothing():
    assert pypi_sdist._requires(b"") == ["setuptools>=40.8.0", "wheel"]
    with pytest.raises(SourceError, match=r"pyproject\.toml cannot be read"):
        pypi_sdist._requires(b"[build-system")


def test_archives_are_unpacked_in_place_and_not_beside_it(tmp_path):
    archive.unpack_source(_sdist(tmp_path / "p-1.tar.gz"), tmp_path)
    assert (tmp_path / "src/p.c").read_bytes() == b"int f;\n"
    (tmp_path / "other").mkdir()
    evil = _sdist(tmp_path / "evil.tar.gz", {"p-1/../../evil": b""})
    with pytest.raises(SourceError, match="cannot be unpacked"):
        archive.unpack_source(evil, tmp_path / "other")
    assert not (tmp_path / "evil").exists()


def test_names_may_be_pinned():
    one, two = PypiSdist().discover({"packages": ["Ruamel.Yaml==0.18", "a==1"]})
    assert (one.name, one.version) == ("ruamel-yaml", "0.18") and two.name == "a"
    with pytest.raises(ConfigError, match="name==version"):
        PypiSdist().discover({"packages": ["a>=1"]})
    with pytest.raises(ConfigError, match="packages"):
        PypiSdist().discover({})
