"""Ordinary `@triton.jit` functions to readable, self-contained, specialised text.

The text has a comment that says where it comes from, the kernel and what it calls with their own
comments, its `tl.constexpr` parameters bound to values, and `LAUNCH`, which says how to launch it.
Two marker comments in a kernel become text of an epilogue:

| marker | becomes |
|---|---|
| `# +operands` in the parameters | a pointer and two strides for each operand |
| `# +epilogue: acc [row, column]` | lines that load the operands and assign to the fp32 tile `acc` |
| `# +epilogue: acc [row, column] mask [rows_valid, columns_valid]` | the same, masked; `True` = all |

`row` and `column` are expressions of int64 indices that broadcast to the tile. The same kernel,
constants and epilogue give the same text, whatever else the process did.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import importlib
import importlib.util
import inspect
import math
import re
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from codegen.cache import cached_text, content_hash
from codegen.epilogue import Epilogue
from codegen.kernel import Kernel, KernelDescription
from codegen.triton_kernels import activations
from rewriter.errors import RewriterError

__all__ = [
    "GenerateError",
    "Launch",
    "described",
    "generate",
    "launch",
    "launched_by",
    "load",
    "load_file",
    "pointer",
    "run",
    "specialised",
    "unaligned",
]

_TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int8: "i8",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.bool: "i1",
}
_EPILOGUE = re.compile(
    r"^(?P<indent> *)# \+epilogue: (?P<value>\w+) \[(?P<at>.+?)\](?: mask \[(?P<mask>.+)\])?$"
)
_HASH = "# Hash of the text below: "
_OPERANDS = re.compile(r"^(?P<indent> *)# \+operands\n", re.MULTILINE)


class GenerateError(RewriterError):
    """A kernel's text cannot be generated: a defect of the kernel's file, not of what was asked for."""


@dataclass(frozen=True)
class Launch:
    """How a generated kernel is launched; in the text as the dictionary `LAUNCH`.

    Attributes:
        grid: up to three expressions over the names of parameters and constants and `cdiv`.
        num_warps, num_stages: of the compiler.
    """

    grid: tuple[str, ...]
    num_warps: int = 4
    num_stages: int = 2


def generate(
    kernel: Any,
    *,
    description: object,
    source_url: str,
    signature: Mapping[str, str],
    constants: Mapping[str, int | float | bool | str | None],
    launch: Launch,
    epilogue: Epilogue | None = None,
) -> str:
    """The text of a module with one specialised kernel.

    Args:
        kernel: a function under `@triton.jit`, in a file.
        description: what it is specialised to, for the comment.
        source_url: paper or page of the method; "" where there is none.
        signature: types of the parameters that are not `tl.constexpr`, in Triton's notation, e.g.
            `"*bf16:16"` (aligned to 16 bytes), `"i64:16"` (divisible by 16), `"i64:1"` (one), `"fp32"`.
            The part behind the colon is used in ahead-of-time compilation alone.
        constants: values of all `tl.constexpr` parameters.
        epilogue: takes the place of the markers; None removes them.

    Raises:
        GenerateError: a parameter without a type or value, or a name the text could not have.
    """
    parts = _Parts()
    body = parts.add_kernel(kernel, constants, epilogue or Epilogue())
    types = dict(signature)
    if epilogue is not None:
        types |= epilogue.triton_parameters()
        for name in sorted(epilogue.functions & set(activations.__all__)):
            parts.add_function(getattr(activations, name))
    names = _parameters(body)
    told = [name for name in names if name not in constants]
    if sorted(told) != sorted(types):
        raise GenerateError(f"{kernel.fn.__name__}: parameters {told} have types for {list(types)}")
    launched = {
        "kernel": kernel.fn.__name__,
        "signature": {name: types[name] for name in told},
        "constants": {name: constants[name] for name in names if name in constants},
        "grid": launch.grid,
        "num_warps": launch.num_warps,
        "num_stages": launch.num_stages,
    }
    text = "\n\n".join((parts.text(), body, _shown(launched)))
    text = f'"""{kernel.fn.__name__}, specialised; launch it as `LAUNCH` says."""\n\n{text}'
    return _provenance(description, kernel.fn.__module__, source_url, text)


def unaligned(text: str) -> str:
    """The text to compile for sizes and strides of any number, not multiples of 16 alone.

    Pointers stay aligned, as allocators give them.
    """
    head, mark, body = text.partition(_HASH)
    _, _, body = body.partition("\n")
    body = body.replace('"i64:16"', '"i64"')
    return f"{head}{mark}{content_hash(body)}\n{body}"


def specialised(text: str, types: Mapping[str, str]) -> str:
    """The text to compile for one launch: types of parameters by name, as in `generate`'s signature."""
    head, mark, body = text.partition(_HASH)
    _, _, body = body.partition("\n")
    before, start, launched = body.partition("\nLAUNCH = {")
    for name, kind in types.items():
        row = re.compile(rf'^        "{re.escape(name)}": ".*",$', re.MULTILINE)
        launched = row.sub(f'        "{name}": "{kind}",', launched, count=1)
    body = before + start + launched
    return f"{head}{mark}{content_hash(body)}\n{body}"


