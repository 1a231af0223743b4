"""ONNX files by a stranger: checked before a runtime is given them, and what is wrong is named."""

from __future__ import annotations

import hashlib
import json
import random

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from rewriter.errors import ArtifactError
from rewriter.export.onnx_file import KEY, SIZES_IN_BITS, UNSEALED, metadata_text, open_onnx, seal

WEIGHT = np.arange(12, dtype=np.float32).reshape(3, 4)
"""What every tensor here holds."""


def external(name, location="m.onnx.data", offset="4096", length="48", dims=(3, 4), **more):
    """A tensor whose bytes stand in a data file."""
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=dims)
    tensor.data_location = TensorProto.EXTERNAL
    entries = {"location": location, "offset": offset, "length": length} | more
    for key, value in entries.items():
        if value is not None:
            tensor.external_data.add(key=key, value=value)
    return tensor


def value(name, dims):
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, dims)


def branches(tensor):
    """`If` whose bodies add a tensor of their own."""
    names = ("then_branch", "else_branch")
    bodies = {
        name: helper.make_graph(
            [helper.make_node("Add", ["scaled", "inner"], [name])],
            name,
            [],
            [value(name, ["n", 4])],
            [tensor],
        )
        for name in names
    }
    return helper.make_node("If", ["yes"], ["y"], **bodies)


def scale():
    """A function with a tensor as an attribute of one of its nodes."""
    two = helper.make_tensor("two", TensorProto.FLOAT, [], [2.0])
    nodes = [
        helper.make_node("Constant", [], ["factor"], value=two),
        helper.make_node("Mul", ["a", "factor"], ["b"]),
    ]
    return helper.make_function("own", "Scale", ["a"], ["b"], nodes, [helper.make_opsetid("", 20)])


