import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("msgspec", reason="pip install 'rewriter[ir]'")

import numpy as np

from ir_dataset.identity import (
    MIN_INSTRUCTIONS,
    function_hash,
    minhashes,
    module_hash,
    normal_hash,
    unpack_minhash,
)
from ir_dataset.ir_text import parse_module
from tests.ir_dataset.ir_fixtures import NAMES, text_of


def hashes(text):
    module = parse_module(text)
    own = [normal_hash(function) for function in module.functions]
    return own, [function_hash(one) for one in module.functions], module_hash(module, own)


def rename_values(text, salt):
    """Other names for every value and block; numbered ones get names."""

    def rename(match):
        number = match.group(2)
        return f"{match.group(1)}n{int(number) * 7919 + salt}{match.group(3)}"

    text = re.sub(r"(%)(\d+)()", rename, text)
    return re.sub(r"(?m)^()(\d+)(:)", rename, text)


@settings(max_examples=15, deadline=None)
@given(name=st.sampled_from(["c", "cpp", "fortran", "zig"]), salt=st.integers(0, 10**6))
def test_names_of_values_do_not_count(name, salt):
    assert hashes(rename_values(text_of(name), salt)) == hashes(text_of(name))


@settings(max_examples=15, deadline=None)
@given(name=st.sampled_from(NAMES), order=st.randoms(use_true_random=False))
def test_the_order_of_attributes_and_functions_does_not_count(name, order):
    def shuffled(match):
        said = re.findall(r'"[^"]*"(?:="[^"]*")?|\w+(?:\([^)]*\))?', match.group(2))
        order.shuffle(said)
        return f"{match.group(1)}{{ {' '.join(said)} }}"

    text = re.sub(r"(attributes #\d+ = )\{ (.*) \}", shuffled, text_of(name))
    pieces = re.split(r"(?ms)(^define .*?^\}\n)", text)
    functions = pieces[1::2]
    order.shuffle(functions)
    pieces[1::2] = functions
    own, shapes, module = hashes("".join(pieces))
    expected = hashes(text_of(name))
    assert (sorted(own), sorted(shapes), module) == (
        sorted(expected[0]),
        sorted(expected[1]),
        expected[2],
    )


def test_metadata_does_not_count():
    text = text_of("c")
    bare = re.sub(r"\n +#dbg_[^\n]*", "", text)
    bare = re.sub(r",? ![\w.]+ !\d+", "", bare)
    bare = bare[: bare.index("\n!")] + "\n"
    assert "!dbg" not in bare and "#dbg" not in bare
    assert hashes(bare) == hashes(text)


def test_names_of_functions_types_and_linkage_count_for_the_module_only():
    text = text_of("c")
    other = text.replace("@keys", "@zzz").replace("%struct.node", "%struct.leaf")
    other = other.replace("define internal", "define")
    assert hashes(other)[:2] == hashes(text)[:2]
    assert hashes(other)[2] != hashes(text)[2]


def test_building_for_a_shared_library_does_not_count():
    text = text_of("cpp")
    assert "declare dso_local" not in text
    static = text.replace("declare void @_Z4takei", "declare dso_local void @_Z4takei")
    assert static != text
    assert hashes(static) == hashes(text) == hashes(text.replace("define dso_local", "define"))


@pytest.mark.parametrize(
    ("old", "new", "weak"),
    [
        ("getelementptr inbounds nuw %struct.node", "getelementptr inbounds nuw i64", True),
        ("type { ptr, i32 }", "type { ptr, i64 }", True),
        ("store ptr %0, ptr %3, align 8", "store ptr %0, ptr %3, align 4", True),
        ("add nsw i32", "add i32", True),
        ("store i32 0, ptr %5", "store i32 1, ptr %5", True),
        ("icmp slt i32", "icmp sgt i32", True),
        ("add nsw i32 %19", "sub nsw i32 %19", False),
        ("load i32, ptr %5, align 4", "load i64, ptr %5, align 4", False),
    ],
)
def test_what_a_function_does_counts(old, new, weak):
    text = text_of("c")
    assert old in text
    before, after = hashes(text), hashes(text.replace(old, new, 1))
    assert before[0] != after[0]
    assert before[2] != after[2]
    assert (before[1] == after[1]) is weak, "opcodes and types alone are the weaker hash"


def test_hashes_are_the_same_on_every_machine():
    own, shapes, module = hashes(text_of("fortran"))
    assert own == ["603d1d33fb53eba8ce60dcf0eebb3aad"]
    assert shapes == ["6005a7c1195d9760"]
    assert module == "81a0add246a83821d94bee0ee228c1d3"


def test_minhash_estimates_the_similarity():
    body = [f"  %{at} = add i{1 + at % 61} %x, {at}" for at in range(400)]
    texts = []
    for changed in (0, 1, 40):
        lines = [
            line.replace("add", "mul") if at % (400 // changed if changed else 10**6) == 1 else line
            for at, line in enumerate(body)
        ]
        texts.append("define void @f(i32 %x) {\n" + "\n".join(lines) + "\n  ret void\n}\n")
    functions = [parse_module(text).functions[0] for text in texts]
    rows = [unpack_minhash(packed) for packed in minhashes(functions)]
    alike = [float(np.mean(rows[0] == row)) for row in rows]
    shingles = [
        {
            tuple(shape.token for shape in one.shapes[at : at + 4])
            for at in range(len(one.shapes) - 3)
        }
        for one in functions
    ]
    true = [len(shingles[0] & one) / len(shingles[0] | one) for one in shingles]
    assert alike[0] == 1
    for estimate, exact in zip(alike, true, strict=True):
        assert abs(estimate - exact) < 0.2  # three standard deviations of 64 draws at the worst
    assert alike[2] < 0.85 < alike[1]


def test_a_minhash_does_not_depend_on_its_neighbours():
    functions = [one for name in NAMES for one in parse_module(text_of(name)).functions]
    together = minhashes(functions)
    assert together == [minhashes([function])[0] for function in functions]
    long = [len(function.shapes) >= MIN_INSTRUCTIONS for function in functions]
    assert [bool(packed) for packed in together] == long
    assert any(long)
