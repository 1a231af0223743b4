from collections import Counter

import pytest

pytest.importorskip("msgspec", reason="pip install 'rewriter[ir]'")

from ir_dataset.ir_instruction import SHAPES, split_top, type_end
from ir_dataset.ir_text import parse_module
from tests.ir_dataset.ir_fixtures import NAMES, text_of


def functions_of(name):
    return {function.name: function for function in parse_module(text_of(name)).functions}


@pytest.mark.parametrize("name", NAMES)
def test_llvm_counts_the_same(name):
    llvm = pytest.importorskip("llvmlite.binding", reason="pip install 'rewriter[ir]'")
    context = llvm.create_context()
    read = llvm.parse_assembly(text_of(name), context=context)
    expected = {
        function.name: [[one.opcode for one in block.instructions] for block in function.blocks]
        for function in read.functions
        if not function.is_declaration
    }
    found = {
        function.name: [
            [shape.opcode for shape in function.shapes[block.start : block.stop]]
            for block in function.blocks
        ]
        for function in parse_module(text_of(name)).functions
    }
    assert found == expected


def test_signatures_tell_linkage_result_parameters_and_attributes():
    odd = functions_of("odd")
    function = odd["with space"]
    assert (function.linkage, function.result, function.comdat) == ("external", "i32", True)
    assert function.parameters == ('i32 %"odd name"', "ptr %p")
    assert "memory(argmem: read, inaccessiblemem: none)" in function.attributes
    assert odd["plain"].linkage == "internal"
    assert odd["vector"].result == "<4 x float>"
    assert functions_of("cpp")["_Z5twiceIiET_S0_"].linkage == "linkonce_odr"


def test_blocks_know_where_they_go():
    odd = functions_of("odd")
    assert [len(block.targets) for block in odd["jumps"].blocks] == [2, 2, 1, 0]
    assert [len(block.targets) for block in odd["with space"].blocks] == [2, 1, 0, 0]
    labels = {block.label for block in odd["cleanups"].blocks}
    assert {target for block in odd["cleanups"].blocks for target in block.targets} < labels


def test_callees_are_named():
    assert functions_of("c")["sum"].callees == ["keys"]
    assert Counter(functions_of("cpp")["_Z3runi"].callees)["_Z5riskyi"] == 1
    assert functions_of("odd")["with space"].callees == ["printf"]


@pytest.mark.parametrize(
    ("skeleton", "opcode", "type_", "kinds", "callee"),
    [
        ("  % = load ptr, ptr %, align 8", "load", "ptr", ["value"], ""),
        ("  store i32 0, ptr @, align 4", "store", "i32", ["constant", "global"], ""),
        ("  % = icmp samesign ult i64 %, 5", "icmp", "i64", ["value", "constant"], ""),
        ("  % = sub nuw nsw <2 x i64> %, %", "sub", "<2 x i64>", ["value", "value"], ""),
        ("  % = zext nneg i8 % to i64", "zext", "i64", ["value"], ""),
        (
            "  % = getelementptr inbounds nuw %T.0, ptr %, i32 0, i64 %",
            "getelementptr",
            "ptr",
            ["value", "constant", "value"],
            "",
        ),
        (
            "  % = tail call fastcc noundef range(i32 0, 9) i32 @(ptr sret(%T.0) align 8 %, i1 true) #",
            "call",
            "i32",
            ["value", "constant"],
            "@",
        ),
        (
            "  % = call i32 (ptr, ...) %(ptr @, double 0x40091EB860000000)",
            "call",
            "i32",
            ["global", "constant"],
            "%",
        ),
        (
            "  call void @llvm.memcpy.p0.p0.i64(ptr align 8 %, ptr align 8 %, i64 24, i1 false)",
            "call",
            "void",
            ["value", "value", "constant", "constant"],
            "@llvm.memcpy.p0.p0.i64",
        ),
        (
            '  % = call { i32, i32 } asm sideeffect "", ""(ptr %)',
            "call",
            "{ i32, i32 }",
            ["value"],
            "asm",
        ),
        (
            "  % = phi ptr [ null, % ], [ getelementptr (i8, ptr @, i64 4), % ], [ %, % ]",
            "phi",
            "ptr",
            ["constant", "constant", "value"],
            "",
        ),
        (
            "  % = atomicrmw volatile xchg ptr %, i8 % seq_cst, align 1",
            "atomicrmw",
            "i8",
            ["value", "value"],
            "",
        ),
        ("  % = cmpxchg ptr %, i32 %, i32 1 acquire monotonic", "cmpxchg", "i32", None, ""),
        ("  ret void", "ret", "void", [], ""),
        ("  br i1 %, label %, label %", "br", "i1", ["value", "block", "block"], ""),
        (
            "  % = alloca [4 x { i8, ptr }], i32 2, align 16",
            "alloca",
            "[4 x { i8, ptr }]",
            None,
            "",
        ),
        (
            "  % = fcmp nnan ninf olt float %, 0.000000e+00",
            "fcmp",
            "float",
            ["value", "constant"],
            "",
        ),
        ("  % = select fast i1 %, double %, double %", "select", "double", ["value"] * 3, ""),
    ],
)
def test_instructions(skeleton, opcode, type_, kinds, callee):
    shape = SHAPES[skeleton]
    assert (shape.opcode, shape.type, shape.callee) == (opcode, type_, callee)
    if kinds is not None:
        assert [kind for kind, _ in shape.operands] == kinds


def test_types_end_where_they_end():
    assert [
        type_end(text) for text in ("i32 %", "ptr addrspace(3) %", "<{ i8, [2 x ptr] }> %")
    ] == [
        3,
        16,
        19,
    ]
    assert type_end("inbounds") == 0
    assert split_top('i8 1, [2 x i8] c"a,b", { i8, i8 } zeroinitializer') == [
        "i8 1",
        '[2 x i8] c"a,b"',
        "{ i8, i8 } zeroinitializer",
    ]


@pytest.mark.parametrize(
    "text", ["", "define", "define i32 @f(", "\ndefine void @f() {\n}\n", "}\n@"]
)
def test_what_llvm_did_not_print_is_no_error(text):
    parse_module(text)


def test_types_are_named_by_what_they_hold():
    text = "%a = type { i32, %b }\n%b = type { ptr }\n%c = type { i32, %d }\n%d = type { ptr }\n"
    module = parse_module(text)
    assert (
        sorted(module.types.values())[0]
        == "{ i32, %T."
        + next(name.removeprefix("%T.") for name, held in module.types.items() if held == "{ ptr }")
        + " }"
    )
    assert len(module.types) == 2
