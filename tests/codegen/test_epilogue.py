"""Pointwise work read off a graph means the same in PyTorch, in C++ and in Triton."""

from __future__ import annotations

import ctypes
import operator
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

from codegen.cpp_kernels.compiler import compile_library, find_compiler, inline_headers
from codegen.epilogue import Epilogue, Operand, Step
from codegen.followers import Untranslatable, epilogue_of, operand_nodes
from codegen.pointwise import FUNCTIONS
from rewriter.errors import InputError

ROWS, COLUMNS = 5, 7
SHAPES = {
    "element": (ROWS, COLUMNS),
    "row": (ROWS, 1),
    "column": (COLUMNS,),
    "scalar": (),
}
F = nn.functional

UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "neg": torch.neg,
    "abs": torch.abs,
    "exp": torch.exp,
    "log": lambda x: torch.log(x.abs() + 0.1),
    "sqrt": lambda x: torch.sqrt(x.abs()),
    "rsqrt": lambda x: torch.rsqrt(x.abs() + 0.1),
    "sin": torch.sin,
    "cos": torch.cos,
    "erf": torch.erf,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "square": torch.square,
    "reciprocal": lambda x: torch.reciprocal(x.abs() + 0.1),
    "cube": lambda x: x**3,
    "power -2": lambda x: (x.abs() + 0.1) ** -2,
    "root": lambda x: x.abs() ** 0.5,
    "inverse root": lambda x: (x.abs() + 0.1) ** -0.5,
    "power of 2": lambda x: 2.0**x,
    "clamp": lambda x: x.clamp(-0.5, 0.5),
    "clamp low": lambda x: x.clamp(min=-0.5),
    "clamp high": lambda x: x.clamp(max=0.5),
    "rsub": lambda x: 1 - x,
    "alpha": lambda x: torch.add(x, x, alpha=3),
    "round bf16": lambda x: x.to(torch.bfloat16).float(),
    "round fp16": lambda x: x.to(torch.float16).float(),
    "where": lambda x: torch.where(x > 0.3, x, -1.0),
    "between": lambda x: torch.where((x > -1) & ~(x >= 1), x, 0.0),
    "outside": lambda x: torch.where((x <= -1) | (x > 1), x, 0.0),
    "is positive": lambda x: (x > 0).float(),
    "masked": lambda x: x.masked_fill(x.lt(0), float("-inf")).exp(),
    "maximum": lambda x: torch.maximum(x, -x),
    "minimum": lambda x: torch.minimum(x, x * x),
}
BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "div": lambda a, b: a / (b.abs() + 0.5),
    "maximum": torch.maximum,
    "gated": lambda a, b: F.silu(b) * a,
    "where": lambda a, b: torch.where(b > 0, a, b),
}


def traced(
    function: Callable[..., Tensor], *arguments: Tensor
) -> tuple[Epilogue | Untranslatable, tuple[Tensor, ...]]:
    """The epilogue of a traced function whose first argument is the site; its operands' tensors."""
    graph = make_fx(lambda *given: function(*given), tracing_mode="fake")(*arguments).graph
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    nodes = [node for node in graph.nodes if node.op == "call_function"]
    by_node = dict(zip(inputs, arguments, strict=True))
    operands = operand_nodes(nodes, inputs[0])
    return epilogue_of(nodes, inputs[0]), tuple(by_node[node] for node in operands)


def translated(
    function: Callable[..., Tensor], *arguments: Tensor
) -> tuple[Epilogue, tuple[Tensor, ...]]:
    epilogue, operands = traced(function, *arguments)
    assert isinstance(epilogue, Epilogue), epilogue
    return epilogue, operands


