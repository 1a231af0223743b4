"""Words without meaning, for keys and values: four letters, easy to tell apart."""

from __future__ import annotations

from itertools import product
from random import Random

__all__ = ["WORDS"]

NUM_WORDS = 1024


def _words() -> tuple[str, ...]:
    syllables = ["".join(pair) for pair in product("bdfghjklmnprstvz", "aeiou")]
    every = ["".join(pair) for pair in product(syllables, syllables)]
    return tuple(sorted(Random(0).sample(every, NUM_WORDS)))


WORDS = _words()
