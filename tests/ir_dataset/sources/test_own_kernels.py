"""This project's kernels become units: texts are the same each time, and each compiles."""

import msgspec
import pytest

pytest.importorskip("torch")

from ir_dataset.sources import find_source
from ir_dataset.sources.kernel_texts import cpp_texts
from ir_dataset.sources.source import BuildLimits
from ir_dataset.store import Store
from ir_dataset.toolchain import Toolchain
from rewriter.errors import ConfigError

SOURCE = find_source("own-kernels")
TOOLS = Toolchain.find()


def test_texts_cover_every_operator_and_repeat():
    texts = cpp_texts(2)
    assert texts == cpp_texts(2)
    operators = {name.rpartition("_")[0] for name in texts}
    assert {"gemv", "rms_norm", "decode_attention", "gated_activation"} <= operators
    assert all(text.strip() and len(set(texts.values())) == len(texts) for text in texts.values())


@pytest.mark.parametrize(
    ("field", "value"), [("parts", ["c"]), ("targets", ["cuda:sm_1"]), ("per_operator", 0)]
)
def test_options_that_are_not_allowed_name_themselves(field, value):
    with pytest.raises(ConfigError, match=field):
        SOURCE.discover({field: value})


def _package(part, **options):
    found = SOURCE.discover({"parts": [part], "per_operator": 1, **options})
    if not found:
        pytest.skip(f"what {part} needs is not installed")
    return found[0]


def _fetched(store, package, operator):
    with store.workspace("fetch") as workspace:
        fetched = SOURCE.fetch(package, store, workspace)
    files = tuple(file for file in fetched.files if file.name.startswith(operator))
    assert files
    return msgspec.structs.replace(fetched, files=files)


def _build(store, fetched):
    with store.workspace("build") as workspace:
        return SOURCE.build(fetched, store, workspace, toolchain=TOOLS, limits=BuildLimits())


def test_cpp_kernels_give_unoptimised_bitcode_for_each_instruction_set(tmp_path):
    store = Store(tmp_path)
    package = _package("cpp", isas=["scalar", "avx2"])
    built = _build(store, _fetched(store, package, "rms_norm"))
    assert len(built.units) == 2 and not built.failures
    assert all(store.get(unit.module)[:4] == b"BC\xc0\xde" for unit in built.units)
    assert sorted("-mavx2" in unit.arguments for unit in built.units) == [False, True]


def test_triton_kernels_say_that_they_are_optimised_and_by_which_llvm(tmp_path):
    store = Store(tmp_path)
    package = _package("triton", targets=["cuda:sm_90"])
    fetched = _fetched(store, package, "sum_splits")
    (unit,) = _build(store, fetched).units
    assert unit.optimized and unit.language == "triton" and int(unit.llvm_version[:2]) > 20
    text = store.get(unit.module).decode()
    assert "define ptx_kernel void" in text or "define void" in text
    assert 'directory: "."' in text and "/tmp/" not in text
    assert _build(store, fetched).units == (unit,)
