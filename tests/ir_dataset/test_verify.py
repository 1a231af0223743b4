import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("msgspec", reason="pip install 'rewriter[ir]'")
pytest.importorskip("llvmlite", reason="pip install 'rewriter[ir]'")

from ir_dataset import reader
from ir_dataset.reader import read_module
from ir_dataset.records import decode, encode
from ir_dataset.store import Store
from ir_dataset.toolchain import Toolchain
from ir_dataset.verify import ModuleSummary, verify_module
from tests.ir_dataset.ir_fixtures import NAMES, bitcode_of, text_of

NEWER = """
define float @scale(float %x) {
  %y = fmul float %x, f0x3FB8AA3B
  ret float %y
}
"""


@pytest.mark.parametrize("name", NAMES)
def test_bitcode_and_its_text_are_one_module(tmp_path, name):
    store = Store(tmp_path)
    bitcode = verify_module(store, store.put(bitcode_of(name)))
    text = verify_module(store, store.put(text_of(name).encode()))
    assert bitcode.reader_ok and not bitcode.empty
    assert bitcode.norm_hash == text.norm_hash
    assert bitcode.functions == text.functions
    assert bitcode.n_functions == len(bitcode.functions) > 0
    assert bitcode.n_instructions == sum(one.n_instructions for one in bitcode.functions)
    assert decode(encode(bitcode), ModuleSummary) == bitcode


def test_a_context_that_has_met_a_type_does_not_change_a_module():
    first = read_module(bitcode_of("cpp")).text
    read_module(bitcode_of("c"))
    assert read_module(bitcode_of("cpp")).text == first


def test_both_readers_give_the_same_text():
    if not Toolchain.find().reads("llvm-dis"):
        pytest.skip("llvm-dis of the pinned LLVM is not installed")
    for name in NAMES:
        data = bitcode_of(name)
        assert reader._by_llvm_dis(data).text == reader._by_llvmlite(data).text


@pytest.mark.parametrize(
    "data",
    [b"", b"BC\xc0\xde" + b"\0" * 64, b"define i32 @f( {", b"\xff\xfe", b"define i32 @f() {}"],
)
def test_what_is_no_module_is_told(tmp_path, data):
    store = Store(tmp_path)
    summary = verify_module(store, store.put(data))
    assert summary.reader_ok is not bool(summary.reason)
    assert summary.empty or not summary.reader_ok


def test_code_that_llvm_does_not_verify_is_told(tmp_path):
    bad = b"define i32 @f(i1 %c) {\n  br i1 %c, label %a, label %b\na:\n  %x = add i32 1, 2\n" + (
        b"  br label %b\nb:\n  ret i32 %x\n}\n"
    )
    assert "dominate" in read_module(bad).reason


def test_a_module_without_functions_is_empty(tmp_path):
    store = Store(tmp_path)
    summary = verify_module(store, store.put(b"@x = global i32 7\ndeclare void @f()\n"))
    assert (summary.reader_ok, summary.empty) == (True, True)


def test_a_newer_writer_is_refused_unless_allowed():
    refused = read_module(NEWER.encode(), writer_llvm="24.0.0git")
    assert "newer" in refused.reason
    assert "24.0.0git" in refused.reason
    assert read_module(NEWER.encode()).reason, "LLVM 22 does not know this spelling"
    read = read_module(NEWER.encode(), writer_llvm="24.0.0git", allow_newer=True)
    assert "fmul float %x, 0x3FF7154760000000" in read.text


@pytest.mark.parametrize(
    ("type_", "wide"),
    [("half", "0xHFC00"), ("bfloat", "0xRFF80"), ("float", "0xFFF0000000000000")],
)
def test_infinities_in_the_older_spelling(type_, wide):
    text = f"""define <2 x {type_}> @f(i1 %c, {type_} %x) {{
  %y = select i1 %c, {type_} %x, {type_} -inf
  %z = fadd {type_} %y, +inf
  %v = insertelement <2 x {type_}> splat ({type_} -inf), {type_} %z, i32 0
  ret <2 x {type_}> %v
}}
"""
    read = read_module(text.encode(), writer_llvm="24.0.0git", allow_newer=True)
    assert not read.reason and read.text.count(wide) == 2 and "inf" not in read.text


@settings(max_examples=60, deadline=None)
@given(bits=st.integers(0, 2**32 - 1))
def test_floats_keep_their_value_in_the_older_spelling(bits):
    value = struct.unpack("<f", struct.pack("<I", bits))[0]
    wide = struct.pack("<Q", reader._widen(bits))
    if value == value:
        assert wide == struct.pack("<d", value)
    else:
        assert struct.unpack("<d", wide)[0] != struct.unpack("<d", wide)[0]


def test_a_huge_module_is_refused():
    assert "above the limit" in read_module(b"x" * 100, max_bytes=10).reason


def test_the_structural_hash_is_there_where_opt_is(tmp_path):
    opt = Toolchain.find().get("opt")
    if opt is None or not Toolchain.find().reads("opt"):
        pytest.skip("opt of the pinned LLVM is not installed")
    store = Store(tmp_path)
    summary = verify_module(store, store.put(bitcode_of("c")), opt=str(opt))
    assert int(summary.struct_hash, 16) > 4
