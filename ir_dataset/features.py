"""What is said about each function for models to learn from: some 330 numbers, no LLVM needed.

For each of `CLASSES` of instructions four counts: as written, and as estimated to remain when variables
are in registers and dead blocks gone (`own_`), with callees inlined as at -Oz (`oz_`) and as at -O2
(`o2_`). Besides these the signature, attributes, control flow, the stack and who calls the function.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from ir_dataset.inlining import FunctionModel, model_functions
from ir_dataset.instruction_classes import CLASSES
from ir_dataset.ir_instruction import matching_bracket, split_top
from ir_dataset.ir_text import Function, Module, parse_module
from ir_dataset.reader import read_module
from ir_dataset.records import Record
from ir_dataset.store import Store
from rewriter.errors import ArtifactError

if TYPE_CHECKING:
    import numpy as np

__all__ = ["FEATURES", "ModuleFeatures", "featurise", "function_features"]

_ATTRIBUTES = (
    *"alwaysinline noinline inlinehint optsize minsize optnone cold hot nounwind noreturn uwtable".split(),
    *"ssp sspstrong sspreq naked norecurse mustprogress noredzone nonlazybind".split(),
    *"sanitize_address returns_twice strictfp".split(),
)
_LINKAGES = {
    "external": 0,
    "internal": 1,
    "private": 1,
    "linkonce_odr": 2,
    "linkonce": 3,
    "weak": 3,
    "weak_odr": 4,
    "available_externally": 5,
}
_SHAPE = (
    *"parameters parameters_pointer parameters_fp parameters_byval parameters_sret vararg".split(),
    *"result_class linkage comdat personality frame_pointer name_length".split(),
)
_FLOW = (
    *"blocks reached edges back_edges conditional_edges joins exits longest_block loop_blocks".split(),
    *"promoted promoted_uses split stack_variables stack_bytes globals".split(),
    *"may_throw throwing_invokes".split(),
)
_CALLS = (
    *"call_sites callers address_taken recursive module_calls n_inlined_oz n_inlined_o2".split(),
    *"deletable_oz deletable_o2 module_functions module_instructions".split(),
    *"callee_bytes callee_bytes_max".split(),
)
FEATURES: tuple[str, ...] = (
    *CLASSES,
    *(f"own_{name}" for name in CLASSES),
    *(f"oz_{name}" for name in CLASSES),
    *(f"o2_{name}" for name in CLASSES),
    *_SHAPE,
    *(f"says_{name}" for name in _ATTRIBUTES),
    *_FLOW,
    *_CALLS,
)
"""Names of the columns."""

_SCALARS = {"ptr": 8, "half": 2, "bfloat": 2, "float": 4, "double": 8, "x86_fp80": 16, "fp128": 16}


class ModuleFeatures(Record, frozen=True):
    """A module's functions, in the order of its summary."""

    module: str
    names: tuple[str, ...]
    """Of the functions."""
    values: bytes
    """float32, little-endian, [functions, FEATURES] row by row."""

    def matrix(self) -> np.ndarray:
        """float32 [functions, FEATURES]."""
        import numpy as np

        return np.frombuffer(self.values, "<f4").reshape(len(self.names), len(FEATURES))


def featurise(
    store: Store, sha: str, *, writer_llvm: str = "", allow_newer: bool = False
) -> ModuleFeatures:
    """The features of a stored module.

    Raises:
        ArtifactError: the module is not in the store, or cannot be read.
    """
    reading = read_module(store.get(sha), writer_llvm=writer_llvm, allow_newer=allow_newer)
    if reading.reason:
        raise ArtifactError(f"module {sha} cannot be read: {reading.reason}")
    module = parse_module(reading.text)
    return ModuleFeatures(
        module=sha,
        names=tuple(function.name for function in module.functions),
        values=function_features(module).astype("<f4").tobytes(),
    )


def function_features(module: Module) -> np.ndarray:
    """float32 [functions, FEATURES] of a parsed module."""
    import numpy as np

    models = model_functions(module)
    rows = np.zeros((len(models), len(FEATURES)), np.float32)
    sizes: dict[str, float] = {}
    width = len(CLASSES)
    for row, function, model in zip(rows, module.functions, models, strict=True):
        parts = (model.raw, model.own, model.inlined["oz"], model.inlined["o2"])
        for at, part in enumerate(parts):
            row[at * width : (at + 1) * width] = part
        row[4 * width :] = [
            *_signature(function),
            *(float(name in function.attributes) for name in _ATTRIBUTES),
            *_flow(function, model, module.types, sizes),
            *_calls(module, models, model),
        ]
    return rows


