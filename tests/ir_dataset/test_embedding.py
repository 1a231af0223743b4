import numpy as np
import pytest

pytest.importorskip("msgspec", reason="pip install 'rewriter[ir]'")

from ir_dataset.embedding import (
    DIMENSION,
    Vocabulary,
    count_triplets,
    embed_functions,
    train_vocabulary,
)
from ir_dataset.ir_text import parse_module
from ir_dataset.records import decode, encode
from rewriter.errors import ConfigError
from tests.ir_dataset.ir_fixtures import NAMES, text_of


def functions():
    return [one for name in NAMES for one in parse_module(text_of(name)).functions]


def test_triplets_say_what_an_instruction_is_and_what_follows():
    (function,) = parse_module(
        "define i32 @f(ptr %p) {\n  %a = load i32, ptr %p\n  ret i32 %a\n}\n"
    ).functions
    assert dict(count_triplets([function])) == {
        ("load", "next", "ret"): 1,
        ("load", "type", "type:i32"): 1,
        ("load", "operand0", "operand:pointer"): 1,
        ("ret", "type", "type:i32"): 1,
        ("ret", "operand0", "operand:value"): 1,
    }


def test_training_brings_heads_near_tails_and_is_the_same_each_time():
    triplets = count_triplets(functions())
    vocabulary = train_vocabulary(triplets, epochs=200)
    assert vocabulary == train_vocabulary(triplets, epochs=200)
    assert vocabulary != train_vocabulary(triplets, epochs=200, seed=1)
    assert decode(encode(vocabulary), Vocabulary) == vocabulary
    vectors = {name: np.array(row) for name, row in vocabulary.vectors.items()}
    untrained = train_vocabulary(triplets, epochs=0).vectors
    before = _spread({name: np.array(row) for name, row in untrained.items()}, triplets)
    assert _spread(vectors, triplets) < 0.8 * before


def _spread(vectors, triplets):
    """How far tail - head varies within a relation, beside how far entities lie apart."""
    groups = {}
    for head, relation, tail in triplets:
        groups.setdefault(relation, []).append(vectors[tail] - vectors[head])
    return np.mean([np.linalg.norm(np.std(rows, axis=0)) for rows in groups.values()])


def test_functions_are_sums_over_their_instructions():
    all_functions = functions()
    vocabulary = train_vocabulary(count_triplets(all_functions), epochs=50)
    rows = embed_functions(all_functions, vocabulary)
    assert rows.shape == (len(all_functions), DIMENSION)
    assert np.isfinite(rows).all()
    twice = parse_module(
        "define void @f() {\n  fence acquire\n  ret void\n}\n"
        "define void @g() {\n  fence acquire\n  fence acquire\n  ret void\n}\n"
    ).functions
    one, two = embed_functions(twice, vocabulary)
    vectors = {name: np.array(row) for name, row in vocabulary.vectors.items()}
    np.testing.assert_allclose(
        two - one, vectors["fence"] + 0.5 * vectors["type:void"], atol=1e-5
    )  # rounding of float32


def test_what_the_vocabulary_does_not_know_counts_as_nothing():
    vocabulary = Vocabulary(dimension=2, seed=0, vectors={"ret": (1.0, 2.0)})
    rows = embed_functions(
        parse_module("define void @f() {\n  fence acquire\n  ret void\n}\n").functions, vocabulary
    )
    assert rows.tolist() == [[1.0, 2.0]]


def test_an_empty_corpus_is_told():
    with pytest.raises(ConfigError, match="triplets"):
        train_vocabulary({})
