import pytest

pytest.importorskip("msgspec", reason="pip install 'rewriter[ir]'")
pytest.importorskip("llvmlite", reason="pip install 'rewriter[ir]'")

from ir_dataset.elf_symbols import function_sizes
from ir_dataset.labels import ModuleLabels, label_module
from ir_dataset.records import decode, encode
from ir_dataset.store import Store
from ir_dataset.toolchain import Toolchain
from rewriter.errors import ArtifactError, SourceError
from tests.ir_dataset.ir_fixtures import bitcode_of, bitcode_of_text

NATIVE = Toolchain.find()
PIP = Toolchain(tuple(item for item in NATIVE.paths if item[0] == "llvmlite"))


def sizes_of(labels):
    return {one.kind: dict(zip(one.names, one.sizes, strict=True)) for one in labels.sizes}


def test_sizes_without_llvms_tools(tmp_path):
    store = Store(tmp_path)
    labels = label_module(store, store.put(bitcode_of("c")), toolchain=PIP)
    sizes = sizes_of(labels)
    assert not labels.failures
    assert set(sizes) == {"Os-attr", "O2"}
    assert set(sizes["O2"]) == {"sum", "kind"}, "keys is inlined into its only caller"
    assert 0 < sizes["Os-attr"]["sum"] < sizes["O2"]["sum"] < 300
    assert decode(encode(labels), ModuleLabels) == labels
    assert label_module(store, labels.module, toolchain=PIP) == labels


def test_both_toolchains_give_the_same_code_at_o2(tmp_path):
    if not (NATIVE.reads("opt") and NATIVE.reads("llc")):
        pytest.skip("opt and llc of the pinned LLVM are not installed")
    store = Store(tmp_path)
    sha = store.put(bitcode_of("c"))
    with_tools = label_module(store, sha, toolchain=NATIVE)
    assert set(sizes_of(with_tools)) == {"Oz", "O2"}
    assert sizes_of(with_tools)["O2"] == sizes_of(label_module(store, sha, toolchain=PIP))["O2"]


HIDDEN = """
target triple = "x86_64-unknown-linux-gnu"
@table = private constant [1 x ptr] [ptr @"in table"]
define internal i32 @"in table"(i32 %x) { %y = mul i32 %x, 7 ret i32 %y }
define private i32 @alone(i32 %x) noinline { %y = call i32 @used(i32 %x) ret i32 %y }
define internal i32 @used(i32 %x) noinline { %y = add i32 %x, 5 ret i32 %y }
"""


@pytest.mark.parametrize("tools", [PIP, NATIVE], ids=["pip", "llvm"])
def test_functions_that_a_module_keeps_to_itself(tmp_path, tools):
    store = Store(tmp_path)
    sha = store.put(bitcode_of_text(HIDDEN))
    assert sizes_of(label_module(store, sha, toolchain=tools))["O2"] == {}
    shown = sizes_of(label_module(store, sha, toolchain=tools, show_unused=True))["O2"]
    assert set(shown) == {"in table", "alone", "used"} and min(shown.values()) > 0


def test_a_step_that_takes_too_long_is_a_failure(tmp_path):
    if not (NATIVE.reads("opt") and NATIVE.reads("llc")):
        pytest.skip("opt and llc of the pinned LLVM are not installed")
    store = Store(tmp_path)
    labels = label_module(store, store.put(bitcode_of("cpp")), timeout_s=1e-4)
    assert labels.sizes == ()
    assert [one.kind for one in labels.failures] == ["Oz", "O2"]
    assert "took longer" in labels.failures[0].reason


def test_without_any_compiler_it_says_what_to_install(tmp_path):
    store = Store(tmp_path)
    with pytest.raises(SourceError, match="llvmlite"):
        label_module(store, store.put(bitcode_of("c")), toolchain=Toolchain(()))


def test_damaged_input_is_a_failure(tmp_path):
    store = Store(tmp_path)
    labels = label_module(store, store.put(b"no bitcode"), toolchain=PIP)
    assert [one.kind for one in labels.failures] == ["Os-attr", "O2"]


@pytest.mark.parametrize(
    "data", [b"", b"\x7fELF\x02\x01", b"\x7fELF\x02\x01" + b"\xff" * 200, b"MZ"]
)
def test_damaged_objects_are_told(data):
    with pytest.raises(ArtifactError, match="object"):
        function_sizes(data)
