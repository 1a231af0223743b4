"""Norms, rows of tables and joined tensors of a step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import fx

from codegen.epilogue import cpp_constant
from codegen.step.pointwise import stored
from codegen.step.share import SHARE_FLOATS
from codegen.step.text import Parameters
from codegen.step.value import Refusal, Value

if TYPE_CHECKING:
    from codegen.step.plan import Planner

__all__ = [
    "emit_cat",
    "emit_embedding",
    "emit_int8_embedding",
    "emit_layer_norm",
    "emit_rms_norm",
]


def emit_rms_norm(plan: Planner, node: fx.Node) -> Value:
    """x / sqrt(mean(x²) + eps) · (weight_offset + weight), rounded as `rewriter::rms_norm` rounds."""
    x, weight = (*node.args, None)[:2]
    offset = float(node.kwargs.get("weight_offset", 0.0) or 0.0)  # pyright: ignore
    wide = bool(node.kwargs.get("wide_weight")) or offset != 0.0
    given = plan.in_arena(x)
    result, parameters = plan.new(node), Parameters()
    out, source = parameters.write(result), parameters.read(given)
    width, count = _width(given)
    normed = "x[i] * scale"
    if weight is not None:
        factor = f"rw::to_float({parameters.read(plan.contiguous(weight))}[i])"
        factor = f"({cpp_constant(offset)} + {factor})" if offset else factor
        normed = f"{normed if wide else stored(result.dtype, normed)} * {factor}"
    eps = cpp_constant(float(node.kwargs["eps"]))  # pyright: ignore
    body = f"""
const rw::Range mine = rw::share({count}, thread, num_threads);
for (int64_t r = mine.begin; r < mine.end; ++r) {{
    const float* x = {source} + r * {width};
    float* y = {out} + r * {width};
    const float scale = 1.0f / std::sqrt(rw::sum_of_squares(x, 0, {width}) / {width} + {eps});
    for (int64_t i = 0; i < {width}; ++i) y[i] = {stored(result.dtype, normed)};
}}"""
    shares = plan.shares_of(width * count, SHARE_FLOATS)
    plan.phase(node, "rms_norm", body.strip(), parameters, "rms_norm.h", shares=min(shares, count))
    return result


def emit_layer_norm(plan: Planner, node: fx.Node) -> Value:
    """(x - mean) / sqrt(var + eps) · weight + bias."""
    x, weight, bias = (*node.args, None, None)[:3]
    given = plan.in_arena(x)
    result, parameters = plan.new(node), Parameters()
    out, source = parameters.write(result), parameters.read(given)
    width, count = _width(given)
    normed = "(x[i] - mean) * scale"
    if weight is not None:
        normed += f" * rw::to_float({parameters.read(plan.contiguous(weight))}[i])"
    if bias is not None:
        normed += f" + rw::to_float({parameters.read(plan.contiguous(bias))}[i])"
    eps = cpp_constant(float(node.kwargs["eps"]))  # pyright: ignore
    body = f"""
const rw::Range mine = rw::share({count}, thread, num_threads);
for (int64_t r = mine.begin; r < mine.end; ++r) {{
    const float* x = {source} + r * {width};
    float* y = {out} + r * {width};
    const float mean = rw::sum_over(0, {width}, [&](int64_t i) {{ return rw::load(x + i); }},
                                    [&](int64_t i) {{ return x[i]; }}) / {width};
    for (int64_t i = 0; i < {width}; ++i) y[i] = x[i] - mean;
    const float scale = 1.0f / std::sqrt(rw::sum_of_squares((const float*)y, 0, {width}) / {width} + {eps});
    for (int64_t i = 0; i < {width}; ++i) y[i] = {stored(result.dtype, normed)};
}}"""
    shares = plan.shares_of(width * count, SHARE_FLOATS)
    plan.phase(
        node, "layer_norm", body.strip(), parameters, "rms_norm.h", shares=min(shares, count)
    )
    return result


def emit_embedding(plan: Planner, node: fx.Node) -> Value:
    """Rows of a table, the session having checked that it has them."""
    return _looked_up(plan, node, node.args[0], node.args[1], None)


def emit_int8_embedding(plan: Planner, node: fx.Node) -> Value:
    """The same from int8 rows with a scale each."""
    table, scale, ids = node.args[:3]
    return _looked_up(plan, node, table, ids, scale)


def _looked_up(plan: Planner, node: fx.Node, table: Any, ids: Any, scale: Any) -> Value:
    table, ids = plan.tensor(table), plan.contiguous(ids)
    if ids.place.element != "int64_t" or table.strides[1] != 1:
        raise Refusal("ids that are not int64, or a table whose rows are not contiguous")
    result, parameters = plan.new(node), Parameters()
    out, rows, which = parameters.write(result), parameters.read(table), parameters.read(ids)
    width, count = _width(result)
    value = "rw::to_float(row[i])"
    if scale is not None:
        factor = f"rw::to_float({parameters.read(plan.contiguous(scale))}[{which}[r]])"
        value = stored(result.dtype, f"{value} * {factor}")
    body = f"""
const rw::Range mine = rw::share({width}, thread, num_threads, 16);
for (int64_t r = 0; r < {count}; ++r) {{
    const auto* row = {rows} + {which}[r] * {table.strides[0]};
    for (int64_t i = mine.begin; i < mine.end; ++i) {out}[r * {width} + i] = {value};
}}"""
    plan.phase(node, "embedding", body.strip(), parameters, "vec.h")
    return result


def emit_cat(plan: Planner, node: fx.Node) -> Value:
    """Tensors joined along a dimension: one copy each."""
    parts: Any = node.args[0]
    result = plan.new(node)
    dim: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    at = int(dim) % len(result.shape)
    parameters = Parameters()
    out = parameters.write(result)
    inner, lines, first = 1, [], 0
    for extent in result.fixed_shape[at + 1 :]:
        inner *= extent
    row = inner * result.fixed_shape[at]
    for part in parts:
        value = plan.contiguous(part)
        width = value.fixed_shape[at] * inner
        count = 1
        for extent in value.fixed_shape[:at]:
            count *= extent
        given = parameters.read(value)
        lines.append(
            f"for (int64_t r = 0; r < {count}; ++r)\n"
            f"    for (int64_t i = 0; i < {width}; ++i)\n"
            f"        {out}[r * {row} + {first} + i] = rw::to_float({given}[r * {width} + i]);"
        )
        first += width
    plan.phase(node, "cat", "\n".join(lines), parameters, "vec.h")
    return result


def _width(value: Value) -> tuple[int, int]:
    """Width of the last dimension, and how many rows of it there are."""
    shape = value.fixed_shape
    count = 1
    for extent in shape[:-1]:
        count *= extent
    return shape[-1], count
