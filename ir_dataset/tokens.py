"""Byte-pair tokens of assembly: the vocabulary is trained on the corpus itself.

As in ComPile, numbers are not like words: those that many modules have may become tokens, all others
are split into digits, so that no vocabulary is spent on constants that are met once. No token goes
beyond a word, a number or a sign.

Source: https://arxiv.org/abs/2309.15432 (ComPile, token counts).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from rewriter.errors import ConfigError

__all__ = ["COMMON_CONSTANTS", "common_constants", "count", "train_tokenizer"]

COMMON_CONSTANTS = 256
"""How many numbers may be tokens."""

_LEAST = 300
_SPECIAL = ("<pad>", "<bos>", "<eos>")
_BATCH = 4096

_CONSTANT = re.compile(r"(?<![\w.$])\d{2,}(?![\w.$])")
"""Integers of two digits and more that are no part of a name, a type or a float."""

_NAME = r" ?[%@]?[A-Za-z_$.][\w$.]*"
_OTHER = r" ?\d| ?[^\s\w]+|\s+"


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, *, constants: int = COMMON_CONSTANTS
) -> bytes:
    """Train on texts, which are held in memory; equal texts in equal order give equal bytes.

    Args:
        texts: assembly as `read_module` gives it.
        vocab_size: tokens, the 256 bytes among them; at least 300.
        constants: how many of the integers that most texts have may be tokens.

    Returns:
        JSON that the `tokenizers` library reads.

    Raises:
        ConfigError: the vocabulary is too small.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    if vocab_size < _LEAST:
        raise ConfigError("tokens.vocabulary", vocab_size, f"at least {_LEAST}")
    held = list(texts)
    words = Regex(_words(common_constants(held, constants)))
    tokenizer: Any = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(_SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_lines(held), trainer)
    return tokenizer.to_str().encode()


def count(tokenizer_json: bytes, texts: Iterable[str]) -> list[int]:
    """Tokens of each text, one text in memory at a time.

    Raises:
        ConfigError: the JSON is no tokenizer.
    """
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_str(tokenizer_json.decode())
    except Exception as error:  # the library raises nothing narrower
        raise ConfigError("tokenizer", tokenizer_json[:40], f"a tokenizer ({error})") from error
    return [_count_one(tokenizer, text) for text in texts]


def _count_one(tokenizer: Any, text: str) -> int:
    lines = list(_lines([text]))
    batches = (lines[start : start + _BATCH] for start in range(0, len(lines), _BATCH))
    return sum(
        len(encoding.ids)
        for batch in batches
        for encoding in tokenizer.encode_batch_fast(batch, add_special_tokens=False)
    )


def common_constants(texts: Iterable[str], number: int) -> list[str]:
    """Integers of two digits and more that most texts have, and more than one; ties by value."""
    found: Counter[str] = Counter()
    for text in texts:
        found.update(set(_CONSTANT.findall(text)))
    ordered = sorted(found.items(), key=lambda item: (-item[1], len(item[0]), item[0]))
    return [constant for constant, modules in ordered[:number] if modules > 1]


def _words(constants: Sequence[str]) -> str:
    """What no token goes beyond: names, common numbers, digits, signs; each with a blank before it."""
    whole = "|".join(constants)
    number = [rf" ?(?<![\w.$])(?:{whole})(?![\w.$])"] if constants else []
    return "|".join([_NAME, *number, _OTHER])


def _lines(texts: Iterable[str]) -> Iterator[str]:
    """Line by line: a module may have 100 MB, and no token goes beyond a line's end."""
    for text in texts:
        yield from text.splitlines(keepends=True)