def in_cpp(cases: Sequence[tuple[Epilogue, Tensor, tuple[Tensor, ...]]]) -> list[Tensor]:
    """Results of compiled C++ text, one function for each case; as an expression too."""
    bodies = []
    for i, (epilogue, _, _) in enumerate(cases):
        parameters = ", ".join(["const float* in", "float* out", *epilogue.cpp_parameters()])
        lines = "\n        ".join(epilogue.cpp_lines("x", "i", "j"))
        whole = epilogue.cpp_expression(f"in[i * {COLUMNS} + j]", "i", "j")
        bodies.append(
            f'extern "C" void f{i}({parameters}) {{\n'
            f"    for (int64_t i = 0; i < {ROWS}; ++i) for (int64_t j = 0; j < {COLUMNS}; ++j) {{\n"
            f"        float x = in[i * {COLUMNS} + j];\n        {lines}\n"
            f"        out[i * {COLUMNS} + j] = x;\n"
            f"        out[{ROWS * COLUMNS} + i * {COLUMNS} + j] = {whole};\n    }}\n}}\n"
        )
    library = compile_library(inline_headers('#include "functions.h"\n' + "".join(bodies)))
    results = []
    for i, (epilogue, value, operands) in enumerate(cases):
        out = torch.full((2, ROWS, COLUMNS), torch.nan)
        extra = epilogue.launch_arguments(operands, ROWS, COLUMNS)
        flat = [value.contiguous(), out, *extra]
        getattr(library, f"f{i}")(
            *(
                ctypes.c_void_p(a.data_ptr()) if isinstance(a, Tensor) else ctypes.c_int64(a)
                for a in flat
            )
        )
        torch.testing.assert_close(out[0], out[1], rtol=0, atol=0, equal_nan=True)
        results.append(out[0])
    return results


needs_compiler = pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler: set CXX")


@needs_compiler
def test_every_function_in_cpp() -> None:
    value = torch.randn(ROWS, COLUMNS) * 2
    other = {kind: torch.randn(shape) for kind, shape in SHAPES.items()}
    wanted, cases = [], []
    for function in (f for n, f in UNARY.items() if "fp16" not in n):
        epilogue, operands = translated(function, value)
        cases.append((epilogue, value, operands))
        wanted.append(function(value))
    for function in BINARY.values():
        for operand in other.values():
            epilogue, operands = translated(function, value, operand)
            cases.append((epilogue, value, operands))
            wanted.append(function(value, operand))
    for (epilogue, _, _), result, expected in zip(cases, in_cpp(cases), wanted, strict=True):
        torch.testing.assert_close(result, expected, rtol=2e-6, atol=2e-6, msg=str(epilogue))


def in_triton(
    epilogue: Epilogue, value: Tensor, operands: Sequence[Tensor], device: str = "cpu"
) -> Tensor:
    pytest.importorskip("triton")
    from codegen.triton_kernels.gated_activation import gated_activation

    value = value.to(device)
    operands = [o.to(device) for o in operands]
    one = torch.ones_like(value)
    return gated_activation(value, one, activation=epilogue, operands=operands).cpu()


@pytest.mark.parametrize("name", UNARY)
def test_functions_of_one_value_in_triton(name: str) -> None:
    value = torch.randn(ROWS, COLUMNS) * 2
    epilogue, operands = translated(UNARY[name], value)
    near = {"rtol": 2**-7, "atol": 1e-6} if "round" in name else {"rtol": 2e-6, "atol": 2e-6}
    torch.testing.assert_close(in_triton(epilogue, value, operands), UNARY[name](value), **near)


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("name", BINARY)
def test_functions_of_an_operand_in_triton(name: str, kind: str) -> None:
    value, other = torch.randn(ROWS, COLUMNS), torch.randn(SHAPES[kind])
    epilogue, operands = translated(BINARY[name], value, other)
    assert [o.kind for o in epilogue.operands] == [kind]
    expected = BINARY[name](value, other)
    torch.testing.assert_close(in_triton(epilogue, value, operands), expected, rtol=2e-6, atol=2e-6)


def _mixture(
    v: Tensor, bias: Tensor, residual: Tensor, weight: Tensor, mask: Tensor, scale: Tensor
) -> Tensor:
    x = F.gelu((v + bias).to(torch.bfloat16).float(), approximate="tanh")
    x = torch.where(mask, x * torch.sigmoid(1.702 * v), x.clamp(-1, 1))
    return (x + residual.float() ** 3 - 0.5 * weight) / (1 + v.abs() * scale)


def _mixture_inputs() -> tuple[Tensor, ...]:
    return (
        torch.randn(ROWS, COLUMNS),
        torch.randn(COLUMNS),
        torch.randn(ROWS, COLUMNS).bfloat16(),
        torch.randn(ROWS, 1),
        torch.randn(ROWS, COLUMNS) > 0,
        torch.rand(()),
    )


@needs_compiler
def test_a_mixture_in_all_languages() -> None:
    inputs = _mixture_inputs()
    epilogue, operands = translated(_mixture, *inputs)
    expected = _mixture(*inputs)
    kinds = [o.name for o in epilogue.operands]
    assert kinds == ["column_0", "element_0", "element_1", "row_0", "scalar_0"]
    assert [o.dtype for o in epilogue.operands][1:3] == [torch.bool, torch.bfloat16]
    torch.testing.assert_close(epilogue.reference(inputs[0], operands), expected)
    (compiled,) = in_cpp([(epilogue, inputs[0], operands)])
    torch.testing.assert_close(compiled, expected, rtol=1e-5, atol=1e-5)
    # The interpreter truncates to bf16 where hardware rounds.
    torch.testing.assert_close(
        in_triton(epilogue, inputs[0], operands), expected, rtol=2**-6, atol=2**-6
    )


