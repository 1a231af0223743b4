import pytest

pytest.importorskip("msgspec", reason="pip install 'rewriter[ir]'")
pytest.importorskip("license_expression", reason="pip install 'rewriter[ir]'")
pytest.importorskip("debian", reason="pip install 'rewriter[ir]'")

from ir_dataset.license import decide
from ir_dataset.license_terms import evaluate, normalise
from ir_dataset.license_texts import recognise
from ir_dataset.records import BuildResult, License, Package, StoredFile, TranslationUnit
from ir_dataset.store import Store

ISC = """Permission to use, copy, modify, and/or distribute this software for any
 purpose with or without fee is hereby granted, provided that the above
 copyright notice and this permission notice appear in all copies.
 .
 THE SOFTWARE IS PROVIDED "AS IS" AND THE AUTHOR DISCLAIMS ALL WARRANTIES WITH
 REGARD TO THIS SOFTWARE INCLUDING ALL IMPLIED WARRANTIES OF MERCHANTABILITY
 AND FITNESS. IN NO EVENT SHALL THE AUTHOR BE LIABLE FOR ANY SPECIAL, DIRECT,
 INDIRECT, OR CONSEQUENTIAL DAMAGES OR ANY DAMAGES WHATSOEVER RESULTING FROM
 LOSS OF USE, DATA OR PROFITS, WHETHER IN AN ACTION OF CONTRACT, NEGLIGENCE OR
 OTHER TORTIOUS ACTION, ARISING OUT OF OR IN CONNECTION WITH THE USE OR
 PERFORMANCE OF THIS SOFTWARE."""

COPYRIGHT = f"""Format: https://www.debian.org/doc/packaging-manuals/copyright-format/1.0/
Upstream-Name: packer

Files: *
Copyright: 2011 Somebody
License: GPL-2+

Files: lib/*
Copyright: 2011 Somebody
License: BSD-2-clause

Files: lib/hash.? lib/hash_*.c
Copyright: 2012 Another
License: as-is
 {ISC}

Files: lib/odd.c
Copyright: 2013
License: as-was
 Do what the author would have liked.

Files: lib/legal.c
Copyright: 2013
License: Expat or GPL-2+ with OpenSSL exception

License: GPL-2+
 See /usr/share/common-licenses/GPL-2.
"""


def unit(path, *includes, sha="0" * 64):
    return TranslationUnit(
        module="1" * 64,
        size=1,
        language="c",
        source_path=path,
        source_sha256=sha,
        compiler="clang 22.1.8",
        llvm_version="22.1.8",
        arguments=(),
        build_system="make",
        includes=includes,
    )


def decided(store, license_, *units):
    package = Package(source="debian", name="p", version="1", language="c", project="p")
    built = BuildResult(package=package, units=units, failures=(), license=license_, complete=True)
    return decide(store, built)


def dep5(store, text=COPYRIGHT):
    sha = store.put(text.encode())
    return License(
        kind="dep5",
        origin="debian/copyright",
        files=(StoredFile(name="debian/copyright", sha256=sha, size=len(text)),),
    )


@pytest.mark.parametrize(
    ("path", "includes", "tier", "expression"),
    [
        ("lib/a.c", (), "a", "BSD-2-Clause"),
        ("./lib/../lib/a.c", (), "a", "BSD-2-Clause"),
        (
            "lib/a.c",
            ("/usr/include/stdio.h", "/usr/lib/llvm-22/lib/clang/22/x.h"),
            "a",
            "BSD-2-Clause",
        ),
        ("lib/hash.c", ("lib/a.h",), "b", "BSD-2-Clause AND ISC"),
        ("lib/hash_1.c", (), "b", "ISC"),
        ("programs/main.c", ("lib/a.h",), "c", "BSD-2-Clause AND GPL-2.0-or-later"),
        ("lib/a.c", ("programs/main.h",), "c", "BSD-2-Clause AND GPL-2.0-or-later"),
        ("lib/odd.c", (), "none", "LicenseRef-as-was"),
        ("lib/a.c", ("lib/odd.c",), "none", "BSD-2-Clause AND LicenseRef-as-was"),
        ("lib/a.c", ("/home/somebody/x.h",), "none", "BSD-2-Clause"),
        ("lib/a.c", ("../other/x.h",), "none", "BSD-2-Clause"),
        ("lib/legal.c", (), "a", "MIT OR GPL-2.0-or-later WITH openvpn-openssl-exception"),
    ],
)
def test_each_file_has_its_own_licence(tmp_path, path, includes, tier, expression):
    store = Store(tmp_path)
    (found,) = decided(store, dep5(store), unit(path, *includes))
    assert (found.tier, found.expression) == (tier, expression)
    assert found.why
    assert found.origin == "debian/copyright"
    assert len(found.files) == 1


