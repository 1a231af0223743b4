"""Swift packages: what is read of SwiftPM and its objects. SwiftPM itself is a script here."""

import hashlib
import tarfile
from pathlib import Path

import pytest

from ir_dataset.extract.embed import read_sections
from ir_dataset.records import StoredFile
from ir_dataset.sources import find_source, swift
from ir_dataset.sources.source import BuildLimits
from ir_dataset.store import Store
from ir_dataset.toolchain import Toolchain
from rewriter.errors import ConfigError, SourceError
from tests.ir_dataset.sources import fake_tools

SOURCE = find_source("swift")
MANIFEST = "// swift-tools-version:5.9\nimport PackageDescription\n"
FILES = {
    "Package.swift": MANIFEST,
    "LICENSE": "MIT",
    "Sources/Shapes/square.swift": "public func area(x: Int) -> Int { return x * x }\n",
    "Sources/Shapes/more/circle.swift": "public func area(r: Int) -> Int { return 3 * r * r }\n",
    "Tests/ShapesTests/square.swift": "func test() {}\n",
}
SWIFT = (
    fake_tools.ELF
    + """
import json, os, sys
arguments = sys.argv[1:]
if arguments == ["--version"]:
    print("swift-driver version: 1.115.1 Swift version 6.0.3 (swift-6.0.3-RELEASE)")
elif arguments[0] == "package" and arguments[-1] == "dump-package":
    depends = "depends" in open("Package.swift").read()
    print("warning: something\\n" + json.dumps({"name": "p", "dependencies": [1] if depends else []}))
elif arguments == ["package", "resolve"]:
    os.makedirs(".build/checkouts/other/Sources/Other")
    open(".build/checkouts/other/Sources/Other/other.swift", "w").write("let x = 1")
    open("Package.resolved", "w").write("{}")
elif arguments[0] == "build":
    flags = [arguments[at + 1] for at, one in enumerate(arguments) if one == "-Xswiftc"]
    assert flags[:2] == ["-Onone", "-embed-bitcode"], flags
    assert flags[3].endswith("/src=."), flags
    assert "--disable-sandbox" in arguments
    roots = [("Shapes", "Sources/Shapes"), ("Other", ".build/checkouts/other/Sources/Other")]
    for target, root in roots:
        for folder, _, names in os.walk(root):
            for name in names:
                text = open(os.path.join(folder, name), "rb").read()
                if b"broken" in text:
                    sys.exit("square.swift:1:1: error: broken")
                relative = os.path.relpath(os.path.join(folder, name), root)
                place = f".build/x86_64-unknown-linux-gnu/release/{target}.build/{relative}.o"
                os.makedirs(os.path.dirname(place), exist_ok=True)
                section = "__LLVM,__bitcode" if b"plain" not in text else ".text"
                open(place, "wb").write(elf(section, b"BC\\xc0\\xde" + text))
else:
    sys.exit(f"unknown {arguments}")
"""
)


def _build(place, store):
    (package,) = SOURCE.discover({"path": str(place)})
    return fake_tools.fetch_and_build(SOURCE, package, store, BuildLimits())


def test_objects_of_the_packages_own_files_are_units(tmp_path, monkeypatch):
    place = fake_tools.lay_out(tmp_path / "shapes", FILES)
    with fake_tools.on_path(monkeypatch, swift=SWIFT):
        store = Store(tmp_path / "store")
        built = _build(place, store)
        assert built == _build(place, store)
    assert built.complete and built.failures == ()
    assert [unit.source_path for unit in built.units] == [
        "Sources/Shapes/more/circle.swift",
        "Sources/Shapes/square.swift",
    ]
    square = built.units[1]
    text = FILES["Sources/Shapes/square.swift"].encode()
    assert store.get(square.module) == b"BC\xc0\xde" + text
    assert square.source_sha256 == hashlib.sha256(text).hexdigest()
    assert square.compiler == "swiftc 6.0.3" and square.language == "swift"


def test_dependencies_are_fetched_and_are_no_units(tmp_path, monkeypatch):
    files = {**FILES, "Package.swift": MANIFEST + "// depends\n"}
    with fake_tools.on_path(monkeypatch, swift=SWIFT):
        built = _build(fake_tools.lay_out(tmp_path / "shapes", files), Store(tmp_path / "store"))
    assert len(built.units) == 2


def test_an_object_without_bitcode_is_a_failure(tmp_path, monkeypatch):
    files = {**FILES, "Sources/Shapes/square.swift": "// plain"}
    with fake_tools.on_path(monkeypatch, swift=SWIFT):
        built = _build(fake_tools.lay_out(tmp_path / "shapes", files), Store(tmp_path / "store"))
    (failure,) = built.failures
    assert failure.source_path == "Sources/Shapes/square.swift"
    assert failure.reason == "no bitcode in the object" and len(built.units) == 1