def test_operands_of_any_stride() -> None:
    value, other = torch.randn(ROWS, COLUMNS), torch.randn(COLUMNS, ROWS).T
    epilogue, operands = translated(torch.add, value, other)
    torch.testing.assert_close(in_triton(epilogue, value, operands), value + other)


NAMES = st.lists(st.sampled_from(sorted(set(UNARY) - {"exp", "masked", "power of 2"})), min_size=1)


@settings(max_examples=10, deadline=None)
@given(NAMES.filter(lambda names: len(names) <= 5), st.sampled_from(sorted(SHAPES)))
def test_any_chain_means_the_same(names: list[str], kind: str) -> None:
    def chain(v: Tensor, other: Tensor) -> Tensor:
        for name in names:
            v = UNARY[name](v + other).clamp(-9, 9)
        return v

    value, other = torch.randn(ROWS, COLUMNS), torch.randn(SHAPES[kind])
    epilogue, operands = translated(chain, value, other)
    torch.testing.assert_close(epilogue.reference(value, operands), chain(value, other))


def test_equal_work_is_equal_whatever_it_is_called() -> None:
    value, bias = torch.randn(ROWS, COLUMNS), torch.randn(COLUMNS)
    one, _ = translated(lambda v, layers_0_bias: F.silu(v + layers_0_bias), value, bias)
    other, _ = translated(lambda hidden, b: F.silu(hidden + b), value, bias)
    assert one == other
    assert hash(one) == hash(other)
    assert str(one) == "t0=add(value,column_0);t1=silu(t0)"


HOSTILE = [
    "x\n__import__('os').system('true')\n",
    'a"; system("true"); //',
    "x */ int y; /*",
    "ünïcode ☃",
    "$(true)`",
]


@pytest.mark.parametrize("name", HOSTILE)
def test_names_in_a_model_never_reach_the_text(name: str) -> None:
    graph = fx.Graph()
    value, operand = graph.placeholder("value"), graph.placeholder("operand")
    total = graph.call_function(torch.ops.aten.add.Tensor, (value, operand))
    for node in (value, operand, total):
        node.meta["val"] = torch.empty(ROWS, COLUMNS)
        node.name = node._name = name
        node.meta["stack_trace"] = node.meta["nn_module_stack"] = name
    epilogue = epilogue_of([total], value)
    assert isinstance(epilogue, Epilogue)
    lines = epilogue.triton_lines("acc", "m", "n") + epilogue.cpp_lines("acc", "i", "j")
    text = "\n".join(
        [*lines, *epilogue.triton_parameters(), *epilogue.cpp_parameters(), str(epilogue)]
    )
    assert re.fullmatch(r"[\w\s()\[\]+*=,.;:?&<>-]*", text)
    words = set(re.findall(r"[^\W\d_]{4,}", name)) - {"value"}
    assert not words & set(re.findall(r"[^\W\d_]{4,}", text))


def test_text_as_an_argument_is_a_reason() -> None:
    graph = fx.Graph()
    value = graph.placeholder("value")
    scaled = graph.call_function(torch.ops.aten.mul.Tensor, (value, "__import__('os')"))
    for node in (value, scaled):
        node.meta["val"] = torch.empty(ROWS, COLUMNS)
    found = epilogue_of([scaled], value)
    assert found == Untranslatable("an argument is a str, not a tensor or a constant", scaled)


def _double(v: Tensor) -> Tensor:
    return v.double().sin()


REFUSED: list[tuple[str, Callable[..., Tensor], tuple[Tensor, ...]]] = [
    ("not one of the pointwise functions", lambda v: v.cumsum(1), ()),
    ("not one of the pointwise functions", lambda v: v.softmax(-1), ()),
    (
        "neither rows nor columns",
        lambda v, big: v + big,
        (torch.ones(2, 1, 1),),
    ),
    ("gives torch.float64", _double, ()),
    ("operand of torch.int64", lambda v, i: v + i, (torch.arange(COLUMNS),)),
    ("rounding_mode=floor", lambda v: torch.div(v, 2.0, rounding_mode="floor"), ()),
    ("exponent 2.7 is neither", lambda v: v**2.7, ()),
    ("its exponent is not a constant", lambda v, e: v**e, (torch.rand(COLUMNS),)),
    ("a power of -2", lambda v: (-2.0) ** v, ()),
    ("its result is bool", lambda v: v > 0, ()),
]


