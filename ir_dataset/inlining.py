"""A function's code after the parts of a pipeline that matter most for its size, without LLVM.

What clang writes is far from what remains: variables live in memory, exceptions are caught that nobody
throws, and small callees wait to be inlined. Four approximations, each linear in the text:

1. which functions may throw, bottom-up, so that landing pads nobody reaches are not counted;
2. which blocks are reached then;
3. which local variables become registers: those that are only loaded, stored and given a lifetime;
4. which calls are inlined, bottom-up, by a cost like LLVM's with the thresholds of -Oz and -O2.

Source of 4: https://llvm.org/doxygen/InlineCost_8h.html
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ir_dataset.instruction_classes import CLASSES, vectors_of
from ir_dataset.ir_instruction import CALLS
from ir_dataset.ir_text import Block, Function, Module

if TYPE_CHECKING:
    import numpy as np

__all__ = ["THRESHOLDS", "CallGraph", "FunctionModel", "model_functions"]

THRESHOLDS = {"oz": 5.0, "o2": 225.0}
"""LLVM's inline thresholds, where an instruction costs 5."""

_AT = {name: at for at, name in enumerate(CLASSES)}
_VALUE = re.compile(r"%\d+")
_LOADED = re.compile(r"= load [^\n]*?, ptr (%\d+)")
_STORED = re.compile(r"  store [^\n]*, ptr (%\d+)")
_LIFETIME = re.compile(r"@llvm\.lifetime\.\w+\.p0\((?:i64 -?\d+, )?ptr [^%\n]*(%\d+)\)")
_INDEXED = re.compile(r"= getelementptr [^\n]*?, ptr (%\d+),")
_COPIED = re.compile(r"@llvm\.mem[^(\n]*\([^%\n]*(%\d+), ptr [^%\n]*(%\d+)")
_ALLOCA = re.compile(r"  (%\d+) = alloca ([^\n]*)")
_CALLED = re.compile(r"@(self\b|\d+)\(")
_GROUP = re.compile(r"(#[0-9a-f]{12})")
_NAME = re.compile(r'@("[^"]*"|[-\w.$]+)')
_LOCAL = ("internal", "private")
_REPLACEABLE = ("weak", "linkonce", "common", "extern_weak")
_PIECES = frozenset({"alloca", "load", "store"})


@dataclass(slots=True)
class Call:
    """A direct call from a reached block to a function that the module defines."""

    callee: int
    arguments: int


@dataclass(slots=True)
class FunctionModel:
    """What is left of a function, as vectors of `CLASSES`."""

    raw: np.ndarray
    own: np.ndarray
    """Reached blocks, variables in registers."""
    inlined: dict[str, np.ndarray] = field(default_factory=dict)
    """By threshold: with its callees inlined."""
    n_inlined: dict[str, int] = field(default_factory=dict)
    calls: list[Call] = field(default_factory=list)
    may_throw: bool = True
    reached: int = 0
    """Blocks."""
    throwing_invokes: int = 0
    promoted: int = 0
    promoted_uses: int = 0
    split: int = 0
    """Variables that fall apart into scalars: used by field only."""
    stack: list[str] = field(default_factory=list)
    """Types of the variables that stay in memory."""
    call_sites: int = 0
    """In the module, that call it."""
    callers: int = 0
    address_taken: bool = False
    deletable: dict[str, bool] = field(default_factory=dict)
    """By threshold: local, and every call to it is inlined."""
    recursive: bool = False


class CallGraph:
    """Who calls whom in a module, and what is known of declared functions."""

    def __init__(self, module: Module) -> None:
        self.module = module
        self.number = {function.name: at for at, function in enumerate(module.functions)}
        self.nounwind = {
            name
            for line in module.declarations
            for name in _NAME.findall(line)[:1]
            if self._says(line, "nounwind")
        }

    def _says(self, line: str, attribute: str) -> bool:
        return any(
            attribute in self.module.attributes.get(group, ()) for group in _GROUP.findall(line)
        )

    def direct(self, function: Function) -> list[list[tuple[int, bool, int]]]:
        """For each block: callee's number (-1: not of the module), may it throw by what is declared,
        and the number of arguments, of each call."""
        lines = [line for line in function.lines if line.startswith(" ")]
        found = []
        for block in function.blocks:
            calls = []
            for at in range(block.start, block.stop):
                shape = function.shapes[at]
                if shape.opcode not in CALLS or shape.callee.startswith("@llvm."):
                    continue
                line = lines[at]
                callee, throws = -1, shape.callee != "asm"
                if shape.callee == "@":
                    named = _CALLED.search(line)
                    name = function.name
                    if named and named.group(1) != "self":
                        name = function.globals[int(named.group(1))]
                    callee = self.number.get(name, -1)
                    throws = name not in self.nounwind
                if throws and "#" in line and self._says(line, "nounwind"):
                    throws = False
                calls.append((callee, throws, len(shape.operands)))
            found.append(calls)
        return found


