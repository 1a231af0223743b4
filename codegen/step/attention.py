"""Rotary embedding, key-value state and attention of a step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from codegen.epilogue import cpp_constant
from codegen.step.extent import Extent
from codegen.step.pointwise import stored
from codegen.step.share import SHARE_FLOATS
from codegen.step.text import Parameters
from codegen.step.value import Refusal, Value

if TYPE_CHECKING:
    from codegen.step.plan import Planner

__all__ = ["AttentionPhases", "bound", "emit_attention", "emit_kv_append", "emit_rope", "is_given"]

_MASKS = {
    "full": "FULL",
    "causal": "CAUSAL",
    "sliding_window": "SLIDING_WINDOW",
    "chunked": "CHUNKED",
    "prefix": "PREFIX",
    "local": "LOCAL",
}
_BLOCK = 64
"""`rw::KV_BLOCK`."""


def emit_rope(plan: Planner, node: fx.Node) -> Value:
    """Pairs turned, the rest copied; heads are shared among threads."""
    cos, sin = (plan.tensor(node.args[i]) for i in (1, 2))
    return turned(plan, node, plan.tensor(node.args[0]), cos, sin, plan.fact(node).dtype)


def turned(
    plan: Planner, node: fx.Node, x: Value, cos: Value, sin: Value, dtype: torch.dtype
) -> Value:
    """x [batch, heads, rows, width] turned by tables that broadcast to [.., width of them]."""
    batch, heads, rows, width = _four(x)
    result = plan.room(x.shape, dtype)
    half = cos.fixed_shape[-1]
    cos, sin = (table.expanded((batch, heads, rows, half)) for table in (cos, sin))
    if cos.strides != sin.strides:
        raise Refusal("tables of two layouts")
    parameters = Parameters()
    out, given = parameters.write(result), parameters.read(x)
    c, s = parameters.read(cos), parameters.read(sin)
    pair = "2 * i, b = 2 * i + 1" if node.kwargs.get("interleaved") else f"i, b = i + {half}"
    first, second = "first * c - second * s", "second * c + first * s"
    rest = f"for (int64_t i = {2 * half}; i < {width}; ++i) y[i] = rw::to_float(x[i * {x.strides[3]}]);"
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
        y[a] = {stored(result.dtype, first)};
        y[b] = {stored(result.dtype, second)};
    }}
    {rest if 2 * half < width else ""}
}}"""
    shares = plan.shares_of(batch * heads * rows * width, SHARE_FLOATS)
    plan.phase(node, "rope", body.strip(), parameters, "vec.h", shares=shares)
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
    start = plan.extent(offset)
    pairs = [(plan.tensor(k_cache), plan.tensor(k)), (plan.tensor(v_cache), plan.tensor(v))]
    append(plan, node, pairs, Parameters(), str(start))


def append(
    plan: Planner,
    node: fx.Node,
    pairs: Sequence[tuple[Value, Value]],
    parameters: Parameters,
    entry: str,
) -> None:
    """Each new tensor [batch, heads, rows, width] into its cache, from C++ `entry` of a `batch` on."""
    parts = []
    batch, heads, rows, _ = _four(pairs[0][1])
    for cache, new in pairs:
        out, given, width = parameters.write(cache), parameters.read(new), _four(new)[3]
        parts.append(f"""
    for (int64_t row = 0; row < {rows}; ++row) {{
        const auto* x = {given} + {_at(new)};
        auto* y = {out} + batch * {_factor(cache.strides[0])} + head * {_factor(cache.strides[1])}
            + ({entry} + row) * {_factor(cache.strides[2])};
        for (int64_t i = 0; i < {width}; ++i)
            y[i] = rw::from_float<{cache.place.element}>(rw::to_float(x[i * {new.strides[3]}]));
    }}""")
    body = f"""
const rw::Range mine = rw::share({batch * heads}, thread, num_threads);
for (int64_t r = mine.begin; r < mine.end; ++r) {{
    const int64_t batch = r / {heads}, head = r % {heads};{"".join(parts)}
}}"""
    shares = plan.shares_of(batch * heads * _four(pairs[0][1])[3], SHARE_FLOATS)
    plan.phase(node, "kv_append", body.strip(), parameters, "vec.h", shares=shares)


def emit_attention(plan: Planner, node: fx.Node) -> Value:
    """Attention over kept entries at their own positions, or at those that are given."""
    arguments = bound(node)
    q, k, v = plan.tensor(arguments["q"]), plan.tensor(arguments["k"]), plan.tensor(arguments["v"])
    mask, span = f"rw::Mask::{_MASKS[arguments['mask']]}", plan.extent(arguments.get("span") or 0)
    code = AttentionPhases(plan, node, q, k, v)
    positions = [arguments.get(name) for name in ("q_positions", "k_positions")]
    given = [is_given(plan, p) for p in positions]
    if any(given):
        if not all(given):
            raise Refusal("positions of queries alone")
        code.score("mask", mask)
        code.score("span", str(span))
        for name, node_of in zip(("q", "k"), positions, strict=True):
            value = plan.tensor(node_of)
            code.score(f"{name}_positions", code.parameters.read(value))
            code.score(f"{name}_batch", str(value.strides[0]))
        mask = "rw::Mask::FULL"
    code.bias(arguments.get("bias"))
    code.common(arguments)
    spans = f"rw::visible_spans({mask}, {span}, 0, 1, {k.shape[2]})"
    return code.emit(spans, float(arguments["softmax_scale"]))


