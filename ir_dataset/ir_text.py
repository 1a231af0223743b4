"""Printed LLVM assembly as modules, functions and instructions; needs no LLVM.

One pass over the text with regular expressions and dictionaries, about 5 µs an instruction. Metadata
and debug records go first. Then each function's local values, blocks and globals are renamed in the
order in which they appear, types are named by what they hold and attribute groups by what they say, so
that what is left depends on what the function does and not on how its producer names things.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from ir_dataset.ir_instruction import SHAPES, Shape, matching_bracket, split_top, type_end

__all__ = ["Block", "Function", "Module", "parse_module"]

_NAME = r'"[^"]*"|[-\w.$]+'
_TOKEN = re.compile(rf'([%@](?:{_NAME})|c?"[^"]*"|#\d+)')
_DEBUG = re.compile(r"\n +#dbg_[^\n]*")
_ATTACHMENT = re.compile(r", ![-a-zA-Z$._\\][-\w$.\\]* !\d+")
_HEAD_ATTACHMENT = re.compile(r" ![-a-zA-Z$._\\][-\w$.\\]* !\d+")
_OPERAND = re.compile(r'\bmetadata !(?:\d+|"[^"]*"|\w+\([^)]*\))')
_CONTINUED = re.compile(r"\n(?: {3,}|  (?=\]))")
_LABEL = re.compile(rf"\n+({_NAME}):[^\n]*")
_ENTRY = re.compile(rf"\n(?:{_NAME}):[^\n]*")
_TYPE = re.compile(rf"^(%(?:{_NAME})) = type (.*)$", re.MULTILINE)
_GROUP = re.compile(r"^attributes (#\d+) = \{ (.*) \}$", re.MULTILINE)
_ATTRIBUTE = re.compile(r'"[^"]*"(?:="[^"]*")?|[-\w.]+(?:=\w+)?(?:\((?:[^()]|\([^()]*\))*\))?')
_HEAD = re.compile(rf"define (.*?)@({_NAME})\(")
_OUTSIDE = re.compile(rf"[;\s]*\b(?:section|partition) \"[^\"]*\"|\bcomdat(?:\(\$(?:{_NAME})\))?|"
                      r"\b(?:local_)?unnamed_addr\b")  # fmt: skip
_TARGETS = re.compile(r"\blabel (%\S*?)(?=[,\s\]]|$)")

LINKAGES = frozenset(
    "private internal available_externally linkonce weak common appending extern_weak linkonce_odr"
    " weak_odr external".split()
)
_PLACES = LINKAGES | frozenset(
    "dso_local dso_preemptable default hidden protected dllimport dllexport".split()
)


@dataclass(frozen=True, slots=True)
class Block:
    """A basic block: its label in the normalised body, and its instructions' positions."""

    label: str
    start: int
    stop: int
    targets: tuple[str, ...]
    """Labels that its terminator may go to, each once, in the order of the text."""


@dataclass(slots=True)
class Function:
    """A defined function.

    `body` is its normalised text: `%0`, `%1`, … for values and blocks, `@0`, … for globals.
    """

    name: str
    linkage: str
    signature: str
    """Normalised: calling convention, result, parameters, attributes; no name, no linkage."""
    result: str
    parameters: tuple[str, ...]
    attributes: tuple[str, ...]
    comdat: bool
    lines: list[str]
    """Normalised instructions and labels, as they stand in the body."""
    shapes: list[Shape]
    blocks: list[Block]
    globals: tuple[str, ...]
    """Globals in the order in which the function mentions them, intrinsics and itself left out."""

    @property
    def body(self) -> str:
        """The normalised text after the signature."""
        return "\n".join(self.lines)

    def instructions(self) -> Iterator[str]:
        """Normalised instructions, in the order of `shapes`."""
        return (line for line in self.lines if line.startswith(" "))

    @property
    def callees(self) -> list[str]:
        """Names of the functions that it calls directly, one a call, intrinsics left out."""
        found = []
        for line, shape in zip(self.instructions(), self.shapes, strict=True):
            if shape.callee == "@":
                number = _CALLEE.search(line)
                if number:
                    found.append(self.globals[int(number.group(1))])
        return found


_CALLEE = re.compile(r"@(\d+)\(")


