"""Rotary embedding, key-value state and attention of a step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from codegen.epilogue import cpp_constant
from codegen.step.extent import Extent
from codegen.step.pointwise import stored
from codegen.step.text import Parameters
from codegen.step.value import Refusal, Value

if TYPE_CHECKING:
    from codegen.step.plan import Planner

__all__ = ["emit_attention", "emit_kv_append", "emit_rope", "emit_streaming_attention"]

_MASKS = {
    "full": "FULL",
    "causal": "CAUSAL",
    "sliding_window": "SLIDING_WINDOW",
    "chunked": "CHUNKED",
    "prefix": "PREFIX",
    "local": "LOCAL",
}


def emit_rope(plan: Planner, node: fx.Node) -> Value:
    """Pairs turned, the rest copied; heads are shared among threads."""
    x = plan.tensor(node.args[0])
    batch, heads, rows, width = _four(x)
    result = plan.new(node)
    tables = [plan.tensor(node.args[i]) for i in (1, 2)]
    half = tables[0].fixed_shape[-1]
    cos, sin = (table.expanded((batch, heads, rows, half)) for table in tables)
    if cos.strides != sin.strides:
        raise Refusal("tables of two layouts")
    parameters = Parameters()
    out, given = parameters.write(result), parameters.read(x)
    c, s = parameters.read(cos), parameters.read(sin)
    pair = "2 * i, b = 2 * i + 1" if node.kwargs.get("interleaved") else f"i, b = i + {half}"
    turned = "first * c - second * s", "second * c + first * s"
    body = f"""
const rw::Range mine = rw::share({batch * heads * rows}, thread, num_threads);
for (int64_t r = mine.begin; r < mine.end; ++r) {{
    const int64_t batch = r / {heads * rows}, head = r / {rows} % {heads}, row = r % {rows};
    const auto* x = {given} + {_at(x)};
    const int64_t table = {_at(cos)};
    float* y = {out} + r * {width};
    for (int64_t i = 0; i < {half}; ++i) {{
        const int64_t a = {pair}, at = table + i * {cos.strides[3]};
        const float first = rw::to_float(x[a * {x.strides[3]}]);
        const float second = rw::to_float(x[b * {x.strides[3]}]);
        const float c = rw::to_float({c}[at]), s = rw::to_float({s}[at]);
        y[a] = {stored(result.dtype, turned[0])};
        y[b] = {stored(result.dtype, turned[1])};
    }}
    for (int64_t i = {2 * half}; i < {width}; ++i) y[i] = rw::to_float(x[i * {x.strides[3]}]);
}}"""
    plan.phase(node, "rope", body.strip(), parameters, "vec.h")
    return result


def _at(value: Value) -> str:
    """Of a row (batch, head, row) of a tensor of four dimensions."""
    batch, head, row, _ = value.strides
    return f"batch * {_factor(batch)} + head * {_factor(head)} + row * {_factor(row)}"


def _factor(stride: Extent) -> str:
    return str(stride) if isinstance(stride, int) else f"({stride})"


def _four(value: Value) -> tuple[int, int, int, int]:
    shape = value.fixed_shape
    if len(shape) != 4:
        raise Refusal(f"{len(shape)} dimensions, 4 are allowed")
    return shape


def emit_kv_append(plan: Planner, node: fx.Node) -> None:
    """New keys and values into their places, in the dtype of the state."""
    k_cache, v_cache, k, v, offset = node.args
    parts = []
    parameters = Parameters()
    start = plan.extent(offset)
    for cache_node, new_node in ((k_cache, k), (v_cache, v)):
        new, cache = plan.tensor(new_node), plan.tensor(cache_node)
        batch, heads, rows, width = _four(new)
        out, given = parameters.write(cache), parameters.read(new)
        parts.append(f"""