@functools.lru_cache(maxsize=512)
def load(text: str) -> ModuleType:
    """Import generated text from the cache; the same text gives the same module."""
    return load_file(cached_text(text, ".py"))


def load_file(path: Path) -> ModuleType:
    """Import one file with generated text."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise GenerateError(f"{path} cannot be imported")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


Launcher = Callable[[str, tuple[int, ...], Sequence[Any]], None]
_LAUNCHER: ContextVar[Launcher | None] = ContextVar("launcher", default=None)


@contextlib.contextmanager
def launched_by(launcher: Launcher) -> Iterator[None]:
    """What would be launched in the block goes to `launcher` instead, with text, grid and arguments."""
    token = _LAUNCHER.set(launcher)
    try:
        yield
    finally:
        _LAUNCHER.reset(token)


def launch(text: str, grid: tuple[int, ...], arguments: Sequence[Any]) -> None:
    """Run generated text on tensors and numbers in the order of its parameters; not on an empty grid."""
    if not all(grid):
        return
    other = _LAUNCHER.get()
    if other is not None:
        other(text, grid, arguments)
        return
    module = load(text)
    how = module.LAUNCH
    kernel = getattr(module, how["kernel"])
    kernel[grid](*arguments, num_warps=how["num_warps"], num_stages=how["num_stages"])


@functools.lru_cache(maxsize=4096)
def described(kernel: Kernel, description: KernelDescription, config: Any = None) -> str:
    """The kernel's text for a description, made once; `config` of a `TunedKernel`, None = as it ships."""
    if config is None:
        return kernel.source(description)
    tuned: Any = kernel
    return tuned.configured_source(description, config)


def run(
    kernel: Kernel,
    description: KernelDescription,
    grid: tuple[int, ...],
    arguments: Sequence[Any],
    config: Any = None,
) -> None:
    """`launch` the text of a description."""
    launch(described(kernel, description, config), grid, arguments)


def pointer(dtype: torch.dtype, alignment: int = 16) -> str:
    """The type of a pointer in a signature, e.g. `"*bf16:16"`; alignment in bytes, 0 for none."""
    return f"*{_TYPES[dtype]}" + (f":{alignment}" if alignment else "")


class _Parts:
    """What a kernel needs besides itself, each thing once, in an order in which it can be defined."""

    def __init__(self) -> None:
        self.constants: dict[str, str] = {}
        self.functions: dict[str, str] = {}

    def text(self) -> str:
        head = "from __future__ import annotations\n\nimport triton\nimport triton.language as tl\n"
        if self.constants:
            head += "\n" + "\n".join(self.constants.values()) + "\n"
        return "\n\n".join((head, *self.functions.values()))

    def add_kernel(self, kernel: Any, constants: Mapping[str, Any], epilogue: Epilogue) -> str:
        source = _source(kernel.fn)
        self._add_needs(source, kernel.fn)
        return _with_epilogue(_bind(source, constants), epilogue)

    def add_function(self, function: Any) -> None:
        name, source = function.fn.__name__, _source(function.fn)
        self._add_needs(source, function.fn)
        self._put(self.functions, name, source)

    def _add_needs(self, source: str, function: Any) -> None:
        module = inspect.getmodule(function)
        if module is None:
            raise GenerateError(f"{function.__name__} is in no module")
        for name in _names_read(source):
            if name in function.__globals__ and name not in ("tl", "triton"):
                self._add_name(name, function.__globals__[name], module)

    def _add_name(self, name: str, value: Any, module: ModuleType) -> None:
        if hasattr(value, "fn"):
            if name != value.fn.__name__:
                raise GenerateError(
                    f"{module.__name__}: {name} is {value.fn.__name__} by another name"
                )
            self.add_function(value)
            return
        home, source = _definition(name, module)
        for needed in _names_read(source):
            if needed not in ("tl", "triton", name) and hasattr(home, needed):
                self._add_name(needed, getattr(home, needed), home)
        self._put(self.constants, name, source)

    @staticmethod
    def _put(place: dict[str, str], name: str, source: str) -> None:
        if place.setdefault(name, source) != source:
            raise GenerateError(f"two different things are called {name}")


def _source(function: Any) -> str:
    """Its text under a plain `@triton.jit`."""
    source = textwrap.dedent(inspect.getsource(function))
    start = re.search(r"^def ", source, re.MULTILINE)
    if start is None:
        raise GenerateError(f"{function.__name__} is not a plain function")
    return "@triton.jit\n" + source[start.start() :]