@dataclass(slots=True)
class Module:
    """A parsed module."""

    triple: str = ""
    layout: str = ""
    functions: list[Function] = field(default_factory=list)
    globals: list[str] = field(default_factory=list)
    """Lines of variables, aliases and ifuncs without metadata and `dso_local`, which only tells what
    the object is linked into; types named by what they hold."""
    declarations: list[str] = field(default_factory=list)
    types: dict[str, str] = field(default_factory=dict)
    """What each named type holds, by the name that normalised text gives it."""
    attributes: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """What each attribute group says, by the name that normalised text gives it."""
    asm: list[str] = field(default_factory=list)

    @property
    def n_instructions(self) -> int:
        """Over all functions."""
        return sum(len(function.shapes) for function in self.functions)


class _Shared(dict[str, str]):
    """How types, attribute groups and everything else that a module shares are written."""

    def __missing__(self, token: str) -> str:
        return token


class _Names(dict[str, str]):
    """A function's names, numbered when first seen; `skeleton` is what shapes are looked up by."""

    def __init__(self, shared: Mapping[str, str]) -> None:
        super().__init__()
        self.shared = shared
        self.skeleton: dict[str, str] = {}
        self.globals: list[str] = []
        self.locals = 0

    def __missing__(self, token: str) -> str:
        kind = token[0]
        if token in self.shared:
            written = self.shared[token]
            short = "#" if kind == "#" else written
        elif kind == "%":
            written, short = f"%{self.locals}", "%"
            self.locals += 1
        elif kind == "@" and not token.startswith("@llvm."):
            written, short = f"@{len(self.globals)}", "@"
            self.globals.append(_bare(token[1:]))
        else:
            written = token
            short = token if kind == "@" else '""'
        self[token] = written
        self.skeleton[token] = short
        return written


def _bare(name: str) -> str:
    return name[1:-1] if name.startswith('"') else name


def _short(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:12]


def parse_module(text: str) -> Module:
    """Take assembly apart as LLVM prints it.

    Text that LLVM did not print may give a module without functions, never an error.
    """
    module = Module()
    outside, bodies, position = [], [], 0
    text = "\n" + text
    while True:
        start = text.find("\ndefine ", position)
        if start < 0:
            break
        stop = text.find("\n}", start)
        if stop < 0:
            break
        outside.append(text[position:start])
        bodies.append((start + 1, stop))
        position = stop + 2
    outside.append(text[position:])
    rest = "\n".join(outside)
    metadata = rest.find("\n!")  # stands last
    rest = rest[:metadata] if metadata >= 0 else rest
    shared, attributes = _shared_names(rest)
    for name, body in _TYPE.findall(rest):
        module.types[shared[name]] = _TOKEN.sub(lambda match: shared[match.group()], body)
    module.attributes = {shared[name]: said for name, said in attributes.items()}
    _outside(module, rest, shared)
    for start, stop in bodies:
        module.functions.append(_function(text[start:stop], shared, attributes))
    return module


def _shared_names(text: str) -> tuple[_Shared, dict[str, tuple[str, ...]]]:
    shared = _Shared()
    bodies = {
        name: body
        for name, body in _TYPE.findall(text)
        if not name[1:].isdigit()  # would be taken for values
    }
    for name in bodies:
        _name_type(name, bodies, shared)
    attributes = {}
    for name, body in _GROUP.findall(text):
        said = tuple(sorted(_ATTRIBUTE.findall(body)))
        attributes[name] = said
        shared[name] = "#" + _short(" ".join(said))
    return shared, attributes


def _name_type(name: str, bodies: Mapping[str, str], shared: _Shared) -> None:
    """Name a type by what it holds; nothing holds itself since pointers are opaque.

    Chains of types are followed with a stack of our own, since theirs may be long.
    """
    waiting = [name]
    while waiting:
        top = waiting[-1]
        inner = [token for token in _TOKEN.findall(bodies[top]) if token in bodies]
        missing = [token for token in inner if token not in shared and token not in waiting]
        if missing:
            waiting.extend(missing[:1])
            continue
        written = _TOKEN.sub(lambda match: shared.get(match.group(), match.group()), bodies[top])
        shared[top] = f"%T.{_short(written)}"
        waiting.pop()


def _outside(module: Module, text: str, shared: _Shared) -> None:
    for line in text.split("\n"):
        if line.startswith("@"):
            module.globals.append(_written(line, shared))
        elif line.startswith("declare "):
            module.declarations.append(_written(line, shared))
        elif line.startswith("target triple"):
            module.triple = line.split('"')[1]
        elif line.startswith("target datalayout"):
            module.layout = line.split('"')[1]
        elif line.startswith("module asm"):
            module.asm.append(line)


