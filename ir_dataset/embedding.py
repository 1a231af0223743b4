"""Functions as vectors of 75 numbers, in the manner of IR2Vec: what stands near what in this corpus.

The corpus is read as triplets: an opcode has a type, an operand at some place, and an opcode that follows.
TransE learns a vector for each of the hundred or so entities such that head + relation is near tail. An
instruction's vector is its opcode's, plus half its type's, plus a fifth of each operand's; a function's is
the sum over its instructions. This is IR2Vec's symbolic form: values are told by their kind, not by
what reaches them.

Source: https://arxiv.org/abs/1909.06228 (IR2Vec), https://papers.nips.cc/paper/5071 (TransE)
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from ir_dataset.ir_instruction import Shape
from ir_dataset.ir_text import Function
from ir_dataset.records import Record
from rewriter.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np

__all__ = ["DIMENSION", "Vocabulary", "count_triplets", "embed_functions", "train_vocabulary"]

DIMENSION = 75
_WEIGHTS = (1.0, 0.5, 0.2)
"""Of opcode, type and operands, as in IR2Vec."""
_MARGIN, _RATE, _DECIMALS = 1.0, 0.05, 6
_MAX_PLACE = 3

Triplet = tuple[str, str, str]


class Vocabulary(Record, frozen=True):
    """Vectors by entity. As JSON it is a file that later corpora can be embedded with."""

    dimension: int
    seed: int
    vectors: dict[str, tuple[float, ...]]
    """Opcodes as they are, types as `type:…`, operands as `operand:…`."""


def _type(text: str) -> str:
    if text.startswith(("<{", "%", "{")):
        return "type:struct"
    if text.startswith("<"):
        return "type:vector"
    if text.startswith("["):
        return "type:array"
    if re.fullmatch(r"i\d+", text):
        return f"type:{text}" if text in ("i1", "i8", "i16", "i32", "i64") else "type:int"
    known = ("void", "ptr", "float", "double", "half", "label", "token", "metadata")
    return f"type:{text.partition(' ')[0]}" if text.startswith(known) else "type:other"


def _opcode(shape: Shape) -> str:
    return "intrinsic" if shape.callee.startswith("@llvm.") else shape.opcode


def _operand(kind: str, type_: str) -> str:
    return "operand:pointer" if kind == "value" and type_.startswith("ptr") else f"operand:{kind}"


def count_triplets(functions: Iterable[Function]) -> Counter[Triplet]:
    """How often each (head, relation, tail) occurs; counters of several modules can be added up."""
    shapes: Counter[Shape] = Counter()
    found: Counter[Triplet] = Counter()
    for function in functions:
        own = function.shapes
        shapes.update(own)
        names = [_opcode(shape) for shape in own]
        found.update((one, "next", two) for one, two in itertools.pairwise(names))
    for shape, number in shapes.items():
        name = _opcode(shape)
        found[name, "type", _type(shape.type)] += number
        for place, (kind, type_) in enumerate(shape.operands):
            found[name, f"operand{min(place, _MAX_PLACE)}", _operand(kind, type_)] += number
    return found


def train_vocabulary(
    triplets: Mapping[Triplet, int],
    *,
    seed: int = 0,
    epochs: int = 800,
    dimension: int = DIMENSION,
) -> Vocabulary:
    """Train TransE on the distinct triplets, all at once in each step; a few seconds.

    Raises:
        ConfigError: there is no triplet.
    """
    import numpy as np

    if not triplets:
        raise ConfigError("triplets", 0, "at least one, so a corpus with instructions")
    listed = sorted(triplets)
    names = sorted({name for head, _, tail in listed for name in (head, tail)})
    relations = sorted({relation for _, relation, _ in listed})
    number = {name: at for at, name in enumerate(names)}
    heads = np.array([number[head] for head, _, _ in listed])
    tails = np.array([number[tail] for _, _, tail in listed])
    kinds = np.array([relations.index(relation) for _, relation, _ in listed])
    generator = np.random.Generator(np.random.PCG64(seed))
    entity = _unit(generator.uniform(-1, 1, (len(names), dimension)))
    relation = _unit(generator.uniform(-1, 1, (len(relations), dimension)))
    for _ in range(epochs):
        wrong = generator.integers(0, len(names), len(listed))
        at_head = generator.integers(0, 2, len(listed)).astype(bool)
        wrong_heads, wrong_tails = np.where(at_head, wrong, heads), np.where(at_head, tails, wrong)
        right = entity[heads] + relation[kinds] - entity[tails]
        false = entity[wrong_heads] + relation[kinds] - entity[wrong_tails]
        near, far = np.linalg.norm(right, axis=1), np.linalg.norm(false, axis=1)
        active = (_MARGIN + near - far > 0)[:, None]
        pull = np.where(active, right / (near[:, None] + 1e-9), 0) * _RATE
        push = np.where(active, false / (far[:, None] + 1e-9), 0) * _RATE
        np.add.at(entity, heads, -pull)
        np.add.at(entity, tails, pull)
        np.add.at(entity, wrong_heads, push)
        np.add.at(entity, wrong_tails, -push)
        np.add.at(relation, kinds, push - pull)
        entity = _unit(entity)
    return Vocabulary(
        dimension=dimension,
        seed=seed,
        vectors={
            name: tuple(round(float(value), _DECIMALS) for value in row)
            for name, row in zip(names, entity, strict=True)
        },
    )


def _unit(rows: np.ndarray) -> np.ndarray:
    import numpy as np

    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-9)


def embed_functions(functions: Sequence[Function], vocabulary: Vocabulary) -> np.ndarray:
    """float32 [functions, dimension]; what the vocabulary does not know counts as nothing."""
    import numpy as np

    vectors = {name: np.array(row) for name, row in vocabulary.vectors.items()}
    nothing = np.zeros(vocabulary.dimension)
    known: dict[str, np.ndarray] = {}
    rows = np.zeros((len(functions), vocabulary.dimension), np.float32)
    for row, function in zip(rows, functions, strict=True):
        counts = Counter(shape.skeleton for shape in function.shapes)
        shapes = {shape.skeleton: shape for shape in function.shapes}
        total = nothing.copy()
        for skeleton, times in counts.items():
            if skeleton not in known:
                known[skeleton] = _instruction(shapes[skeleton], vectors, nothing)
            total += times * known[skeleton]
        row[:] = total
    return rows


def _instruction(
    shape: Shape, vectors: Mapping[str, np.ndarray], nothing: np.ndarray
) -> np.ndarray:
    of_opcode, of_type, of_operand = _WEIGHTS
    total = of_opcode * vectors.get(_opcode(shape), nothing)
    total = total + of_type * vectors.get(_type(shape.type), nothing)
    for kind, type_ in shape.operands:
        total = total + of_operand * vectors.get(_operand(kind, type_), nothing)
    return total