@pytest.mark.parametrize(("reason", "function", "others"), REFUSED)
def test_what_cannot_be_translated_is_a_reason(
    reason: str, function: Callable[..., Tensor], others: tuple[Tensor, ...]
) -> None:
    found, _ = traced(function, torch.randn(ROWS, COLUMNS), *others)
    assert isinstance(found, Untranslatable)
    assert reason in found.reason
    assert isinstance(found.node, fx.Node)


def test_shapes_that_broadcast_otherwise_are_a_reason() -> None:
    value = torch.randn(2, 3, COLUMNS)
    found, _ = traced(torch.add, value, torch.randn(3, 1))
    assert isinstance(found, Untranslatable)
    assert "neither rows nor columns" in found.reason
    folded, _ = traced(torch.add, value, torch.randn(2, 3, 1))
    assert isinstance(folded, Epilogue)
    assert folded.operands[0].kind == "row"


def test_nodes_without_metadata_are_a_reason() -> None:
    graph = fx.Graph()
    value = graph.placeholder("value")
    assert epilogue_of([], value) == Untranslatable("its shape is not known", value)
    value.meta["val"] = torch.empty(2, 3)
    assert epilogue_of([], value) == Epilogue()
    plain = graph.call_function(operator.neg, (value,))
    assert epilogue_of([plain], value) == Untranslatable("its dtype is not known", plain)
    plain.meta["val"] = torch.empty(2, 3)
    assert str(epilogue_of([plain], value)) == "t0=neg(value)"


def test_constants_are_rounded_to_fp32() -> None:
    steps = tuple(Step("maximum", ("value", c)) for c in (0.1, float("-inf"), 1e300, -2.0))
    epilogue = Epilogue(steps)
    assert "0.10000000149011612f" in epilogue.cpp_lines("x", "i", "j")[0]
    assert "(-INFINITY)" in epilogue.cpp_lines("x", "i", "j")[1]
    assert 'float("inf")' in epilogue.triton_lines("x", "i", "j")[2]
    assert "-2.0" in epilogue.triton_lines("x", "i", "j")[3]


def test_wrong_operands_are_refused() -> None:
    epilogue = Epilogue(
        (Step("add", ("value", "row_0")),), (Operand("row_0", "row", torch.float32),)
    )
    with pytest.raises(InputError, match="0 operands for an epilogue that takes 1"):
        epilogue.launch_arguments([], 2, 3)
    with pytest.raises(InputError, match=r"row_0: torch.float64 where torch.float32"):
        epilogue.launch_arguments([torch.zeros(2, 1).double()], 2, 3)
    with pytest.raises(InputError, match=r"row_0: shape \(3,\) is not \(2, 1\)"):
        epilogue.launch_arguments([torch.zeros(3)], 2, 3)


@contextmanager
def fresh_texts() -> Iterator[None]:
    """No text that was made earlier is used inside, and none that is made inside later."""
    pytest.importorskip("triton")
    from codegen.triton_kernels.generate import described

    described.cache_clear()
    try:
        yield
    finally:
        described.cache_clear()


@needs_compiler
@pytest.mark.parametrize("function", ["tanh", "gelu_tanh", "silu", "sub", "where", "maximum"])
def test_a_wrong_translation_is_noticed(function: str, monkeypatch: pytest.MonkeyPatch) -> None:
    true = FUNCTIONS[function]
    wrong = type(true)(true.torch, true.triton + " + 0.001", f"({true.cpp}) + 0.001f", true.is_bool)
    monkeypatch.setitem(FUNCTIONS, function, wrong)
    arguments: dict[str, tuple[str | float, ...]] = {
        "sub": ("value", 1.0),
        "maximum": ("value", 1.0),
        "where": ("t0", "value", 0.0),
    }
    first = (Step("gt", ("value", 0.0)),) if function == "where" else ()
    epilogue = Epilogue((*first, Step(function, arguments.get(function, ("value",)))))
    value = torch.randn(ROWS, COLUMNS)
    with fresh_texts():
        results = (in_cpp([(epilogue, value, ())])[0], in_triton(epilogue, value, ()))
    for result in results:
        with pytest.raises(AssertionError):
            torch.testing.assert_close(result, epilogue.reference(value), rtol=2e-6, atol=2e-6)
