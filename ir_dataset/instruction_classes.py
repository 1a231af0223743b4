"""What one instruction adds to its function: counts by class, and a guess of its bytes of machine code."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING

from ir_dataset.ir_instruction import CALLS, Shape

if TYPE_CHECKING:
    import numpy as np

__all__ = ["CLASSES", "vectors_of"]

CLASSES: tuple[str, ...] = (
    *"instructions bytes alloca load store store_const gep_const gep_var gep_operands".split(),
    *"icmp fcmp add mul div shift logic fp_arith fp_div cast_free cast_ext cast_fp".split(),
    *"phi phi_operands select br br_cond switch switch_cases ret unreachable".split(),
    *"invoke landingpad resume call_direct call_indirect call_asm".split(),
    *"args args_const args_global args_byval musttail".split(),
    *"mem_const mem_bytes mem_var free overflow minmax bits math va eh vector_intrinsic".split(),
    *"intrinsic_other extractvalue insertvalue atomic vector wide_int narrow_int x87 float".split(),
    *"const_small const_large const_fp const_null operand_global".split(),
)
"""Names of the counts, in the order of the vectors."""

_AT = {name: at for at, name in enumerate(CLASSES)}

_OPCODES: dict[str, tuple[str, float]] = {
    "alloca": ("alloca", 0),
    "load": ("load", 4),
    "store": ("store", 4),
    "icmp": ("icmp", 3),
    "fcmp": ("fcmp", 4),
    "mul": ("mul", 4),
    "fdiv": ("fp_div", 4),
    "frem": ("fp_div", 12),
    "phi": ("phi", 2),
    "select": ("select", 6),
    "ret": ("ret", 1),
    "unreachable": ("unreachable", 0),
    "landingpad": ("landingpad", 5),
    "resume": ("resume", 8),
    "extractvalue": ("extractvalue", 0),
    "insertvalue": ("insertvalue", 0),
    "fence": ("atomic", 3),
    "cmpxchg": ("atomic", 9),
    "atomicrmw": ("atomic", 6),
    "switch": ("switch", 6),
    **dict.fromkeys(("add", "sub"), ("add", 3.0)),
    **dict.fromkeys(("udiv", "sdiv", "urem", "srem"), ("div", 7.0)),
    **dict.fromkeys(("shl", "lshr", "ashr"), ("shift", 3.5)),
    **dict.fromkeys(("and", "or", "xor"), ("logic", 3.0)),
    **dict.fromkeys(("fadd", "fsub", "fmul", "fneg"), ("fp_arith", 4.0)),
    **dict.fromkeys(
        ("trunc", "bitcast", "inttoptr", "ptrtoint", "ptrtoaddr", "freeze", "addrspacecast"),
        ("cast_free", 0.0),
    ),
    **dict.fromkeys(("zext", "sext"), ("cast_ext", 3.0)),
    **dict.fromkeys(("fptrunc", "fpext", "fptoui", "fptosi", "uitofp", "sitofp"), ("cast_fp", 5.0)),
    **dict.fromkeys(("extractelement", "insertelement", "shufflevector"), ("vector", 5.0)),
}
"""Class and bytes on x86-64, as a compiler that minds size would write it."""

_INTRINSICS: tuple[tuple[str, str, float], ...] = (
    (
        r"lifetime|assume|expect|invariant|annotation|donothing|dbg|experimental.noalias|prefetch"
        r"|launder|strip|sideeffect|pseudoprobe|is\.constant|objectsize",
        "free",
        0,
    ),
    (r"[us](?:add|sub|mul)\.(?:with\.overflow|sat)", "overflow", 4),
    (r"[us](?:min|max)|abs|minnum|maxnum|minimum|maximum|copysign|fabs", "minmax", 6),
    (r"ctpop|ctlz|cttz|bswap|fsh[lr]|bitreverse", "bits", 6),
    (r"va_|stack(?:save|restore)|returnaddress|frameaddress", "va", 5),
    (r"eh\.|trap|ubsantrap", "eh", 3),
    (r"vector|masked|vp\.|x86|experimental\.(?:vector|constrained)", "vector_intrinsic", 8),
    (
        r"sqrt|pow|exp|log|sin|cos|tan|fma|fmuladd|floor|ceil|round|trunc|rint|nearbyint|l?lround|l?lrint",
        "math",
        6,
    ),
)
_INTRINSIC = re.compile(r"@llvm\.([a-z_0-9.]+)")
_BITS = re.compile(r"^i(\d+)$")
_CONSTANT = re.compile(r"(?<![\w.])-?\d+\b")
_LENGTH = re.compile(r"i(?:32|64) (\d+), i1 (?:true|false)\)")
_LARGE = 1 << 31


class _Rows:
    """Vectors of the shapes seen so far, as rows of one matrix that grows."""

    LIMIT = 100_000

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}
        self.matrix: np.ndarray | None = None

    def number(self, shape: Shape) -> int:
        found = self.numbers.get(shape.skeleton)
        return found if found is not None else self._add(shape)

    def _add(self, shape: Shape) -> int:
        import numpy as np

        number = len(self.numbers)
        if self.matrix is None:
            self.matrix = np.zeros((1024, len(CLASSES)), np.float32)
        if number == len(self.matrix):
            self.matrix = np.concatenate([self.matrix, np.zeros_like(self.matrix)])
        self.numbers[shape.skeleton] = number
        row = self.matrix[number]
        for name, value in _counts(shape).items():
            row[_AT[name]] = value
        return number


_ROWS = _Rows()


def vectors_of(shapes: list[Shape]) -> np.ndarray:
    """float32 [instructions, classes]."""
    import numpy as np

    if len(_ROWS.numbers) > _ROWS.LIMIT:
        _ROWS.__init__()
    numbers = [_ROWS.number(shape) for shape in shapes]
    if _ROWS.matrix is None or not numbers:
        return np.zeros((0, len(CLASSES)), np.float32)
    return _ROWS.matrix[numbers]


def _counts(shape: Shape) -> dict[str, float]:
    counts: dict[str, float] = {"instructions": 1}
    opcode = shape.opcode
    if opcode in CALLS:
        bytes_ = _call(shape, counts)
    else:
        class_, bytes_ = _OPCODES.get(opcode, ("intrinsic_other", 4.0))
        special = _SPECIAL.get(opcode)
        if special is None:
            counts[class_] = 1
        else:
            bytes_ = special(shape, counts)
    counts["bytes"] = bytes_ + _constants(shape, counts) + _types(shape, counts, bytes_)
    return counts


def _store(shape: Shape, counts: dict[str, float]) -> float:
    constant = bool(shape.operands) and shape.operands[0][0] == "constant"
    counts["store"], counts["store_const"] = 1, float(constant)
    return 7.0 if constant else 4.0


def _gep(shape: Shape, counts: dict[str, float]) -> float:
    constant = all(kind == "constant" for kind, _ in shape.operands[1:])
    counts["gep_const" if constant else "gep_var"] = 1
    counts["gep_operands"] = len(shape.operands)
    return 1.0 if constant else 3.0 + len(shape.operands)


def _phi(shape: Shape, counts: dict[str, float]) -> float:
    counts["phi"], counts["phi_operands"] = 1, len(shape.operands)
    return 1.5 * len(shape.operands)


def _br(shape: Shape, counts: dict[str, float]) -> float:
    conditional = len(shape.operands) > 1
    counts["br_cond" if conditional else "br"] = 1
    return 3.0 if conditional else 1.0


def _switch(shape: Shape, counts: dict[str, float]) -> float:
    cases = max(len(shape.operands) - 2, 0)
    counts["switch"], counts["switch_cases"] = 1, cases
    return 6.0 + min(5.0 * cases, 14.0)


_SPECIAL: dict[str, Callable[[Shape, dict[str, float]], float]] = {
    "store": _store,
    "getelementptr": _gep,
    "phi": _phi,
    "br": _br,
    "switch": _switch,
}


def _call(shape: Shape, counts: dict[str, float]) -> float:
    kinds = [kind for kind, _ in shape.operands]
    if shape.callee.startswith("@llvm."):
        return _intrinsic(shape, counts)
    counts["args"] = len(kinds)
    counts["args_const"] = kinds.count("constant")
    counts["args_global"] = kinds.count("global")
    counts["args_byval"] = shape.skeleton.count("byval(")
    counts["musttail"] = float("musttail " in shape.skeleton)
    counts["invoke"] = float(shape.opcode == "invoke")
    called = {"@": "call_direct", "%": "call_indirect", "asm": "call_asm"}.get(shape.callee)
    counts[called or "call_direct"] = 1
    bytes_ = {"%": 3.0, "asm": 4.0}.get(shape.callee, 5.0)
    moves = 3.0 * kinds.count("value") + 4.0 * kinds.count("constant") + 5.5 * kinds.count("global")
    return bytes_ + moves + 24.0 * counts["args_byval"]


def _intrinsic(shape: Shape, counts: dict[str, float]) -> float:
    found = _INTRINSIC.match(shape.callee)
    name = found.group(1) if found else ""
    if name.startswith(("memcpy", "memmove", "memset")):
        length = _LENGTH.search(shape.skeleton)
        if length is None:
            counts["mem_var"] = 1
            return 5.0 + 9.0
        counts["mem_const"], counts["mem_bytes"] = 1, min(int(length.group(1)), 1 << 20)
        return min(9.0 * -(-int(length.group(1)) // 16), 20.0)
    for pattern, class_, bytes_ in _INTRINSICS:
        if re.match(pattern, name):
            counts[class_] = 1
            return bytes_
    counts["intrinsic_other"] = 1
    return 6.0


def _constants(shape: Shape, counts: dict[str, float]) -> float:
    kinds = [kind for kind, _ in shape.operands]
    counts["operand_global"] = kinds.count("global")
    if "constant" not in kinds or shape.opcode in ("getelementptr", "insertvalue", "extractvalue"):
        return 0.0
    types = [type_ for kind, type_ in shape.operands if kind == "constant"]
    fp = sum(type_ in ("float", "double", "x86_fp80", "half") for type_ in types)
    text = shape.skeleton.partition(", align ")[0]
    values = [int(value) for value in _CONSTANT.findall(text)][:64]
    large = sum(not -_LARGE <= value < _LARGE for value in values)
    counts["const_fp"], counts["const_large"] = fp, large
    counts["const_null"] = text.count("null")
    counts["const_small"] = max(len(types) - fp - large, 0)
    return 8.0 * large + 4.0 * fp


def _types(shape: Shape, counts: dict[str, float], bytes_: float) -> float:
    """Bytes to add for the type's width: two registers, vectors."""
    type_ = shape.type
    if type_.startswith("<"):
        counts["vector"] = 1
        return 1.0
    if type_ == "x86_fp80":
        counts["x87"] = 1
    elif type_ in ("float", "double", "half", "bfloat", "fp128"):
        counts["float"] = 1
    bits = _BITS.match(type_)
    if bits is None:
        return 0.0
    width = int(bits.group(1))
    if width > 64:
        counts["wide_int"] = 1
        return bytes_ * min(-(-width // 64) - 1, 8)
    counts["narrow_int"] = float(1 < width < 32)
    return 0.0