def _names_read(source: str) -> Iterator[str]:
    """Free names of the code, annotations left out, each once, in order."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.arg | ast.AnnAssign):
            node.annotation = ast.Constant(None)
        if isinstance(node, ast.FunctionDef):
            node.returns = None
    names = [n for n in ast.walk(tree) if isinstance(n, ast.Name)]
    own = {n.id for n in names if isinstance(n.ctx, ast.Store)}
    own |= {n.arg for n in ast.walk(tree) if isinstance(n, ast.arg)}
    ordered = sorted(names, key=lambda n: (n.lineno, n.col_offset))
    yield from dict.fromkeys(n.id for n in ordered if n.id not in own)


def _definition(name: str, module: ModuleType) -> tuple[ModuleType, str]:
    """The module and the text of the assignment that gives a constant its value."""
    text = inspect.getsource(module)
    for node in ast.parse(text).body:
        if isinstance(node, ast.Assign) and [ast.unparse(t) for t in node.targets] == [name]:
            return module, f"{ast.get_source_segment(text, node)}"
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                if (alias.asname or alias.name) == name == alias.name:
                    return _definition(name, importlib.import_module(node.module))
    raise GenerateError(f"{module.__name__}: {name} is neither a constant nor a kernel's function")


def _parameters(source: str) -> list[str]:
    function = ast.parse(source).body[0]
    assert isinstance(function, ast.FunctionDef)
    return [argument.arg for argument in function.args.args]


def _bind(source: str, constants: Mapping[str, Any]) -> str:
    """The source with the values of constants as defaults of its parameters."""
    function = ast.parse(source).body[0]
    assert isinstance(function, ast.FunctionDef)
    bound = [
        a for a in function.args.args if a.annotation and "constexpr" in ast.unparse(a.annotation)
    ]
    if sorted(a.arg for a in bound) != sorted(constants):
        asked = [a.arg for a in bound]
        raise GenerateError(f"{function.name}: constants {asked} have values for {list(constants)}")
    lines = source.splitlines()
    for argument in reversed(bound):
        row, end = (argument.end_lineno or argument.lineno) - 1, argument.end_col_offset
        line = lines[row].encode()
        value = f" = {_literal(constants[argument.arg])}".encode()
        lines[row] = (line[:end] + value + line[end:]).decode()
    return "\n".join(lines) + "\n"


def _literal(value: Any) -> str:
    if isinstance(value, float) and not math.isfinite(value):
        return f'float("{value}")'
    return repr(value)


def _with_epilogue(source: str, epilogue: Epilogue) -> str:
    parameters = [f"{name}: tl.tensor,\n" for name in epilogue.triton_parameters()]
    found = _OPERANDS.search(source)
    if epilogue.operands and found is None:
        raise GenerateError("the kernel has no place for operands: `# +operands`")
    source = _OPERANDS.sub(lambda m: "".join(m["indent"] + p for p in parameters), source)
    lines, places = [], 0
    for line in source.splitlines():
        marker = _EPILOGUE.match(line)
        if marker is None:
            lines.append(line)
            continue
        places += 1
        row, column = _pair(marker["at"])
        masks = _pair(marker["mask"]) if marker["mask"] else ("True", "True")
        told = epilogue.triton_lines(marker["value"], row, column, *masks)
        lines += [marker["indent"] + text for text in told]
    if epilogue.steps and not places:
        raise GenerateError("the kernel has no place for an epilogue: `# +epilogue: ...`")
    return "\n".join(lines) + "\n"


def _pair(text: str) -> tuple[str, str]:
    """Two expressions of "a, b"."""
    parsed = ast.parse(f"({text})", mode="eval").body
    if not isinstance(parsed, ast.Tuple) or len(parsed.elts) != 2:
        raise GenerateError(f"[{text}] in a marker is not [row, column]")
    first, second = (ast.unparse(part) for part in parsed.elts)
    return first, second


def _shown(value: dict[str, Any]) -> str:
    lines = ["LAUNCH = {"]
    for name, entry in value.items():
        if isinstance(entry, dict):
            inner = [f'        "{k}": {_quoted(v)},' for k, v in entry.items()]
            lines += [f'    "{name}": {{', *inner, "    },"]
        else:
            lines.append(f'    "{name}": {_quoted(entry)},')
    return "\n".join([*lines, "}"]) + "\n"


def _quoted(value: Any) -> str:
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    if isinstance(value, tuple):
        return "(" + ", ".join(map(_quoted, value)) + ("," if len(value) == 1 else "") + ")"
    return _literal(value)


def _provenance(description: object, name: str, source_url: str, text: str) -> str:
    """The text below a comment that says where it comes from."""
    told = [
        f"Generated by rewriter {_version()} from {name}; change that, not this text.",
        f"Description: {description}",
        *([f"Source: {source_url}"] if source_url else []),
    ]
    head = "".join(f"# {' '.join(line.split())}\n" for line in told)
    return f"{head}{_HASH}{content_hash(text)}\n{text}"


def _version() -> str:
    try:
        return version("rewriter")
    except PackageNotFoundError:
        return "from source"