def build():
    """y = 2 (x @ w) + inner, with tensors at the top, in sub-graphs and in a function."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["product"]),
        helper.make_node("Scale", ["product"], ["scaled"], domain="own"),
        branches(external("inner", offset="0", length="16", dims=(4,))),
    ]
    yes = helper.make_tensor("yes", TensorProto.BOOL, [], [True])
    graph = helper.make_graph(
        nodes, "g", [value("x", ["n", 3])], [value("y", ["n", 4])], [external("w"), yes]
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("own", 1)]
    return helper.make_model(graph, functions=[scale()], opset_imports=opsets, ir_version=10)


def content():
    data = bytearray(4096 + 48)
    data[:16] = WEIGHT[0].tobytes()
    data[4096:] = WEIGHT.tobytes()
    return bytes(data)


def metadata(data, changes=None):
    digest = hashlib.sha256(data).hexdigest()
    known = {
        "format": 1,
        "kind": "module",
        "sha256": UNSEALED,
        "data": {"file": "m.onnx.data", "bytes": len(data), "sha256": digest},
        "versions": {"é": float("inf")},
    }
    return known | (changes or {})


def write(directory, model=None, changes=None, data=None):
    """A sealed file with its data: as somebody with intent would write it."""
    model, data = model or build(), content() if data is None else data
    path = directory / "m.onnx"
    (directory / "m.onnx.data").write_bytes(data)
    if not any(entry.key == KEY for entry in model.metadata_props):
        model.metadata_props.add(key=KEY, value=metadata_text(metadata(data, changes)))
    path.write_bytes(model.SerializeToString())
    seal(path)
    return path


def refused(path, match, **options):
    with pytest.raises(ArtifactError, match=match):
        open_onnx(path, **options)


def test_a_sealed_file_opens_and_runs(tmp_path):
    shares = []
    file = open_onnx(write(tmp_path), on_stage=lambda *stage: shares.append(stage))
    assert file.model_path == tmp_path / "m.onnx"
    assert file.data_path == tmp_path / "m.onnx.data"
    assert file.metadata["kind"] == "module"
    assert shares == [("check weights", 1.0)]
    session = onnxruntime.InferenceSession(str(file.model_path))
    x = np.ones((2, 3), np.float32)
    (y,) = session.run(None, {"x": x})
    np.testing.assert_array_equal(y, 2 * (x @ WEIGHT) + WEIGHT[0])


def test_a_folder_opens(tmp_path):
    write(tmp_path).rename(tmp_path / "model.onnx")
    assert open_onnx(tmp_path).model_path == tmp_path / "model.onnx"


def test_sealing_twice_changes_nothing(tmp_path):
    path = write(tmp_path)
    sealed = path.read_bytes()
    seal(path)
    assert path.read_bytes() == sealed


def test_the_own_hash_is_that_of_the_file_with_zeros_in_its_place(tmp_path):
    path = write(tmp_path)
    digest = open_onnx(path).metadata["sha256"]
    unsealed = path.read_bytes().replace(digest.encode(), UNSEALED.encode())
    assert hashlib.sha256(unsealed).hexdigest() == digest


def test_a_file_without_data_opens(tmp_path):
    model = build()
    del model.graph.initializer[0]
    model.graph.initializer.append(onnx.numpy_helper.from_array(WEIGHT, "w"))
    model.graph.node.pop()
    model.graph.output[0].name = "scaled"
    path = write(tmp_path, model, {"data": None})
    (tmp_path / "m.onnx.data").unlink()
    assert open_onnx(path).data_path is None


def test_any_flipped_bit_of_the_graph_is_noticed(tmp_path):
    path = write(tmp_path)
    whole = path.read_bytes()
    for position in range(0, len(whole), 3):
        bit = 1 << random.Random(position).randrange(8)
        path.write_bytes(whole[:position] + bytes([whole[position] ^ bit]) + whole[position + 1 :])
        refused(path, r"m\.onnx", check_data=False)


def test_any_flipped_bit_of_the_data_is_noticed(tmp_path):
    path, data = write(tmp_path), tmp_path / "m.onnx.data"
    whole = data.read_bytes()
    for position in (0, 15, 16, 2048, 4095, 4096, len(whole) - 1):
        data.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        refused(path, r"m\.onnx\.data is damaged: its SHA-256")
        assert open_onnx(path, check_data=False).metadata["kind"] == "module"


@pytest.mark.parametrize("cut", [1, 100, -1])
def test_a_file_cut_short_or_grown_is_noticed(tmp_path, cut):
    path, data = write(tmp_path), tmp_path / "m.onnx.data"
    for file in (data, path):
        whole = file.read_bytes()
        file.write_bytes(whole[:-cut] if cut > 0 else whole + b"\0")
        refused(path, r"m\.onnx", check_data=False)


@pytest.mark.parametrize("text", [b"", b"\0", b"hello", b"\x80" * 64, b"{}"])
def test_other_files_are_refused(tmp_path, text):
    path = tmp_path / "m.onnx"
    path.write_bytes(text)
    refused(path, r"m\.onnx")


def test_what_is_missing_is_named(tmp_path):
    refused(tmp_path / "m.onnx", r"m\.onnx does not exist")
    refused(tmp_path, r"model\.onnx does not exist")
    path = write(tmp_path)
    (tmp_path / "m.onnx.data").unlink()
    refused(path, r"m\.onnx\.data is missing")


def test_a_link_to_other_data_is_refused(tmp_path):
    path, data = write(tmp_path), tmp_path / "m.onnx.data"
    data.rename(tmp_path / "elsewhere")
    data.symlink_to(tmp_path / "elsewhere")
    refused(path, "is a link")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"format": 2}, "format 2; allowed: 1"),
        ({"format": True}, "format True"),
        ({"kind": "pickle"}, "kind 'pickle'; allowed: causal_lm, module"),
        ({"data": None}, "reads 'm.onnx.data'; allowed: None"),
        ({"data": "m.onnx.data"}, "has data 'm.onnx.data'"),
        ({"data": {"file": "m.onnx.data", "bytes": True, "sha256": UNSEALED}}, "has data"),
        (
            {"data": {"file": "m.onnx.data", "bytes": 7, "sha256": UNSEALED}},
            "4144 bytes; allowed: 7",
        ),
        ({"data": {"file": "m.onnx.data", "bytes": 4144, "sha256": UNSEALED}}, "SHA-256"),
    ],
)
def test_metadata_of_another_kind_are_refused(tmp_path, changes, match):
    refused(write_unchecked(tmp_path, changes), match)


NAMES = ["", ".", "..", "../m.onnx.data", "/etc/passwd", "a/b", "a\\b", "C:x", "a\0b"]


@pytest.mark.parametrize("name", NAMES)
def test_a_data_file_elsewhere_is_refused(tmp_path, name):
    data = {"file": name, "bytes": 4144, "sha256": UNSEALED}
    refused(write_unchecked(tmp_path, {"data": data}), "names the data file")


def write_unchecked(directory, changes):
    """Sealed by hand, where `seal` itself would refuse."""
    text = metadata_text(metadata(content(), changes))
    model = build()
    model.metadata_props.add(key=KEY, value=text)
    unsealed = model.SerializeToString()
    digest = hashlib.sha256(unsealed).hexdigest()
    sealed = unsealed.replace(
        f'"sha256": "{UNSEALED}", "v'.encode(), f'"sha256": "{digest}", "v'.encode()
    )
    assert sealed != unsealed
    (directory / "m.onnx").write_bytes(sealed)
    (directory / "m.onnx.data").write_bytes(content())
    return directory / "m.onnx"


@pytest.mark.parametrize(
    "entries",
    [
        [],
        ["{"],
        ["[]"],
        ["null"],
        ["{}"],
        ["[" * 100_000],
        [json.dumps({"format": 1, "kind": "module", "sha256": "A" * 64})],
        [json.dumps({"sha256": UNSEALED, "kind": "module", "format": 1})],
        ['{"format": 1, "format": 1, "kind": "module", "sha256": "' + UNSEALED + '"}'],
        [metadata_text(metadata(b""))] * 2,
    ],
)
def test_other_metadata_are_refused(tmp_path, entries):
    model = build()
    for entry in entries:
        model.metadata_props.add(key=KEY, value=entry)
    path = tmp_path / "m.onnx"
    path.write_bytes(model.SerializeToString())
    refused(path, r"m\.onnx has (0|2|metadata|format|kind|sha256)")
    with pytest.raises(ArtifactError, match=r"m\.onnx has"):
        seal(path)


WRONG = {
    "absolute": ({"location": "/etc/passwd"}, "reads '/etc/passwd'"),
    "parent": ({"location": "../m.onnx.data"}, "reads '../m.onnx.data'"),
    "here": ({"location": "./m.onnx.data"}, "reads './m.onnx.data'"),
    "itself": ({"location": "m.onnx"}, "reads 'm.onnx'"),
    "memory": ({"location": "*/_ORT_MEM_ADDR_/*"}, "_ORT_MEM_ADDR_"),
    "nowhere": ({"location": None}, "reads None"),
    "negative offset": ({"offset": "-4096"}, "offset and length"),
    "huge offset": ({"offset": "9" * 30}, "offset and length"),
    "far offset": ({"offset": "4097"}, "reads to byte 4145 of 4144"),
    "text offset": ({"offset": "0x10"}, "offset and length"),
    "negative length": ({"length": "-48"}, "offset and length"),
    "no length": ({"length": None}, "offset and length"),
    "long length": ({"length": "52"}, "reads to byte"),
    "short length": ({"length": "44"}, "44 bytes; its shape .* takes 48"),
    "larger shape": ({"dims": (1 << 40, 1 << 40)}, "takes"),
    "negative shape": ({"dims": (-3, -4)}, "has shape"),
    "another key": ({"prepacked_0": "4096;48"}, "has external_data"),
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("place", ["top", "branch", "attribute", "function", "sparse"])
def test_a_tensor_that_reads_elsewhere_is_refused(tmp_path, place, name):
    changes, match = WRONG[name]
    refused(write(tmp_path, with_tensor(place, external("bad", **changes))), match)


def with_tensor(place, tensor):
    """The model with one more tensor, somewhere."""
    model = build()
    if place == "top":
        model.graph.initializer.append(tensor)
    if place == "branch":
        model.graph.node[-1].attribute[1].g.initializer.append(tensor)
    if place == "attribute":
        model.graph.node.append(helper.make_node("Constant", [], ["c"], value=tensor))
    if place == "function":
        model.functions[0].node[0].attribute[0].t.CopyFrom(tensor)
    if place == "sparse":
        model.graph.sparse_initializer.add().values.CopyFrom(tensor)
    return model


def test_the_same_tensor_with_right_bounds_is_taken_everywhere(tmp_path):
    for place in ("top", "branch", "attribute", "function", "sparse"):
        assert open_onnx(write(tmp_path, with_tensor(place, external("good")))).metadata


def test_a_key_given_twice_is_refused(tmp_path):
    tensor = external("bad")
    tensor.external_data.add(key="location", value="m.onnx.data")
    refused(write(tmp_path, with_tensor("top", tensor)), "has external_data")


def test_external_data_of_a_tensor_that_is_not_external_are_refused(tmp_path):
    tensor = external("bad")
    tensor.data_location = TensorProto.DEFAULT
    refused(write(tmp_path, with_tensor("top", tensor)), "not external")


def test_strings_cannot_be_external(tmp_path):
    tensor = external("bad")
    tensor.data_type = TensorProto.STRING
    refused(write(tmp_path, with_tensor("top", tensor)), "type STRING")


def test_raw_bytes_that_do_not_fit_their_shape_are_refused(tmp_path):
    tensor = onnx.numpy_helper.from_array(WEIGHT, "bad")
    tensor.dims[0] = 4
    refused(write(tmp_path, with_tensor("top", tensor)), r"48 bytes; its shape \[4, 4\] takes 64")


def test_sizes_are_those_of_the_types():
    for name, bits in SIZES_IN_BITS.items():
        dtype = np.dtype(helper.tensor_dtype_to_np_dtype(TensorProto.DataType.Value(name)))
        assert dtype.itemsize == max(bits, 8) // 8


def test_operators_that_open_files_are_refused(tmp_path):
    model = build()
    model.functions[0].node.append(
        helper.make_node("EPContext", ["a"], ["d"], domain="com.microsoft", ep_cache_context="/x")
    )
    refused(write(tmp_path, model), "EPContext opens files")
