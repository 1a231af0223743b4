"""Pointwise functions: what each is in PyTorch, in Triton and in C++, and which aten operators they are.

A template's `{0}` is a name or a constant, never an expression, so using it twice costs nothing.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx
from torch.nn import functional

__all__ = ["FUNCTIONS", "Call", "Function", "translate"]

aten = torch.ops.aten


@dataclass(frozen=True)
class Function:
    """One pointwise function in three languages; the text ones are templates of `str.format`."""

    torch: Callable[..., Any]
    triton: str
    cpp: str
    is_bool: bool = False


@dataclass(frozen=True)
class Call:
    """A function of `FUNCTIONS`, or `"copy"`, on nodes, constants and the result of the call before it."""

    function: str
    arguments: tuple[Any, ...]
    PREVIOUS: ClassVar[object] = object()


def _as_tensor(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Let constants take the place of tensors."""

    def call(*arguments: Any) -> Tensor:
        return function(*(torch.as_tensor(a) for a in arguments))

    return call


def _compare(compare: Callable[..., Any], sign: str) -> Function:
    return Function(compare, f"{{0}} {sign} {{1}}", f"{{0}} {sign} {{1}}", is_bool=True)


_ALL = "propagate_nan=tl.PropagateNan.ALL"

FUNCTIONS: dict[str, Function] = {
    "copy": Function(lambda x: x, "{0}", "{0}"),
    "add": Function(operator.add, "{0} + {1}", "{0} + {1}"),
    "sub": Function(operator.sub, "{0} - {1}", "{0} - {1}"),
    "mul": Function(operator.mul, "{0} * {1}", "{0} * {1}"),
    "div": Function(operator.truediv, "{0} / {1}", "{0} / {1}"),
    "neg": Function(torch.neg, "-{0}", "-{0}"),
    "abs": Function(torch.abs, "tl.abs({0})", "std::fabs({0})"),
    "exp": Function(torch.exp, "tl.exp({0})", "rw::exp_({0})"),
    "log": Function(torch.log, "tl.log({0})", "std::log({0})"),
    "sqrt": Function(torch.sqrt, "tl.sqrt({0})", "std::sqrt({0})"),
    "rsqrt": Function(torch.rsqrt, "tl.rsqrt({0})", "1.0f / std::sqrt({0})"),
    "sin": Function(torch.sin, "tl.sin({0})", "rw::sin_({0})"),
    "cos": Function(torch.cos, "tl.cos({0})", "rw::cos_({0})"),
    "erf": Function(torch.erf, "tl.erf({0})", "rw::erf_({0})"),
    "tanh": Function(torch.tanh, "tanh({0})", "rw::tanh_({0})"),
    "sigmoid": Function(torch.sigmoid, "tl.sigmoid({0})", "rw::sigmoid({0})"),
    "silu": Function(functional.silu, "silu({0})", "rw::silu({0})"),
    "gelu": Function(functional.gelu, "gelu({0})", "rw::gelu({0})"),
    "gelu_tanh": Function(
        lambda x: functional.gelu(x, approximate="tanh"), "gelu_tanh({0})", "rw::gelu_tanh({0})"
    ),
    "relu": Function(functional.relu, f"tl.maximum({{0}}, 0.0, {_ALL})", "rw::relu({0})"),
    "maximum": Function(
        _as_tensor(torch.maximum),
        f"tl.maximum({{0}}, {{1}}, {_ALL})",
        "{1} > {0} || {1} != {1} ? {1} : {0}",
    ),
    "minimum": Function(
        _as_tensor(torch.minimum),
        f"tl.minimum({{0}}, {{1}}, {_ALL})",
        "{1} < {0} || {1} != {1} ? {1} : {0}",
    ),
    "where": Function(torch.where, "tl.where({0}, {1}, {2})", "{0} ? {1} : {2}"),
    "gt": _compare(operator.gt, ">"),
    "ge": _compare(operator.ge, ">="),
    "lt": _compare(operator.lt, "<"),
    "le": _compare(operator.le, "<="),
    "eq": _compare(operator.eq, "=="),
    "ne": _compare(operator.ne, "!="),
    "and": Function(operator.and_, "{0} & {1}", "{0} && {1}", is_bool=True),
    "or": Function(operator.or_, "{0} | {1}", "{0} || {1}", is_bool=True),
    "not": Function(operator.invert, "~{0}", "!{0}", is_bool=True),
    "float_of_bool": Function(lambda x: x.float(), "tl.where({0}, 1.0, 0.0)", "{0} ? 1.0f : 0.0f"),
    "round_bfloat16": Function(
        lambda x: x.to(torch.bfloat16).float(),
        "{0}.to(tl.bfloat16).to(tl.float32)",
        "rw::to_float(rw::round_bf16({0}))",
    ),
    "round_float16": Function(
        lambda x: x.to(torch.float16).float(),
        "{0}.to(tl.float16).to(tl.float32)",
        "rw::to_float(rw::round_f16({0}))",
    ),
}

Calls = tuple[Call, ...]
Rule = Callable[[dict[str, Any]], Calls | str]
_LARGEST_POWER = 8


def translate(node: fx.Node) -> Calls | str:
    """The calls that compute `node`, each on its arguments or the result before; or why there are none."""
    if node.op != "call_function":
        return f"it is a {node.op}, not a call of a function"
    target = node.target
    arguments: dict[str, Any]
    if isinstance(target, torch._ops.OpOverload):
        rule = _RULES.get(target.overloadpacket)
        given = dict(zip((a.name for a in target._schema.arguments), node.args, strict=False))
        arguments = {a.name: a.default_value for a in target._schema.arguments}
        arguments |= given | node.kwargs
    else:
        rule = _RULES.get(_PYTHON.get(target))
        arguments = dict(zip(("self", "other"), node.args, strict=False))
    if rule is None:
        return "it is not one of the pointwise functions that kernels know"
    return rule(arguments)