def _signature(function: Function) -> list[float]:
    parameters = function.parameters
    pointers = sum(one.startswith("ptr") for one in parameters)
    fp = sum(one.startswith(("float", "double", "x86_fp80", "<")) for one in parameters)
    frame = next((one for one in function.attributes if one.startswith('"frame-pointer"')), "")
    return [
        len(parameters),
        pointers,
        fp,
        sum("byval(" in one for one in parameters),
        sum("sret(" in one for one in parameters),
        float("..." in parameters),
        _result_class(function.result),
        _LINKAGES.get(function.linkage, 0),
        float(function.comdat),
        float("personality" in function.signature),
        0.0 if not frame or "none" in frame else 1.0 + ("all" in frame),
        len(function.name),
    ]


def _result_class(type_: str) -> float:
    if type_ == "void":
        return 0.0
    if type_ == "ptr" or re.fullmatch(r"i\d+", type_):
        return 1.0
    return 2.0 if type_ in _SCALARS else 3.0


def _flow(
    function: Function, model: FunctionModel, types: Mapping[str, str], sizes: dict[str, float]
) -> list[float]:
    number = {block.label: at for at, block in enumerate(function.blocks)}
    ways = [
        [number[target] for target in block.targets if target in number]
        for block in function.blocks
    ]
    incoming = [0] * len(ways)
    for targets in ways:
        for target in targets:
            incoming[target] += 1
    back = [(at, target) for at, targets in enumerate(ways) for target in targets if target <= at]
    inside = {block for at, target in back for block in range(target, at + 1)}
    return [
        len(ways),
        model.reached,
        sum(map(len, ways)),
        len(back),
        sum(len(targets) for targets in ways if len(targets) > 1),
        sum(number > 1 for number in incoming),
        sum(not targets for targets in ways),
        max(block.stop - block.start for block in function.blocks),
        len(inside),
        model.promoted,
        model.promoted_uses,
        model.split,
        len(model.stack),
        min(sum(_size_of(type_, types, sizes) for type_ in model.stack), 1e9),
        len(function.globals),
        float(model.may_throw),
        model.throwing_invokes,
    ]


def _calls(module: Module, models: list[FunctionModel], model: FunctionModel) -> list[float]:
    bytes_ = [float(models[call.callee].own[1]) for call in model.calls]
    return [
        model.call_sites,
        model.callers,
        float(model.address_taken),
        float(model.recursive),
        len(model.calls),
        model.n_inlined["oz"],
        model.n_inlined["o2"],
        float(model.deletable["oz"]),
        float(model.deletable["o2"]),
        len(models),
        module.n_instructions,
        sum(bytes_),
        max(bytes_, default=0.0),
    ]


def _size_of(type_: str, types: Mapping[str, str], sizes: dict[str, float]) -> float:
    """Bytes of a type, without padding; 8 where it says nothing about its size."""
    type_ = type_.partition(", ")[0] if type_[:1] not in "[{<%" else type_
    if type_ not in sizes:
        sizes[type_] = 8.0  # should a type hold itself, in text that LLVM did not write
        sizes[type_] = _measured(type_, types, sizes)
    return sizes[type_]


def _measured(type_: str, types: Mapping[str, str], sizes: dict[str, float]) -> float:
    if type_.startswith("%"):
        name = re.match(r"%[\w.]+", type_)
        held = types.get(name.group() if name else "", "")
        return _size_of(held, types, sizes) if held else 8.0
    if type_.startswith("<{"):
        return _measured(type_[1 : matching_bracket(type_, 0) - 1], types, sizes)
    if type_.startswith("{"):
        inside = type_[1 : matching_bracket(type_, 0) - 1].strip()
        return sum(_size_of(one, types, sizes) for one in split_top(inside))
    if type_[:1] in "[<":
        found = re.match(r"[\[<](?:vscale x )?(\d+) x ", type_)
        if found is None:
            return 8.0
        inside = type_[found.end() : matching_bracket(type_, 0) - 1]
        return int(found.group(1)) * _size_of(inside, types, sizes)
    bits = re.match(r"i(\d+)", type_)
    return -(-int(bits.group(1)) // 8) if bits else _SCALARS.get(type_, 8)