def test_what_the_compiler_says_is_told(tmp_path, monkeypatch):
    files = {**FILES, "Sources/Shapes/square.swift": "broken"}
    del files["Sources/Shapes/more/circle.swift"]
    told = pytest.raises(SourceError, match=r"status 1: square\.swift:1:1: error: broken")
    with fake_tools.on_path(monkeypatch, swift=SWIFT), told:
        _build(fake_tools.lay_out(tmp_path / "shapes", files), Store(tmp_path / "store"))


def test_archives_are_checked_and_unpacked(tmp_path, monkeypatch):
    place = fake_tools.lay_out(tmp_path / "shapes-1.0", FILES)
    archive = tmp_path / "shapes-1.0.tar.gz"
    with tarfile.open(archive, "w:gz") as packed:
        packed.add(place, "shapes-1.0")
    sha = hashlib.sha256(archive.read_bytes()).hexdigest()
    options = {"url": archive.as_uri(), "sha256": sha, "license": "MIT", "project": "shapes"}
    with fake_tools.on_path(monkeypatch, swift=SWIFT):
        (package,) = SOURCE.discover(options)
        assert (package.name, package.version) == ("shapes-1.0", sha[:16])
        built = fake_tools.fetch_and_build(SOURCE, package, Store(tmp_path / "s"), BuildLimits())
        assert len(built.units) == 2 and built.license.expression == "MIT"
        (other,) = SOURCE.discover({**options, "sha256": "0" * 64})
        with pytest.raises(SourceError, match="wanted is 0000"):
            SOURCE.fetch(other, Store(tmp_path / "s"), tmp_path)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({}, "source.path"),
        ({"path": "nowhere"}, "nowhere"),
        ({"path": "nowhere", "url": "https://x/y.zip"}, "source.path"),
        ({"url": "ftp://x/y.zip", "sha256": "0" * 64}, "source.url"),
        ({"url": "https://x/y.zip", "sha256": "12"}, "source.sha256"),
        ({"path": 1}, "path"),
    ],
)
def test_options_that_are_not_allowed_are_errors(options, told):
    with pytest.raises(ConfigError, match=told):
        SOURCE.discover(options)


def test_without_swift_it_says_where_to_get_it():
    assert SOURCE.missing(Toolchain(())) == "swift is not installed: https://swift.org/install"


def test_known_licence_texts_are_named(tmp_path):
    store = Store(tmp_path)

    def stored(text):
        return [StoredFile(name="LICENSE", sha256=store.put(text), size=len(text))]

    known = stored((Path(__file__).parents[3] / "LICENSE").read_bytes())
    found = swift.package_license("", known, store)
    assert (found.kind, found.expression, found.origin) == ("spdx", "Apache-2.0", "LICENSE")
    more = store.get(known[0].sha256) + b"\nRuntime Library Exception"
    other = store.get(known[0].sha256).replace(b"perpetual", b"brief")
    for text in (more, other):
        assert swift.package_license("", stored(text), store).kind == "none"
    assert swift.package_license("", stored(b"All rights reserved"), store).kind == "none"
    unknown = StoredFile(name="COPYING", sha256=store.put(b"another"), size=7)
    notice = StoredFile(name="NOTICE.txt", sha256=store.put(b"another"), size=7)
    assert swift.package_license("", [*known, unknown], store).kind == "none"
    assert swift.package_license("", [*known, notice], store).expression == "Apache-2.0"
    assert swift.package_license("ISC", known, store).expression == "ISC"
    assert swift.package_license("", [], store).kind == "none"


def test_a_section_is_read_whatever_its_name():
    values = {}
    exec(fake_tools.ELF, values)
    for name in ("__LLVM,__bitcode", ".llvmbc"):
        assert read_sections(values["elf"](name, b"content")) == {name: b"content"}
    assert read_sections(values["elf"](".text", b"content")) == {}


def test_the_real_tool(tmp_path):
    reason = SOURCE.missing(Toolchain.find())
    if reason is not None:
        pytest.skip(reason)
    targets = 'let package = Package(name: "shapes", targets: [.target(name: "Shapes")])\n'
    files = {**FILES, "Package.swift": MANIFEST + targets}
    del files["Tests/ShapesTests/square.swift"]
    built = _build(fake_tools.lay_out(tmp_path / "shapes", files), Store(tmp_path / "store"))
    assert len(built.units) == 2 and built.complete
