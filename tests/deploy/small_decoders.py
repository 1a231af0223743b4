"""Decoders of one layer, built operator by operator, sealed like real ones."""

from __future__ import annotations

import hashlib
import json

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from rewriter.export.onnx_file import KEY, UNSEALED, metadata_text, seal

VOCAB, WIDTH, HEADS, KV_HEADS, HEAD_DIM, POSITIONS = 40, 64, 4, 2, 16, 96
INT64, FLOAT = TensorProto.INT64, TensorProto.FLOAT
CONSTANTS = {
    "zero": [0],
    "one": [1],
    "two": [2],
    "never": [POSITIONS],
    "axes12": [1, 2],
    "axes13": [1, 3],
    "split": [0, 0, HEADS, HEAD_DIM],
    "merged": [0, 0, WIDTH],
    "zero_scalar": 0,
    "one_scalar": 1,
}
OPSETS = [helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)]


def write_gqa(directory, *, logits="last", **changes):
    """GroupQueryAttention with rotary tables: state in place, padding on the right."""
    random = np.random.default_rng(0)
    angles = np.arange(POSITIONS)[:, None] * 100.0 ** (-np.arange(HEAD_DIM // 2) / 8)
    kv = KV_HEADS * HEAD_DIM
    weights = {
        "embedding": random.standard_normal((VOCAB, WIDTH)),
        "wq": random.standard_normal((WIDTH, WIDTH)) / 3,
        "wk": random.standard_normal((WIDTH, kv)) / 3,
        "wv": random.standard_normal((WIDTH, kv)) / 3,
        "wo": random.standard_normal((WIDTH, VOCAB)) / 3,
        "cos": np.cos(angles),
        "sin": np.sin(angles),
    }
    node = helper.make_node
    attention = ["q", "k", "v", "past_key_values.0.key", "past_key_values.0.value"]
    nodes = [
        node("Gather", ["embedding", "input_ids"], ["x"]),
        *(node("MatMul", ["x", f"w{name}"], [name]) for name in "qkv"),
        node("ReduceSum", ["attention_mask", "one"], ["ones"], keepdims=0),
        node("Sub", ["ones", "one"], ["last"]),
        node("Cast", ["last"], ["seqlens"], to=TensorProto.INT32),
        node("Shape", ["attention_mask"], ["total64"], start=1, end=2),
        node("Squeeze", ["total64"], ["total_scalar"]),
        node("Cast", ["total_scalar"], ["total"], to=TensorProto.INT32),
        node(
            "GroupQueryAttention",
            [*attention, "seqlens", "total", "cos", "sin"],
            ["attended", "present.0.key", "present.0.value"],
            domain="com.microsoft",
            num_heads=HEADS,
            kv_num_heads=KV_HEADS,
            do_rotary=1,
        ),
        node("Add", ["x", "attended"], ["hidden"]),
        *_selected(logits),
        node("MatMul", ["selected", "wo"], ["logits"]),
    ]
    kv_dims = ["batch", KV_HEADS, "past", HEAD_DIM]
    states = [_state(f"layer0_{r}s", f"0.{r}", kv_dims) for r in ("key", "value")]
    feeds = [("input_ids", ["batch", "q_len"]), ("attention_mask", ["batch", "total_len"])]
    known = {"padding": "right", "logits": logits, "max_positions": POSITIONS} | changes
    return _write(directory, nodes, weights, feeds, states, known)


def _selected(logits):
    """The hidden vectors whose logits are wanted."""
    node = helper.make_node
    if logits == "all":
        return [node("Identity", ["hidden"], ["selected"])]
    return [
        node("Shape", ["input_ids"], ["q_len"], start=1, end=2),
        node("Sub", ["q_len", "one"], ["newest"]),
        node("Min", ["last", "newest"], ["column"]),
        node("Unsqueeze", ["column", "one"], ["columns"]),
        node("GatherND", ["hidden", "columns"], ["row"], batch_dims=1),
        node("Unsqueeze", ["row", "one"], ["selected"]),
    ]


def write_portable(directory, **changes):
    """Attention of standard operators: state that grows, padding wherever the mask says so."""
    random = np.random.default_rng(2)
    weights = {
        "embedding": random.standard_normal((VOCAB, WIDTH)),
        "places": random.standard_normal((POSITIONS, WIDTH)),
        **{f"w{name}": random.standard_normal((WIDTH, WIDTH)) / 3 for name in "qkv"},
        "wo": random.standard_normal((WIDTH, VOCAB)) / 3,
    }
    node = helper.make_node
    nodes = [
        node("Shape", ["input_ids"], ["q_len"], start=1, end=2),
        node("Shape", ["attention_mask"], ["total"], start=1, end=2),
        node("Sub", ["total", "q_len"], ["past"]),
        node("Slice", ["attention_mask", "past", "total", "one"], ["new"]),
        node("CumSum", ["attention_mask", "one"], ["counts"]),
        node("Sub", ["counts", "one"], ["counted"]),
        node("Slice", ["counted", "past", "total", "one"], ["q_counted"]),
        node("Max", ["q_counted", "zero"], ["q_positions"]),
        node("Cast", ["attention_mask"], ["shown"], to=TensorProto.BOOL),
        node("Where", ["shown", "counted", "never"], ["k_positions"]),
        node("Unsqueeze", ["k_positions", "axes12"], ["k_row"]),
        node("Unsqueeze", ["q_positions", "axes13"], ["q_column"]),
        node("LessOrEqual", ["k_row", "q_column"], ["visible"]),
        node("Gather", ["embedding", "input_ids"], ["token"]),
        node("Gather", ["places", "q_positions"], ["place"]),
        node("Add", ["token", "place"], ["x"]),
        *(part for name in "qkv" for part in _heads(name)),
        node(
            "Attention",
            ["q4", "k4", "v4", "visible", "past_key_values.0.key", "past_key_values.0.value"],
            ["attended4", "present.0.key", "present.0.value"],
        ),
        node("Transpose", ["attended4"], ["attended_bshd"], perm=[0, 2, 1, 3]),
        node("Reshape", ["attended_bshd", "merged"], ["attended"]),
        node("Add", ["x", "attended"], ["hidden"]),
        node("Squeeze", ["q_len"], ["q_scalar"]),
        node("Range", ["zero_scalar", "q_scalar", "one_scalar"], ["columns"]),
        node("Mul", ["new", "columns"], ["real_columns"]),
        node("ReduceMax", ["real_columns", "one"], ["column"]),
        node("GatherND", ["hidden", "column"], ["row"], batch_dims=1),
        node("Unsqueeze", ["row", "one"], ["selected"]),
        node("MatMul", ["selected", "wo"], ["logits"]),
    ]
    dims = ["batch", HEADS, "past", HEAD_DIM]
    states = [_state(f"layer0_{r}s", f"0.{r}", dims) for r in ("key", "value")]
    feeds = [("input_ids", ["batch", "q_len"]), ("attention_mask", ["batch", "total_len"])]
    known = {"padding": "any", "logits": "last", "max_positions": POSITIONS} | changes
    return _write(directory, nodes, weights, feeds, states, known)


def _heads(name):
    """[batch, q_len, width] as [batch, heads, q_len, head_dim]."""
    return [
        helper.make_node("MatMul", ["x", f"w{name}"], [name]),
        helper.make_node("Reshape", [name, "split"], [f"{name}_bshd"]),
        helper.make_node("Transpose", [f"{name}_bshd"], [f"{name}4"], perm=[0, 2, 1, 3]),
    ]


def write_bounded(directory, **changes):
    """Logits of a sum over all embeddings, each weighted by its position: state of fixed size."""
    random = np.random.default_rng(1)
    weights = {
        "embedding": random.standard_normal((VOCAB, WIDTH)),
        "wo": random.standard_normal((WIDTH, VOCAB)) / 1000,
    }
    node = helper.make_node
    nodes = [
        node("Gather", ["embedding", "input_ids"], ["x"]),
        node("Add", ["position_ids", "one"], ["counted"]),  # padding, -1, counts nothing
        node("Cast", ["counted"], ["weight"], to=FLOAT),
        node("Unsqueeze", ["weight", "two"], ["weights"]),
        node("Mul", ["x", "weights"], ["weighted"]),
        node("ReduceSum", ["weighted", "one"], ["new"], keepdims=0),
        node("Add", ["past.sums", "new"], ["present.sums"]),
        node("MatMul", ["present.sums", "wo"], ["row"]),
        node("Unsqueeze", ["row", "one"], ["logits"]),
    ]
    state = _state("sums", "sums", ["batch", WIDTH]) | {"role": "sums", "fill": 0.5}
    state |= {"input": "past.sums", "output": "present.sums"}
    feeds = [("input_ids", ["batch", "q_len"]), ("position_ids", ["batch", "q_len"])]
    known = {"padding": "any", "logits": "last", "max_chunk": 3} | changes
    return _write(directory, nodes, weights, feeds, [state], known)


def _state(name, port, dims):
    known = {"name": name, "dims": dims, "dtype": "float32", "fill": 0, "layer": 0}
    ports = {"input": f"past_key_values.{port}", "output": f"present.{port}"}
    return known | ports | {"role": name.removeprefix("layer0_")}


def _write(directory, nodes, weights, feeds, states, changes):
    constants = {name: np.array(value, np.int64) for name, value in CONSTANTS.items()}
    arrays = {name: value.astype(np.float32) for name, value in weights.items()} | constants
    used = {name for node in nodes for name in node.input}
    initializers = [numpy_helper.from_array(a, n) for n, a in arrays.items() if n in used]
    value = helper.make_tensor_value_info
    inputs = [value(name, INT64, dims) for name, dims in feeds]
    inputs += [value(s["input"], FLOAT, s["dims"]) for s in states]
    present = [["present" if d == "past" else d for d in s["dims"]] for s in states]
    outputs = [value("logits", FLOAT, ["batch", "rows", VOCAB])]
    outputs += [value(s["output"], FLOAT, dims) for s, dims in zip(states, present, strict=True)]
    graph = helper.make_graph(nodes, "small", inputs, outputs, initializers)
    model = helper.make_model(graph, opset_imports=OPSETS, ir_version=10)
    known = {"format": 1, "kind": "causal_lm", "name": "small", "ep": "cpu", "states": states}
    known |= {"max_positions": None, "max_chunk": None, "vocab_size": VOCAB, "data": None}
    known |= {"config": None, "generation_config": {"eos_token_id": [1, 2]}, "sha256": UNSEALED}
    model.metadata_props.add(key=KEY, value=metadata_text(known | changes))
    path = directory / "model.onnx"
    path.write_bytes(_with_data(model, path))
    seal(path)
    return path


def _with_data(model, path):
    """Weights moved to a data file."""
    content = bytearray()
    for tensor in model.graph.initializer:
        if len(tensor.raw_data) < 1024:
            continue
        content += b"\0" * (-len(content) % 4096)
        for key, text in (("location", f"{path.name}.data"), ("offset", str(len(content)))):
            tensor.external_data.add(key=key, value=text)
        tensor.external_data.add(key="length", value=str(len(tensor.raw_data)))
        content += tensor.raw_data
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
    data = path.with_name(f"{path.name}.data")
    data.write_bytes(content)
    entry = model.metadata_props[0]
    digest = hashlib.sha256(content).hexdigest()
    known = json.loads(entry.value)
    known["data"] = {"file": data.name, "bytes": len(content), "sha256": digest}
    entry.value = metadata_text(known)
    return model.SerializeToString()
