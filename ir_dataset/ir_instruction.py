"""What one printed instruction is: opcode, type, operands, callee; names and numbers of values left out.

Instructions of a corpus repeat: with each local value written `%`, each global `@`, and metadata gone,
`%12 = load ptr, ptr %3, align 8` is `% = load ptr, ptr %, align 8`, and one in ten lines is new. So a
line like this, a skeleton, is looked at once, and `SHAPES[skeleton]` answers from then on.

Source of the grammar: https://llvm.org/docs/LangRef.html
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass

__all__ = [
    "CALLS",
    "SHAPES",
    "TERMINATORS",
    "Shape",
    "matching_bracket",
    "split_top",
    "type_class",
    "type_end",
]

CALLS = frozenset({"call", "invoke", "callbr"})
TERMINATORS = frozenset(
    "ret br switch indirectbr invoke callbr resume unreachable catchswitch catchret cleanupret".split()
)
_CASTS = frozenset(
    "trunc zext sext fptrunc fpext fptoui fptosi uitofp sitofp ptrtoint ptrtoaddr inttoptr bitcast"
    " addrspacecast".split()
)
_FLAGS = frozenset(
    "nuw nsw exact disjoint nneg samesign fast nnan ninf nsz arcp contract afn reassoc inbounds nusw"
    " atomic volatile weak inalloca swifterror tail musttail notail".split()
)
_OPEN, _CLOSE = "([{<", ")]}>"
_TYPE_WORD = re.compile(
    r"(?:void|i\d+|half|bfloat|float|double|fp128|x86_fp80|ppc_fp128|x86_amx|x86_mmx|ptr|label|metadata"
    r"|token|opaque)\b"
)
_TYPE_NAME = re.compile(r'%(?:"[^"]*"|[-\w.$]+)')
_WORD = re.compile(r"[-\w.$]+")
_INTRINSIC = re.compile(r"@llvm\.[-\w.$]+")
_NUMBER = re.compile(r"-?\d|0x|f0x|true\b|false\b|null\b|undef\b|poison\b|zeroinitializer\b|none\b")


@dataclass(frozen=True, slots=True)
class Shape:
    """An instruction without the names of what it reads and writes."""

    skeleton: str
    opcode: str
    type: str
    """Of the result; where there is none, of the first operand (`store`, `ret`, `switch`, …)."""
    operands: tuple[tuple[str, str], ...]
    """Kind (`value`, `constant`, `global`, `block`, `metadata`, `asm`) and type of each."""
    callee: str = ""
    """`@llvm.…` for an intrinsic, `@` for a function, `%` for a pointer, `asm`; empty: not a call."""
    token: str = ""
    """Opcode and type, aggregates without their insides: what functions are compared by."""
    code: int = 0
    """First 64 bits of the token's hash, equal on every machine."""

    @property
    def is_terminator(self) -> bool:
        """Whether it ends its block."""
        return self.opcode in TERMINATORS


class _Shapes(dict[str, Shape]):
    """Shapes by skeleton, made when first asked for; forgets all when there are too many."""

    LIMIT = 100_000

    def __missing__(self, skeleton: str) -> Shape:
        if len(self) >= self.LIMIT:
            self.clear()
        shape = self[skeleton] = _parse(skeleton)
        return shape


SHAPES = _Shapes()


def matching_bracket(text: str, start: int) -> int:
    """Position after the bracket that closes the one at `start`; the text's length if none does."""
    depth, index, end = 0, start, len(text)
    while index < end:
        char = text[index]
        if char in _OPEN:
            depth += 1
        elif char in _CLOSE:
            depth -= 1
            if depth == 0:
                return index + 1
        elif char == '"':
            index = text.find('"', index + 1)
            if index < 0:
                return end
        index += 1
    return end


def type_end(text: str, start: int = 0) -> int:
    """Position after the type that begins at `start`; `start` itself where none does."""
    if start >= len(text):
        return start
    first = text[start]
    if first in "[{<":
        return matching_bracket(text, start)
    if first == "%":
        found = _TYPE_NAME.match(text, start)
        return found.end() if found else start
    if text.startswith("target(", start):
        return matching_bracket(text, start + 6)
    found = _TYPE_WORD.match(text, start)
    if not found:
        return start
    end = found.end()
    if text.startswith(" addrspace(", end):
        end = matching_bracket(text, end + 10)
    return end


def split_top(text: str) -> list[str]:
    """Pieces between commas that stand in no bracket, without blanks around them."""
    if not any(char in text for char in '([{<"'):
        return text.split(", ") if text else []
    pieces, start, index, end = [], 0, 0, len(text)
    while index < end:
        char = text[index]
        if char in _OPEN or char == '"':
            index = (
                matching_bracket(text, index)
                if char != '"'
                else text.find('"', index + 1) + 1 or end
            )
            continue
        if char == ",":
            pieces.append(text[start:index].strip())
            start = index + 1
        index += 1
    last = text[start:].strip()
    return [*pieces, last] if last or pieces else []


def type_class(type_: str) -> str:
    """The type with aggregates shortened to `struct` and `array`."""
    if type_.startswith(("%", "{", "<{")):
        return "struct"
    return "array" if type_.startswith("[") else type_


def _parse(skeleton: str) -> Shape:
    text = skeleton.strip()
    if text.startswith("% = "):
        text = text[4:]
    elif text.startswith("%") and " = " in text:
        text = text.split(" = ", 1)[1]
    text = _skip_flags(text)
    opcode, _, rest = text.partition(" ")
    rest = _skip_flags(rest)
    callee = ""
    if opcode in CALLS:
        type_, callee, operands = _call(rest)
    elif opcode in _CASTS:
        type_, operands = _cast(rest)
    else:
        type_, operands = _plain(opcode, rest)
    token = f"{opcode} {type_class(type_)}"
    if callee.startswith("@llvm."):
        token += " " + callee
    code = int.from_bytes(hashlib.blake2b(token.encode(), digest_size=8).digest(), "little")
    return Shape(skeleton, opcode, type_, tuple(operands), callee, token, code)


