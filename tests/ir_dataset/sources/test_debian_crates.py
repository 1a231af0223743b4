"""A crate in a Debian package becomes its modules; manifests, command lines and lists are read right."""

import shutil
import subprocess

import pytest

from ir_dataset.records import Fetched, License, Package
from ir_dataset.sources import debian_crates, find_source
from ir_dataset.sources.source import BuildLimits
from ir_dataset.store import Store
from ir_dataset.toolchain import Toolchain
from rewriter.errors import ConfigError, SourceError

SOURCE = find_source("debian-crates")
TOOLS = Toolchain.find()
CRATE = "usr/share/cargo/registry/tiny_one-0.1.2"
FILES = {
    "DEBIAN/control": "Package: librust-tiny-one-dev\nVersion: 0.1.2-1\nArchitecture: all\n"
    "Maintainer: A <a@b.c>\nDescription: x\n",
    f"{CRATE}/Cargo.toml": '[package]\nname = "tiny_one"\nversion = "0.1.2"\nedition = "2021"\n'
    'license = "MIT/Apache-2.0"\nbuild = "build.rs"\n'
    'repository = "https://github.com/someone/Tiny.git"\n',
    f"{CRATE}/LICENSE-MIT": "MIT License",
    f"{CRATE}/.cargo-checksum.json": '{"files": {}, "package": null}',
    f"{CRATE}/build.rs": "fn main() {}\n",
    f"{CRATE}/src/lib.rs": "mod part;\npub fn f(x: &[u32]) -> u32 { part::g(x[0]) }\n",
    f"{CRATE}/src/part.rs": "#[inline(never)]\npub fn g(x: u32) -> u32 { x.wrapping_mul(3) }\n",
}


@pytest.fixture
def archive(tmp_path):
    if shutil.which("dpkg-deb") is None:
        pytest.skip("dpkg-deb packs the crate: apt-get install dpkg")
    for name, text in FILES.items():
        place = tmp_path / "root" / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text)
    place = tmp_path / "librust-tiny-one-dev_0.1.2-1_all.deb"
    command = ["dpkg-deb", "--root-owner-group", "--build", str(tmp_path / "root"), str(place)]
    subprocess.run(command, check=True, capture_output=True)
    return place


def _build(archive, store):
    options = {"crate": "tiny_one", "crate_version": "0.1.2", "features": []}
    package = Package(
        source="debian-crates",
        name="tiny-one",
        version="0.1.2-1",
        language="rust",
        project="tiny",
        options=options,
    )
    fetched = Fetched(
        package=package, files=(store.put_file(archive),), license=License(kind="none")
    )
    with store.workspace("build") as workspace:
        return SOURCE.build(fetched, store, workspace, toolchain=TOOLS, limits=BuildLimits())


def test_the_library_and_its_build_script_are_units(archive, tmp_path):
    if SOURCE.missing(TOOLS) is not None:
        pytest.skip(SOURCE.missing(TOOLS))
    store = Store(tmp_path / "store")
    built = _build(archive, store)
    assert [(unit.source_path, unit.includes) for unit in built.units] == [
        ("build.rs", ()),
        ("src/lib.rs", ("src/part.rs",)),
    ]
    library = built.units[1]
    assert built.complete and library.opt_level_requested == "-O3"
    assert "-Cno-prepopulate-passes" in library.arguments
    data = store.get(library.module)
    assert data[:4] == b"BC\xc0\xde"
    assert b"rewriter-build" not in data and str(tmp_path).encode() not in data
    assert _build(archive, store) == built


def test_a_crate_that_does_not_compile_tells_the_compilers_words(archive, tmp_path):
    if SOURCE.missing(TOOLS) is not None:
        pytest.skip(SOURCE.missing(TOOLS))
    (tmp_path / "root" / CRATE / "src/part.rs").write_text("pub fn g( {\n")
    (tmp_path / "root" / CRATE / "build.rs").write_text("fn main( {\n")
    command = ["dpkg-deb", "--root-owner-group", "--build", str(tmp_path / "root"), str(archive)]
    subprocess.run(command, check=True, capture_output=True)
    with pytest.raises(SourceError, match="tiny-one: the build ended with status 101"):
        _build(archive, Store(tmp_path / "store"))


def test_the_manifest_and_licence_texts_are_read_from_the_package(archive):
    manifest, texts = debian_crates._read_crate(archive)
    assert manifest["package"]["name"] == "tiny_one"
    assert [path.name for path in texts] == ["LICENSE-MIT"]


@pytest.mark.parametrize(
    ("text", "expression"),
    [
        ("MIT/Apache-2.0", "MIT OR Apache-2.0"),
        ("MIT OR Apache-2.0", "MIT OR Apache-2.0"),
        ("Unlicense / MIT", "Unlicense OR MIT"),
        ("", ""),
    ],
)
def test_a_slash_means_or(text, expression):
    assert debian_crates._spdx(text) == expression


@pytest.mark.parametrize(
    ("url", "family"),
    [
        ("https://github.com/serde-rs/serde", "serde"),
        ("https://github.com/rust-random/rand/tree/master/rand_core", "rand"),
        ("https://gitlab.com/a/B.git", "b"),
        ("https://example.org/", ""),
        ("", ""),
    ],
)
def test_families_are_repositories(url, family):
    assert debian_crates._family(url) == family


def test_command_lines_lose_places(tmp_path):
    log = tmp_path / "log"
    log.write_text(
        "     Running `CARGO=/x rustc --crate-name a --edition=2021 src/lib.rs --emit=link -C"
        " opt-level=3 -C metadata=12 -C extra-filename=-ab12 --out-dir /t -L dependency=/t`\n"
    )
    assert debian_crates._commands(log) == {
        "-ab12": ("--crate-name", "a", "--edition=2021", "--emit=link", "-C", "opt-level=3")
    }


def test_modules_of_other_crates_have_no_sources(tmp_path):
    listed = tmp_path / "a.d"
    listed.write_text("/t/a.bc: /r/a-1.0/src/lib.rs /r/a-1.0/src/a\\ b.rs /t/out/made.rs\n\nx:\n")
    assert debian_crates._sources(listed, "a-1.0") == ["src/lib.rs", "src/a b.rs"]
    assert debian_crates._sources(listed, "b-1.0") == []


@pytest.mark.parametrize(
    "options",
    [
        {"packages": ["Serde_JSON"]},
        {"packages": ["a"], "features": {"b": ["c"]}},
        {"packages": "a"},
    ],
)
def test_options_that_are_not_allowed_are_errors(options):
    with pytest.raises(ConfigError):
        SOURCE.discover(options)