@pytest.mark.parametrize(
    "text", ["", "This package was debianised by hand.", "Format: x\n\nFiles: a\n", "\x00\xff"]
)
def test_a_copyright_file_that_no_machine_reads_closes_the_gate(tmp_path, text):
    store = Store(tmp_path)
    (found,) = decided(store, dep5(store, text), unit("lib/a.c"))
    assert found.tier == "none"
    assert found.why


def test_a_package_without_a_licence_closes_the_gate(tmp_path):
    store = Store(tmp_path)
    for license_ in (License(kind="none"), License(kind="spdx"), License(kind="dep5")):
        (found,) = decided(store, license_, unit("a.c"))
        assert (found.tier, found.expression) == ("none", "")


def test_one_expression_is_for_all_files_but_those_that_say_otherwise(tmp_path):
    store = Store(tmp_path)
    gnu = store.put(b"/* This is free software under the\n * GNU Lesser General Public License. */")
    isc = store.put(b"// SPDX-License-Identifier: ISC\n")
    plain = store.put(b"int x;")
    crate = License(kind="spdx", expression="MIT/Apache-2.0", origin="Cargo.toml")
    found = decided(store, crate, unit("a.c"), *(unit("a.c", sha=sha) for sha in (gnu, isc, plain)))
    assert [one.tier for one in found] == ["a", "c", "b", "a"]
    assert found[0].expression == "MIT OR Apache-2.0"
    assert [one.unit for one in found] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("stated", "expression", "tier"),
    [
        ("MIT", "MIT", "a"),
        ("Expat", "MIT", "a"),
        ("MIT/Apache-2.0", "MIT OR Apache-2.0", "a"),
        ("Unlicense/MIT", "Unlicense OR MIT", "a"),
        ("BSD-3-clause", "BSD-3-Clause", "a"),
        ("zlib", "Zlib", "b"),
        ("Zlib/libpng", "Zlib", "b"),
        ("public-domain", "LicenseRef-public-domain", "b"),
        ("Apache-2.0 WITH LLVM-exception", "Apache-2.0 WITH LLVM-exception", "a"),
        ("Apache-2.0 with LLVM exception", "Apache-2.0 WITH LLVM-exception", "a"),
        ("(MIT OR Apache-2.0) AND Unicode-3.0", "(MIT OR Apache-2.0) AND Unicode-3.0", "b"),
        ("GPL-2+ or Expat, and BSD-3-clause", "(GPL-2.0-or-later OR MIT) AND BSD-3-Clause", "a"),
        ("BSD-3-clause and GPL-2", "BSD-3-Clause AND GPL-2.0-only", "c"),
        ("BSD-3-clause or GPL-2", "BSD-3-Clause OR GPL-2.0-only", "a"),
        ("LGPL-2.1+", "LGPL-2.1-or-later", "c"),
        ("GPL-3+ with Autoconf exception", "GPL-3.0-or-later WITH Autoconf-exception-generic", "c"),
        ("MPL-2.0", "MPL-2.0", "c"),
        ("CC-BY-NC-4.0", "CC-BY-NC-4.0", "none"),
        ("BSD-4-clause", "BSD-4-Clause", "none"),
        ("BSD", "LicenseRef-BSD", "none"),
        ("MIT with strings attached", "MIT WITH LicenseRef-strings-attached", "none"),
        ("proprietary", "LicenseRef-proprietary", "none"),
        ("MIT AND", "LicenseRef-MIT-AND", "none"),
        ("((", "LicenseRef-unnamed", "none"),
        ("", "", "none"),
    ],
)
def test_names_are_normalised_and_ranked(stated, expression, tier):
    assert normalise(stated) == expression
    assert evaluate(expression).tier == tier


def test_a_text_is_recognised_only_as_a_whole():
    text = ISC.replace(" .\n", "")
    assert recognise(text) == "ISC"
    assert recognise("Copyright (c) 1999 Somebody\n" + text) == "ISC"
    assert recognise(text + " Except on Sundays.") == ""
    assert recognise(text.replace("or without fee", "a fee")) == ""
    assert recognise("word " * 50 + text) == ""
    assert recognise("") == ""