def _skip_flags(text: str) -> str:
    while True:
        word, _, rest = text.partition(" ")
        if word in _FLAGS:
            text = rest
        elif word.startswith(("inrange(", "syncscope(")):
            text = text[matching_bracket(text, text.index("(")) :].lstrip()
        else:
            return text


def _operand(text: str, inherited: str = "") -> tuple[str, str]:
    """Kind and type of `TYPE [attributes] VALUE`, or of a value alone with the type before it."""
    end = type_end(text)
    if end and (end == len(text) or text[end] == " "):
        type_, value = text[:end], text[end:].strip()
    else:
        type_, value = inherited, text
    if type_ == "label" or type_.startswith("[label"):
        return "block", "label"
    if type_ == "metadata":
        return "metadata", type_
    return _kind(value or text), type_


def _kind(value: str) -> str:
    last = value.rpartition(" ")[2]
    if value.startswith("%") or last == "%":
        return "value"
    if value.endswith("@") or (last.startswith("@") and not value.endswith(")")):
        return "global"
    if "asm " in value:
        return "asm"
    return "constant" if _NUMBER.match(last) or "@" not in value else "global"


def _cast(rest: str) -> tuple[str, list[tuple[str, str]]]:
    source, _, target = rest.rpartition(" to ")
    return target[: type_end(target)] or target, [_operand(source)]


def _plain(opcode: str, rest: str) -> tuple[str, list[tuple[str, str]]]:
    """Result type and operands of an instruction that is no call and no cast."""
    if opcode in ("icmp", "fcmp", "atomicrmw"):
        rest = _skip_flags(rest.partition(" ")[2])
    if opcode == "phi":
        end = type_end(rest)
        values = re.findall(r"\[ (.*?), [^\],]*? ?\]", rest[end:])
        return rest[:end], [(_kind(value), rest[:end]) for value in values]
    if opcode == "landingpad":
        end = type_end(rest)
        return rest[:end], [
            ("global" if "@" in clause else "constant", "ptr")
            for clause in re.findall(r"\b(?:catch|filter) [^ ]+ [^ ]+", rest[end:])
        ]
    if rest in ("", "void") or opcode == "fence":
        return "void", []
    if opcode in ("catchswitch", "catchpad", "cleanuppad", "catchret", "cleanupret"):
        return "token", [("value", "token")]
    if opcode == "switch":
        condition, _, cases = rest.partition(", ")
        kind = _operand(condition)
        return kind[1], [kind, *[("block", "label")] * cases.count("label ")]
    pieces = split_top(rest)
    operands = _typed(pieces)
    first = operands[0][1] if operands else "void"
    if opcode in ("getelementptr", "load", "alloca", "va_arg"):
        return _memory(opcode, pieces, operands)
    if opcode in ("select", "cmpxchg") and len(operands) > 1:
        return operands[1][1], operands
    if opcode == "atomicrmw" and len(operands) > 1:
        return operands[1][1], operands[:2]
    if opcode == "extractelement":
        return re.sub(r"^<.* x (.*)>$", r"\1", first), operands
    if opcode == "br":
        return ("i1" if len(operands) > 1 else "void"), operands
    return first or "void", operands


def _typed(pieces: list[str]) -> list[tuple[str, str]]:
    operands: list[tuple[str, str]] = []
    for piece in pieces:
        if piece.startswith(("align ", "!", "addrspace(")):
            continue
        operands.append(_operand(piece, operands[-1][1] if operands else ""))
    return operands


def _memory(
    opcode: str, pieces: list[str], operands: list[tuple[str, str]]
) -> tuple[str, list[tuple[str, str]]]:
    if opcode == "va_arg":
        return pieces[-1], operands[:1]
    if opcode == "getelementptr":
        vector = next((type_ for _, type_ in operands[1:] if type_.startswith("<")), "")
        return (vector and re.sub(r" x .*>$", " x ptr>", vector)) or "ptr", operands[1:]
    return pieces[0][: type_end(pieces[0])] or pieces[0], operands[1:]


def _call(rest: str) -> tuple[str, str, list[tuple[str, str]]]:
    """Result type, callee and operands; what precedes the type is convention and attributes."""
    start = 0
    while start < len(rest) and type_end(rest, start) == start:
        word = _WORD.match(rest, start)
        end = word.end() if word else start + 1
        if end < len(rest) and rest[end] == "(":
            end = matching_bracket(rest, end)
        start = end
        while start < len(rest) and rest[start] == " ":
            start += 1
    end = type_end(rest, start)
    type_, rest = rest[start:end] or "void", rest[end:].lstrip()
    if rest.startswith("("):  # the whole function type stands there where arguments vary
        rest = rest[matching_bracket(rest, 0) :].lstrip()
    intrinsic = _INTRINSIC.match(rest)
    if intrinsic:
        callee = intrinsic.group()
    elif rest.startswith("asm "):
        callee = "asm"
        rest = re.sub(r'^asm (?:\w+ )*"[^"]*", "[^"]*"', "", rest)
    else:
        callee = rest[:1] if rest[:1] in ("%", "@") else "@"
    opened = rest.find("(")
    if opened < 0:
        return type_, callee, []
    arguments = rest[opened + 1 : matching_bracket(rest, opened) - 1]
    return type_, callee, [_operand(piece) for piece in split_top(arguments)]
