"""How tokens are chosen: only what is allowed, as often as it should be."""

from __future__ import annotations

import numpy as np
import pytest

from rewriter.deploy import Options
from rewriter.errors import ConfigError

LOGITS = np.log(np.array([[0.1, 0.4, 0.2, 0.3]], np.float32))


def shares(**options):
    """How often each token is drawn."""
    chosen = Options(**options)
    random = chosen.generator()
    draws = chosen.choose(np.repeat(LOGITS, 4000, axis=0), random)
    return np.bincount(draws, minlength=4) / len(draws)


def test_greedy_takes_the_most_likely_token_of_each_row():
    logits = np.array([[0, 3, 1], [9, 3, 1], [5, 5, 1]], np.float32)
    chosen = Options()
    assert chosen.choose(logits, chosen.generator()).tolist() == [1, 0, 0]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"temperature": 1.0}, [0.1, 0.4, 0.2, 0.3]),
        ({"temperature": 0.5}, [1 / 30, 16 / 30, 4 / 30, 9 / 30]),
        ({"temperature": 1.0, "top_k": 2}, [0, 4 / 7, 0, 3 / 7]),
        ({"temperature": 1.0, "top_k": 99}, [0.1, 0.4, 0.2, 0.3]),
        ({"temperature": 1.0, "top_p": 0.65}, [0, 4 / 7, 0, 3 / 7]),
        ({"temperature": 1.0, "top_p": 0.75}, [0, 4 / 9, 2 / 9, 3 / 9]),
        ({"temperature": 1.0, "top_p": 1.0}, [0.1, 0.4, 0.2, 0.3]),
        ({"temperature": 1.0, "top_p": 1e-9}, [0, 1, 0, 0]),
        ({"temperature": 1e-6}, [0, 1, 0, 0]),
        ({"temperature": 1.0, "top_k": 3, "top_p": 0.5}, [0, 4 / 7, 0, 3 / 7]),
    ],
)
def test_tokens_are_drawn_as_often_as_they_are_likely(options, expected):
    found = shares(**options)
    np.testing.assert_allclose(found, expected, atol=0.03)
    assert not found[np.array(expected) == 0].any()


def test_the_seed_decides():
    assert (shares(temperature=1.0, seed=3) == shares(temperature=1.0, seed=3)).all()
    assert (shares(temperature=1.0, seed=3) != shares(temperature=1.0, seed=4)).any()
    assert (shares(temperature=1.0, seed=None) != shares(temperature=1.0, seed=None)).any()


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"temperature": 1, "top_k": 0}, "top_k"),
        ({"temperature": 1, "top_p": 0}, "top_p"),
        ({"temperature": 1, "top_p": 1.1}, "top_p"),
        ({"top_k": 5}, "top_k"),
        ({"top_p": 0.5}, "top_p"),
        ({"seed": -1}, "seed"),
        ({"stop": "word"}, "stop"),
        ({"stop": ("",)}, "stop"),
    ],
)
def test_values_that_are_not_allowed_are_named(options, field):
    with pytest.raises(ConfigError) as error:
        Options(**options)
    assert error.value.field == field