def model_functions(module: Module) -> list[FunctionModel]:
    """The model of each defined function, in order."""
    graph = CallGraph(module)
    calls = [graph.direct(function) for function in module.functions]
    order = _bottom_up([[one[0] for block in blocks for one in block] for blocks in calls])
    models: list[FunctionModel | None] = [None] * len(calls)
    throws = [True] * len(calls)
    for at in order:
        function = module.functions[at]
        model = _own(function, calls[at], throws)
        model.recursive = any(call.callee == at for call in model.calls)
        throws[at] = model.may_throw and "nounwind" not in function.attributes
        model.may_throw = throws[at]
        models[at] = model
    whole = [model for model in models if model is not None]
    _count_uses(module, whole)
    for name, threshold in THRESHOLDS.items():
        _inline(module, whole, order, name, threshold)
    return whole


def _bottom_up(callees: list[list[int]]) -> list[int]:
    """Callees before callers; a cycle is cut where it is entered."""
    order: list[int] = []
    state = bytearray(len(callees))
    for start in range(len(callees)):
        if state[start]:
            continue
        state[start] = 1
        stack = [(start, iter(callees[start]))]
        while stack:
            node, rest = stack[-1]
            following = next((one for one in rest if one >= 0 and not state[one]), None)
            if following is None:
                order.append(node)
                stack.pop()
            else:
                state[following] = 1
                stack.append((following, iter(callees[following])))
    return order


def _own(
    function: Function, calls: list[list[tuple[int, bool, int]]], throws: list[bool]
) -> FunctionModel:
    import numpy as np

    vectors = vectors_of(function.shapes)
    raises = [
        [declared and (callee < 0 or throws[callee]) for callee, declared, _ in block]
        for block in calls
    ]
    reached = _reached(function, raises)
    blocks = function.blocks
    mask = np.zeros(len(function.shapes), bool)
    for at in reached:
        mask[blocks[at].start : blocks[at].stop] = True
    own = vectors[mask].sum(axis=0, dtype=np.float32)
    model = FunctionModel(raw=vectors.sum(axis=0, dtype=np.float32), own=own, reached=len(reached))
    _promote(function, model)
    model.calls = [
        Call(callee, arguments)
        for at in reached
        for callee, _, arguments in calls[at]
        if callee >= 0
    ]
    last = [
        function.shapes[blocks[at].stop - 1].opcode if blocks[at].stop else "" for at in reached
    ]
    model.throwing_invokes = sum(
        opcode == "invoke" and bool(raises[at]) and raises[at][-1]
        for at, opcode in zip(reached, last, strict=True)
    )
    model.may_throw = any(
        opcode == "resume" or any(raises[at][:-1] if opcode == "invoke" else raises[at])
        for at, opcode in zip(reached, last, strict=True)
    )
    return model


def _reached(function: Function, raises: list[list[bool]]) -> list[int]:
    """Blocks reached from the entry, where an invoke that cannot throw has no second way."""
    number = {block.label: at for at, block in enumerate(function.blocks)}
    seen = bytearray(len(function.blocks))
    seen[0] = 1
    stack = [0]
    while stack:
        at = stack.pop()
        for target in _ways(function, function.blocks[at], raises[at]):
            to = number.get(target, -1)
            if to >= 0 and not seen[to]:
                seen[to] = 1
                stack.append(to)
    return [at for at, one in enumerate(seen) if one]


def _ways(function: Function, block: Block, raises: list[bool]) -> tuple[str, ...]:
    if not block.targets or block.stop == block.start:
        return block.targets
    invoke = function.shapes[block.stop - 1].opcode == "invoke"
    if invoke and len(block.targets) > 1 and not (raises and raises[-1]):
        return block.targets[:1]
    return block.targets