class AttentionPhases:
    """The phases of an attention of one new token, whatever its entries are."""

    def __init__(self, plan: Planner, node: fx.Node, q: Value, k: Value, v: Value) -> None:
        self.plan, self.node, self.parameters = plan, node, Parameters()
        if k.place.element != v.place.element or (k.strides[3], v.strides[3]) != (1, 1):
            raise Refusal("keys and values of two layouts")
        batch, heads, rows, self.width = _four(q)
        if rows != 1:
            raise Refusal(f"{rows} new tokens, 1 is allowed")
        if not q.is_contiguous or q.place.slot is not None:
            q = plan.copy(q, node)
        self.batch, self.heads, self.kv_heads = batch, heads, int(k.shape[1])
        self.group, self.value_width = heads // self.kv_heads, int(v.shape[3])
        self.kv_len, self.element = k.shape[2], k.place.element
        self.result = plan.new(node)
        self.query = self.parameters.read(q)
        key, value = self.parameters.read(k), self.parameters.read(v)
        self.out = self.parameters.write(self.result)
        strides = ", ".join(map(str, (*k.strides[:3], *v.strides[:3])))
        self.setup = [
            f"const rw::AttentionShape shape{{{batch}, {self.kv_heads}, {self.group}, 1}};",
            f"const rw::StridedEntries<{self.element}> kept{{{key}, {value},\n    {strides}}};",
        ]
        self.entries, self.headers = "kept", ["decode_attention.h", "attention_scores.h"]
        self.sink = "nullptr"
        self._scores: list[str] = []

    def score(self, field: str, value: str) -> None:
        """Set a field of `rw::Scores`."""
        self._scores.append(f"scores.{field} = {value};")

    def bias(self, node: Any) -> None:
        """Added to the scores, or their visibility; broadcasts to [batch, heads, 1, kv_len]."""
        if not is_given(self.plan, node):
            return
        value = self.plan.tensor(node)
        lead = (1,) * (4 - len(value.shape)) + value.shape[:-1]
        whole = (self.batch, self.heads, 1, value.shape[-1])
        if lead[2] != 1 or (value.shape[-1] not in (1, self.kv_len)):
            raise Refusal(f"a bias of {list(value.shape)}")
        if value.place.element not in ("float", "bool"):
            value = self.plan.copy(value, self.node)
        value = value.expanded(whole)
        name = "seen" if value.place.element == "bool" else "bias"
        self.score(name, self.parameters.read(value))
        entry = 0 if value.shape[-1] == 1 else value.strides[3]
        parts = zip(("batch", "head", "entry"), (*value.strides[:2], entry), strict=True)
        for part, stride in parts:
            self.score(f"{name}_{part}", str(stride))

    def common(self, arguments: dict[str, Any]) -> None:
        """Soft-cap, ALiBi slopes and sinks, as arguments of the operators name them."""
        softcap = float(arguments.get("softcap") or 0.0)
        if softcap:
            self.score("softcap", cpp_constant(softcap))
        if is_given(self.plan, arguments.get("slopes")):
            self.score("slopes", self.floats(arguments["slopes"]))
        if is_given(self.plan, arguments.get("sinks")):
            self.sink = self.floats(arguments["sinks"])

    def floats(self, node: Any) -> str:
        """A pointer to a contiguous fp32 tensor."""
        value = self.plan.contiguous(node)
        value = value if value.place.element == "float" else self.plan.copy(value, node)
        return self.parameters.read(value)

    def scratch(self, floats: int) -> str:
        """A pointer to memory for this attention alone."""
        place = self.plan.arena.take(floats)
        return self.parameters.write(Value(place, (floats,), (1,), torch.float32))

    def emit(self, spans: str, softmax_scale: float) -> Value:
        """Append the phases; the result lies like that of `rewriter::attention`."""
        threads = self.plan.threads
        part = -(-self.group * (self.value_width + 2) // 16) * 16
        each = 2 * part + self.group * _BLOCK + -(-self.group // 16) * 16
        memory = self.scratch(threads * each)
        score = "rw::PlainScores{}"
        if self._scores:
            score = "scores"
            self.setup += [f"rw::Scores scores{{{self.group}, 1, {self.kv_len}}};", *self._scores]
        store = stored(self.result.dtype, "values[i]")
        common = "\n".join([
            *self.setup,
            f"const rw::Spans spans = {spans};",
            "auto visible = [&](int64_t) { return spans; };",
            "auto out = [&](int64_t row, const float* values, float) {",
            f"    for (int i = 0; i < {self.value_width}; ++i)",
            f"        {self.out}[row * {self.value_width} + i] = {store};",
            "};",
        ])  # fmt: skip
        last = f"{self.sink}, {memory}, out, thread, num_threads"
        calls = {
            "attention": f"rw::decode_attention<{self.width}, {self.value_width}>(\n    shape,"
            f" {self.query}, {self.entries}, visible, {score}, {cpp_constant(softmax_scale)}, {last});",
            "attention_merge": f"rw::decode_attention_merge<{self.value_width}>(\n    shape, visible,"
            f" {last});",
        }
        if self.batch * self.kv_heads % threads == 0:  # then no KV head has parts to be joined
            del calls["attention_merge"]
        for name, call in calls.items():
            body = f"{common}\n{call}"
            self.plan.phase(self.node, name, body, self.parameters, *self.headers, shares=threads)
        return self.result


def bound(node: fx.Node) -> dict[str, Any]:
    """Arguments of a node by name."""
    target: Any = node.target
    names = [argument.name for argument in target._schema.arguments]
    return dict(zip(names, node.args, strict=False)) | dict(node.kwargs)


def is_given(plan: Planner, argument: Any) -> bool:
    """Whether an optional tensor is there in this call."""
    if not isinstance(argument, fx.Node):
        return argument is not None
    return not (argument in plan.facts and plan.facts[argument] is None)
