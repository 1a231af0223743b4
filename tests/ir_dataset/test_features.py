import numpy as np
import pytest

pytest.importorskip("msgspec", reason="pip install 'rewriter[ir]'")

from ir_dataset.features import FEATURES, ModuleFeatures, featurise, function_features
from ir_dataset.ir_text import parse_module
from ir_dataset.records import decode, encode
from ir_dataset.store import Store
from rewriter.errors import ArtifactError
from tests.ir_dataset.ir_fixtures import NAMES, bitcode_of, text_of

CALLERS = """
@slot = global ptr @taken

define i32 @main(i32 %x) {{
  %a = call i32 @small(i32 %x)
  %b = call i32 @big(i32 %a)
  %c = call i32 @alone(i32 %b)
  %d = call i32 @taken(i32 %c)
  %e = call i32 @fixed(i32 %d)
  %f = call i32 @outside(i32 %e)
  ret i32 %f
}}

define i32 @other(i32 %x) {{
  %a = call i32 @small(i32 %x)
  %b = call i32 @big(i32 %a)
  ret i32 %b
}}

define internal i32 @small(i32 %x) {{
  %r = add i32 %x, 1
  ret i32 %r
}}

define internal i32 @big(i32 %x) {{
{body}  ret i32 %x
}}

define internal i32 @alone(i32 %x) {{
{body}  ret i32 %x
}}

define internal i32 @taken(i32 %x) {{
  ret i32 %x
}}

define internal i32 @fixed(i32 %x) #0 {{
  ret i32 %x
}}

declare i32 @outside(i32)

attributes #0 = {{ noinline }}
"""


def rows_of(text):
    module = parse_module(text)
    matrix = function_features(module)
    return {
        function.name: dict(zip(FEATURES, row.tolist(), strict=True))
        for function, row in zip(module.functions, matrix, strict=True)
    }


def callers(instructions=60):
    body = "".join(f"  %v{at} = mul i32 %x, {at + 3}\n" for at in range(instructions))
    return rows_of(CALLERS.format(body=body))


def test_names_are_told_apart():
    assert len(set(FEATURES)) == len(FEATURES) > 55


@pytest.mark.parametrize("name", NAMES)
def test_counts_add_up(name):
    module = parse_module(text_of(name))
    rows = rows_of(text_of(name))
    for function in module.functions:
        row = rows[function.name]
        assert row["instructions"] == len(function.shapes)
        assert row["blocks"] == len(function.blocks)
        assert row["parameters"] == len(function.parameters)
        for opcode in ("load", "store", "icmp", "phi", "alloca", "ret", "switch"):
            assert row[opcode] == sum(shape.opcode == opcode for shape in function.shapes)
        assert 0 <= row["own_instructions"] <= row["instructions"]
        assert all(np.isfinite(list(row.values())))
        assert min(row.values()) >= 0


def test_small_callees_and_those_called_once_are_inlined():
    rows = callers()
    main = rows["main"]
    assert main["n_inlined_oz"] == 3, "small, alone and taken"
    assert main["oz_mul"] == 60, "alone's body"
    assert main["oz_call_direct"] == main["call_direct"] - 3
    assert rows["small"]["deletable_oz"] == rows["alone"]["deletable_oz"] == 1
    assert rows["big"]["deletable_oz"] == rows["taken"]["deletable_oz"] == 0
    assert rows["taken"]["address_taken"] == 1
    assert rows["fixed"]["deletable_oz"] == 0
    assert (rows["small"]["call_sites"], rows["alone"]["callers"]) == (2, 1)


def test_what_is_inlined_for_speed_only():
    rows = callers(30)
    assert (rows["main"]["n_inlined_oz"], rows["main"]["n_inlined_o2"]) == (3, 4)
    assert rows["other"]["o2_mul"] == 30
    assert rows["other"]["oz_mul"] == 0


def test_variables_in_registers_are_not_counted_as_memory():
    rows = rows_of(
        """
define i32 @f(i32 %x) {
  %kept = alloca i32
  %gone = alloca i32
  %part = alloca { i32, i64 }
  store i32 %x, ptr %gone
  store i32 %x, ptr %kept
  %v = load i32, ptr %gone
  %field = getelementptr { i32, i64 }, ptr %part, i32 0, i32 1
  store i64 1, ptr %field
  call void @use(ptr %kept)
  ret i32 %v
}
declare void @use(ptr)
"""
    )
    row = rows["f"]
    assert (row["promoted"], row["split"], row["stack_variables"]) == (1, 1, 1)
    assert row["stack_bytes"] == 4
    assert (row["store"], row["own_store"], row["own_load"]) == (3, 2, 0)


def test_landing_pads_that_nothing_throws_to_are_not_reached():
    text = """
define void @f() personality ptr @p {{
  invoke void @g()
          to label %ok unwind label %bad
ok:
  ret void
bad:
  %l = landingpad {{ ptr, i32 }}
          cleanup
  resume {{ ptr, i32 }} %l
}}
define internal void @g() {{
  call void @h(){attribute}
  ret void
}}
declare void @h()
declare i32 @p(...)
attributes #0 = {{ nounwind }}
"""
    throwing = rows_of(text.format(attribute=""))["f"]
    quiet = rows_of(text.format(attribute=" #0"))["f"]
    assert (throwing["reached"], throwing["may_throw"], throwing["throwing_invokes"]) == (3, 1, 1)
    assert (quiet["reached"], quiet["may_throw"], quiet["throwing_invokes"]) == (2, 0, 0)
    assert quiet["own_resume"] == 0


def test_loops_are_seen():
    row = rows_of(text_of("c"))["sum"]
    assert row["back_edges"] == 1
    assert row["loop_blocks"] >= 3


def test_a_module_that_calls_itself_ends():
    rows = rows_of(
        "define void @a() {\n  call void @b()\n  ret void\n}\n"
        "define void @b() {\n  call void @a()\n  call void @b()\n  ret void\n}\n"
    )
    assert rows["b"]["recursive"] == 1
    assert rows["a"]["may_throw"] == 1


def test_a_long_chain_of_calls_is_no_recursion():
    lines = [
        f"define internal void @f{at}() {{\n  call void @f{at + 1}()\n  ret void\n}}\n"
        for at in range(1500)
    ]
    assert len(rows_of("".join(lines) + "define void @f1500() {\n  ret void\n}\n")) == 1501


def test_features_of_a_stored_module(tmp_path):
    store = Store(tmp_path)
    found = featurise(store, store.put(bitcode_of("cpp")))
    assert found.matrix().shape == (len(found.names), len(FEATURES))
    assert decode(encode(found), ModuleFeatures) == found
    module = parse_module(text_of("cpp"))
    assert set(found.names) == {function.name for function in module.functions}
    with pytest.raises(ArtifactError, match="cannot be read"):
        featurise(store, store.put(b"define"))
