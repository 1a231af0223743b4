"""Plain sentences of a small grammar, for perplexity."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

__all__ = ["sentence", "text"]

ANIMATE = (
    "farmer child teacher doctor sailor king queen baker driver painter dog cat bird horse".split()
)
THINGS = (
    "apple ball boat book box bread cake chair coat cup door flower hat house key lamp map".split()
)
PLACES = "garden market river forest kitchen village school harbour bridge field".split()
ADJECTIVES = "old young small big red green happy quiet clever tired brave kind".split()
SEES = "see find follow like watch remember help know".split()
HOLDS = "carry want hold buy sell paint open take".split()
GIVES = "give show send bring".split()
MOVES = "walk run sleep sing wait work".split()


def sentence(rng: Random) -> str:
    """One sentence; its verb agrees with its subject, however far away that is."""
    plural = rng.random() < 0.4
    subject = _noun_phrase(rng, ANIMATE, plural)
    if rng.random() < 0.3:
        other = rng.random() < 0.5
        subject += f" that {_noun_phrase(rng, ANIMATE, other)} {_verb(rng, SEES, other)}"
    words = f"{subject} {_predicate(rng, plural)}"
    if rng.random() < 0.4:
        words += f" in the {rng.choice(PLACES)}"
    return f"{words}."


def text(rng: Random, num_sentences: int) -> str:
    """Sentences, one after another."""
    return " ".join(sentence(rng) for _ in range(num_sentences))


def _predicate(rng: Random, plural: bool) -> str:
    kind = rng.randrange(4)
    if kind == 0:
        return _verb(rng, MOVES, plural)
    if kind == 1:
        return f"{_verb(rng, SEES, plural)} {_noun_phrase(rng, ANIMATE, rng.random() < 0.3)}"
    if kind == 2:
        return f"{_verb(rng, HOLDS, plural)} {_noun_phrase(rng, THINGS, rng.random() < 0.3)}"
    receiver = _noun_phrase(rng, ANIMATE, rng.random() < 0.3)
    return f"{_verb(rng, GIVES, plural)} {receiver} {_noun_phrase(rng, THINGS, False)}"


def _noun_phrase(rng: Random, nouns: Sequence[str], plural: bool) -> str:
    noun = rng.choice(nouns)
    adjective = f"{rng.choice(ADJECTIVES)} " if rng.random() < 0.5 else ""
    if plural:
        return f"{rng.choice(('the', 'two', 'many'))} {adjective}{_plural(noun)}"
    return f"{rng.choice(('the', 'a'))} {adjective}{noun}"


def _plural(noun: str) -> str:
    if noun == "child":
        return "children"
    return f"{noun}es" if noun.endswith("x") else f"{noun}s"


def _verb(rng: Random, verbs: Sequence[str], plural: bool) -> str:
    verb = rng.choice(verbs)
    if plural:
        return verb
    if verb == "carry":
        return "carries"
    return f"{verb}es" if verb.endswith("ch") else f"{verb}s"