for (int64_t r = mine.begin; r < mine.end; ++r) {{
    const int64_t batch = r / {heads}, head = r % {heads};
    for (int64_t row = 0; row < {rows}; ++row) {{
        const auto* x = {given} + {_at(new)};
        auto* y = {out} + batch * {_factor(cache.strides[0])} + head * {_factor(cache.strides[1])}
            + ({start} + row) * {_factor(cache.strides[2])};
        for (int64_t i = 0; i < {width}; ++i)
            y[i] = rw::from_float<{cache.place.element}>(rw::to_float(x[i * {new.strides[3]}]));
    }}
}}""")
    heads_all = batch * heads  # pyright: ignore[reportPossiblyUnboundVariable]
    share = f"const rw::Range mine = rw::share({heads_all}, thread, num_threads);"
    plan.phase(node, "kv_append", share + "".join(parts), parameters, "vec.h")


def emit_attention(plan: Planner, node: fx.Node) -> Value:
    """Attention over kept entries, whose positions are their numbers."""
    arguments = _bound(node)
    for name in ("q_positions", "k_positions", "bias", "slopes"):
        if _given(plan, arguments.get(name)):
            raise Refusal(f"{name} is given")
    q, k, v = _query(plan, arguments["q"]), plan.tensor(arguments["k"]), plan.tensor(arguments["v"])
    kv_len, mask = k.shape[2], _MASKS[arguments["mask"]]
    span = plan.extent(arguments.get("span") or 0)
    parameters = Parameters()
    code = _Attention(plan, node, q, k, v, parameters)
    softcap = float(arguments.get("softcap") or 0.0)
    score = "rw::PlainScores{}"
    if softcap:
        score = "scores"
        code.setup.append(
            f"rw::Scores scores{{{q.shape[1]} / {k.shape[1]}, {q.shape[2]}, {kv_len}}};\n"
            f"scores.softcap = {cpp_constant(softcap)};"
        )
    if q.shape[2] != 1:
        raise Refusal(f"{q.shape[2]} new tokens, 1 is allowed")
    code.setup.append(
        f"const rw::Spans spans = rw::visible_spans(rw::Mask::{mask}, {span}, 0, 1, {kv_len});"
    )
    code.sinks(arguments.get("sinks"))
    return code.emit(score, float(arguments["softmax_scale"]))


class _Attention:
    """The two phases of an attention, whatever its entries are."""

    def __init__(
        self, plan: Planner, node: fx.Node, q: Value, k: Value, v: Value, parameters: Parameters
    ) -> None:
        self.plan, self.node, self.parameters = plan, node, parameters
        self.q, self.k, self.v = q, k, v
        if k.place.element != v.place.element or (k.strides[3], v.strides[3]) != (1, 1):
            raise Refusal("keys and values of two layouts")
        self.result = plan.new(node)
        self.width, self.value_width = int(k.shape[3]), int(v.shape[3])
        self.query, self.key, self.value = (parameters.read(t) for t in (q, k, v))
        self.out = parameters.write(self.result)
        batch, heads, rows, _ = q.fixed_shape
        kv_heads = int(k.shape[1])
        self.group_rows = heads // kv_heads * rows
        self.shape = f"{{{batch}, {kv_heads}, {heads // kv_heads}, {rows}}}"
        self.setup: list[str] = []
        self.entries = ""
        self.sink = "nullptr"

    def sinks(self, node: Any) -> None:
        """Logits that only count in the denominator, fp32."""
        if not isinstance(node, fx.Node):
            return
        value = self.plan.contiguous(node)
        value = value if value.place.element == "float" else self.plan.copy(value, node)
        self.sink = self.parameters.read(value)

    def emit(self, score: str, softmax_scale: float) -> Value:
        """Append both phases; the result lies like `rewriter::attention`'s."""
        plan = self.plan
        threads = torch.get_num_threads()
        part = -(-self.group_rows * (self.value_width + 2) // 16) * 16
        each = 2 * part + self.group_rows * 64 + -(-self.group_rows // 16) * 16
        scratch = Value(plan.arena.take(threads * each), (threads * each,), (1,), torch.float32)
        memory = self.parameters.write(scratch)
        element = self.k.place.element
        strides = (*self.k.strides[:3], *self.v.strides[:3])
        store = stored(self.result.dtype, "values[i]")
        common = "\n".join([
            f"const rw::AttentionShape shape{self.shape};",
            f"const rw::StridedEntries<{element}> entries_at{{{self.key}, {self.value},"
            f" {', '.join(map(str, strides))}}};",
            *self.setup,
            "auto visible = [&](int64_t) { return spans; };",
            "auto out = [&](int64_t row, const float* values, float) {",
            f"    for (int i = 0; i < {self.value_width}; ++i)"
            f" {self.out}[row * {self.value_width} + i] = {store};",
            "};",
        ])  # fmt: skip
        first = (
            f"rw::decode_attention<{self.width}, {self.value_width}>(shape, {self.query}, entries_at,"
            f" visible, {score}, {cpp_constant(softmax_scale)}, {self.sink}, {memory}, out, thread,"
            " num_threads);"
        )
        second = (
            f"rw::decode_attention_merge<{self.value_width}>(shape, visible, {self.sink}, {memory},"
            " out, thread, num_threads);"
        )
        header = ("decode_attention.h",)
        plan.phase(self.node, "attention", f"{common}\n{first}", self.parameters, *header)
        batch, kv_heads = int(self.q.shape[0]), int(self.k.shape[1])
        if batch * kv_heads % threads:
            plan.phase(self.node, "attention_merge", f"{common}\n{second}", self.parameters, *header)
        return self.result


def _query(plan: Planner, node: Any) -> Value:
    """Queries in the arena, row-major."""
    value = plan.contiguous(node)
    return value if value.place.slot is None else plan.copy(value, node)


def _bound(node: fx.Node) -> dict[str, Any]:
    schema: Any = node.target
    names = [argument.name for argument in schema._schema.arguments]
    return dict(zip(names, node.args, strict=False)) | dict(node.kwargs)


def _given(plan: Planner, argument: Any) -> bool:
    """Whether an optional tensor is there in this call."""
    if not isinstance(argument, fx.Node):
        return argument is not None
    return not (argument in plan.facts and plan.facts[argument] is None)


def emit_streaming_attention(plan: Planner, node: fx.Node) -> Value:
    """Not in C++ yet for keys that are turned as they are read."""
    raise Refusal("keys kept before their rotation")