def _promote(function: Function, model: FunctionModel) -> None:
    """Take variables that become registers out of the model's own vector."""
    if not model.raw[_AT["alloca"]]:
        return
    body = function.body
    uses = Counter(_VALUE.findall(body))
    loads, stores = Counter(_LOADED.findall(body)), Counter(_STORED.findall(body))
    lifetimes = Counter(_LIFETIME.findall(body))
    fields = Counter(_INDEXED.findall(body))
    fields.update(name for pair in _COPIED.findall(body) for name in pair)
    gone_loads = gone_stores = 0
    for name, rest in _ALLOCA.findall(body):
        plain = uses[name] - 1 - lifetimes[name] - loads[name] - stores[name]
        if plain == 0:
            model.promoted += 1
            gone_loads += loads[name]
            gone_stores += stores[name]
        elif plain == fields[name]:
            model.split += 1
        else:
            model.stack.append(rest.partition(", align")[0])
    model.promoted_uses = gone_loads + gone_stores
    own = model.own
    for name, number, bytes_ in (("load", gone_loads, 4.0), ("store", gone_stores, 4.0)):
        number = min(number, own[_AT[name]])
        own[_AT[name]] -= number
        own[_AT["instructions"]] -= number
        own[_AT["bytes"]] = max(own[_AT["bytes"]] - bytes_ * number, 0)
    own[_AT["instructions"]] -= own[_AT["alloca"]] + own[_AT["free"]]
    own[_AT["alloca"]] = max(own[_AT["alloca"]] - model.promoted, 0)


def _count_uses(module: Module, models: list[FunctionModel]) -> None:
    """How often each function is called, and whether its address is taken otherwise."""
    number = {function.name: at for at, function in enumerate(module.functions)}
    mentions: Counter[str] = Counter()
    for line in module.globals:
        mentions.update(name.strip('"') for name in _NAME.findall(line)[1:])
    callers: dict[int, set[int]] = defaultdict(set)
    for at, (function, model) in enumerate(zip(module.functions, models, strict=True)):
        called = {call.callee for call in model.calls}
        for call in model.calls:
            models[call.callee].call_sites += 1
            callers[call.callee].add(at)
        for name in function.globals:
            other = number.get(name, -1)
            if other >= 0 and other not in called:
                models[other].address_taken = True
    for at, (function, model) in enumerate(zip(module.functions, models, strict=True)):
        model.callers = len(callers[at])
        model.address_taken = model.address_taken or mentions[function.name] > 0


def _inline(
    module: Module, models: list[FunctionModel], order: list[int], name: str, threshold: float
) -> None:
    done: set[int] = set()
    inlined_sites: Counter[int] = Counter()
    for at in order:
        model = models[at]
        vector = model.own.copy()
        count = 0
        for call in model.calls:
            callee = models[call.callee]
            if call.callee not in done or not _inlinable(module.functions[call.callee]):
                continue
            if not _worth(module.functions[call.callee], callee, call, name, threshold):
                continue
            count += 1
            inlined_sites[call.callee] += 1
            vector += callee.inlined[name]
            vector[_AT["call_direct"]] -= 1
            vector[_AT["instructions"]] -= 2
            vector[_AT["args"]] -= call.arguments
            vector[_AT["ret"]] -= min(callee.own[_AT["ret"]], 1)
            vector[_AT["bytes"]] -= 6 + 3 * call.arguments
        model.inlined[name] = vector.clip(0)
        model.n_inlined[name] = count
        done.add(at)
    for at, model in enumerate(models):
        local = module.functions[at].linkage in (*_LOCAL, "linkonce_odr", "available_externally")
        gone = inlined_sites[at] == model.call_sites
        model.deletable[name] = local and gone and not model.address_taken


def _inlinable(function: Function) -> bool:
    said = function.attributes
    if function.linkage in _REPLACEABLE or "..." in function.parameters:
        return False
    return "noinline" not in said and "optnone" not in said and "returns_twice" not in said


def _worth(
    function: Function, callee: FunctionModel, call: Call, name: str, threshold: float
) -> bool:
    """LLVM's cost: 5 an instruction, 25 a call, less what the call itself costs."""
    if "alwaysinline" in function.attributes:
        return True
    vector = callee.inlined[name]
    calls = vector[_AT["call_direct"]] + vector[_AT["call_indirect"]]
    cost = 5.0 * vector[_AT["instructions"]] + 25.0 * calls - 30.0 - 5.0 * call.arguments
    alone = function.linkage in _LOCAL and callee.call_sites == 1 and not callee.address_taken
    return bool(cost <= threshold + (15_000.0 if alone else 0.0))