def _plain(function: str, *names: str) -> Rule:
    return lambda a: (Call(function, tuple(a[name] for name in names or ("self",))),)


def _scaled(function: str, first: str, second: str) -> Rule:
    """`first ± alpha · second`."""

    def rule(a: dict[str, Any]) -> Calls:
        alpha = a.get("alpha", 1)
        if alpha == 1:
            return (Call(function, (a[first], a[second])),)
        return (Call("mul", (a[second], alpha)), Call(function, (a[first], Call.PREVIOUS)))

    return rule


def _constant(a: dict[str, Any]) -> Calls | str:
    """A tensor of one element that the graph makes on the spot."""
    if any(size != 1 for size in a.get("size", ())):
        return "it fills a tensor"
    return (Call("copy", (a["s"] if "s" in a else a["fill_value"],)),)


def _divide(a: dict[str, Any]) -> Calls | str:
    if a.get("rounding_mode") is not None:
        return f"it rounds: rounding_mode={a['rounding_mode']}"
    return (Call("div", (a["self"], a["other"])),)


def _gelu(a: dict[str, Any]) -> Calls:
    return (Call("gelu_tanh" if a["approximate"] == "tanh" else "gelu", (a["self"],)),)


def _clamp(a: dict[str, Any]) -> Calls:
    bounds = (("maximum", a.get("min")), ("minimum", a.get("max")))
    asked = [(function, bound) for function, bound in bounds if bound is not None]
    subjects = (a["self"], Call.PREVIOUS)
    return tuple(
        Call(function, (subject, bound))
        for subject, (function, bound) in zip(subjects, asked, strict=False)
    )


def _power(a: dict[str, Any]) -> Calls | str:
    base, exponent = a["self"], a["exponent"]
    if isinstance(base, int | float):
        if base <= 0:
            return f"it is a power of {base}, which is not positive"
        return (Call("mul", (exponent, math.log(base))), Call("exp", (Call.PREVIOUS,)))
    if not isinstance(exponent, int | float):
        return "its exponent is not a constant"
    roots = {0.5: "sqrt", -0.5: "rsqrt"}
    if exponent in roots:
        return (Call(roots[exponent], (base,)),)
    if exponent != int(exponent) or abs(exponent) > _LARGEST_POWER or exponent == 0:
        return (
            f"its exponent {exponent} is neither ±0.5 nor a whole number of 1 to {_LARGEST_POWER}"
        )
    product = [Call("copy", (base,))]
    product += [Call("mul", (Call.PREVIOUS, base))] * (abs(int(exponent)) - 1)
    return tuple(product if exponent > 0 else [*product, Call("div", (1.0, Call.PREVIOUS))])


def _cast(a: dict[str, Any]) -> Calls | str:
    source: Any = a.get("self", a.get("a"))
    example: Any = source.meta.get("val") if isinstance(source, fx.Node) else None
    if not isinstance(example, Tensor):
        return "it casts what is not a tensor"
    if a.get("device") is not None and torch.device(a["device"]) != example.device:
        return f"it moves to {a['device']}"
    dtype = a.get("dtype") or example.dtype
    from_bool = (Call("float_of_bool", (source,)),) if example.dtype == torch.bool else ()
    if dtype == example.dtype:
        return (Call("copy", (source,)),)
    if dtype == torch.bool:
        return (Call("ne", (source, 0.0)),)
    if dtype == torch.float32 or from_bool:
        return from_bool or (Call("copy", (source,)),)
    return (Call(f"round_{str(dtype).removeprefix('torch.')}", (source,)),)


_PYTHON: dict[Any, Any] = {
    operator.add: aten.add,
    operator.sub: aten.sub,
    operator.mul: aten.mul,
    operator.truediv: aten.div,
    operator.neg: aten.neg,
}

_RULES: dict[Any, Rule] = {
    **{
        getattr(aten, name): _plain(name)
        for name in "neg abs exp log sqrt rsqrt sin cos erf tanh sigmoid silu relu".split()
    },
    **{
        getattr(aten, name): _plain(name, "self", "other")
        for name in "mul maximum minimum gt ge lt le eq ne".split()
    },
    aten.add: _scaled("add", "self", "other"),
    aten.sub: _scaled("sub", "self", "other"),
    aten.rsub: _scaled("sub", "other", "self"),
    aten.div: _divide,
    aten.reciprocal: lambda a: (Call("div", (1.0, a["self"])),),
    aten.square: lambda a: (Call("mul", (a["self"], a["self"])),),
    aten.pow: _power,
    aten.gelu: _gelu,
    aten.clamp: _clamp,
    aten.clamp_min: _clamp,
    aten.clamp_max: _clamp,
    aten.where: _plain("where", "condition", "self", "other"),
    aten.masked_fill: _plain("where", "mask", "value", "self"),
    aten.logical_and: _plain("and", "self", "other"),
    aten.logical_or: _plain("or", "self", "other"),
    aten.logical_not: _plain("not"),
    aten.__and__: _plain("and", "self", "other"),
    aten.__or__: _plain("or", "self", "other"),
    aten.bitwise_and: _plain("and", "self", "other"),
    aten.bitwise_or: _plain("or", "self", "other"),
    aten.bitwise_not: _plain("not"),
    aten._to_copy: _cast,
    aten.to: _cast,
    torch.ops.prims.convert_element_type: _cast,
    aten.scalar_tensor: _constant,
    aten.full: _constant,
    aten.clone: _plain("copy"),
    aten.alias: _plain("copy"),
    aten.detach: _plain("copy"),
}