def _written(line: str, shared: _Shared) -> str:
    if " !" in line:
        line = _HEAD_ATTACHMENT.sub("", _ATTACHMENT.sub("", line))
    parts = _TOKEN.split(line)
    parts[1::2] = [shared[token] for token in parts[1::2]]
    return "".join(parts).replace(" dso_local ", " ").rstrip()


def _function(text: str, shared: _Shared, attributes: Mapping[str, tuple[str, ...]]) -> Function:
    end = text.find("{\n") if "{\n" in text else len(text)
    head, body = text[:end], text[end + 1 :]
    if " !" in head:
        head = _HEAD_ATTACHMENT.sub("", head)
    names = _Names(shared)
    found = _HEAD.match(head)
    prefix, own, opened = (
        (found.group(1), found.group(2), found.end() - 1) if found else ("", "", 0)
    )
    closed = matching_bracket(head, opened)
    tail = _OUTSIDE.sub("", head[closed:])
    words = prefix.split(" ")
    linkage = next((word for word in words if word in LINKAGES), "external")
    kept = " ".join(word for word in words if word not in _PLACES)
    parameters, result = head[opened + 1 : closed - 1], _result(kept)
    names["@" + own], names.skeleton["@" + own] = "@self", "@"
    signature = _renamed(f"{kept}({parameters}){' '.join(['', *tail.split()])}", names)[0]
    groups = [group for group in re.findall(r"#\d+", tail) if group in attributes]
    lines, shapes, blocks = _body(body, names)
    return Function(
        name=_bare(own),
        linkage=linkage,
        signature=signature,
        result=result,
        parameters=tuple(split_top(parameters)),
        attributes=tuple(item for group in groups for item in attributes[group]),
        comdat="comdat" in head[closed:],
        lines=lines,
        shapes=shapes,
        blocks=blocks,
        globals=tuple(names.globals),
    )


def _result(prefix: str) -> str:
    """The result's type: the last type of what precedes the name."""
    start = 0
    while start < len(prefix):
        end = type_end(prefix, start)
        if end > start and prefix[end:].strip() == "":
            return prefix[start:end]
        step = prefix.find(" ", start)
        if step < 0:
            break
        opened = prefix.find("(", start, step)
        start = matching_bracket(prefix, opened) if opened >= 0 else step
        while start < len(prefix) and prefix[start] == " ":
            start += 1
    return prefix.rpartition(" ")[2]


def _renamed(text: str, names: _Names) -> tuple[str, str]:
    """The text with names by first appearance, and as skeletons."""
    parts = _TOKEN.split(text)
    tokens = parts[1::2]
    parts[1::2] = [names[token] for token in tokens]
    normal = "".join(parts)
    skeleton = names.skeleton
    parts[1::2] = [skeleton[token] for token in tokens]
    return normal, "".join(parts)


def _body(text: str, names: _Names) -> tuple[list[str], list[Shape], list[Block]]:
    if "#dbg_" in text:
        text = _DEBUG.sub("", text)
    if " !" in text:
        text = _ATTACHMENT.sub("", text)
    if "metadata !" in text:
        text = _OPERAND.sub("metadata !", text)
    if "\n   " in text or "\n  ]" in text:
        text = _CONTINUED.sub(" ", text)
    entry = _ENTRY.match(text)
    if entry:
        text = text[entry.end() :]
    text = _LABEL.sub(r"\n%\1:", text)
    normal, skeleton = _renamed(text.strip("\n"), names)
    lines = normal.split("\n")
    shapes: list[Shape] = []
    blocks: list[Block] = []
    label, start, last = "", 0, ""
    for line, key in zip(lines, skeleton.split("\n"), strict=True):
        if key.startswith(" "):
            shapes.append(SHAPES[key])
            last = line
        else:
            blocks.append(_block(label, start, len(shapes), last))
            label, start = line[:-1], len(shapes)
    blocks.append(_block(label, start, len(shapes), last))
    return lines, shapes, blocks


def _block(label: str, start: int, stop: int, last: str) -> Block:
    targets = _TARGETS.findall(last) if "label " in last else ()
    return Block(label, start, stop, tuple(dict.fromkeys(targets)))
