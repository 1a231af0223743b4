"""Text as it grows: whole characters, the same spaces as at once, and stop words."""

from __future__ import annotations

import random

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from rewriter.deploy.text import StopText, TextStream, read_tokenizer
from rewriter.errors import ArtifactError

TEXTS = [
    "plain words, and more of them",
    "naïve café — 漢字かな交じり文 🙂🙃👩‍👩‍👧‍👦 done",
    "🙂" * 60,
    " leading and trailing ",
    "a\n\n  b\tc",
]


def byte_tokenizer():
    """One token for each byte: every character beyond ASCII takes several."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: index for index, character in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def fallback_tokenizer():
    """Words with a mark for spaces, and bytes for what is unknown, as SentencePiece has them."""
    words = ["<unk>", *(f"<0x{i:02X}>" for i in range(256)), *"▁abcdefghijklmnopqrstuvwxyz,\n\t"]
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return tokenizer


def words_tokenizer():
    """Whole words, joined by spaces when they are decoded."""
    words = {word: index for index, word in enumerate(["<unk>", *" ".join(TEXTS[:1]).split()])}
    tokenizer = Tokenizer(models.WordLevel(words | {"plain": 50, "words": 51}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


MAKERS = [byte_tokenizer, fallback_tokenizer, words_tokenizer]


@pytest.mark.parametrize("make", MAKERS, ids=lambda make: make.__name__)
@pytest.mark.parametrize("text", TEXTS)
def test_pieces_join_to_the_text_at_once(make, text):
    tokenizer = make()
    ids = tokenizer.encode(text).ids
    stream = TextStream(tokenizer)
    pieces = [stream.push(token) for token in ids]
    assert "".join(pieces) + stream.end() == tokenizer.decode(ids)
    assert stream.end() == ""


@pytest.mark.parametrize("make", MAKERS[:2], ids=lambda make: make.__name__)
def test_no_piece_holds_half_a_character(make):
    tokenizer = make()
    stream = TextStream(tokenizer)
    for token in tokenizer.encode(TEXTS[1]).ids:
        assert "\ufffd" not in stream.push(token)


def test_bytes_that_are_no_text_are_shown_and_not_held_for_ever():
    tokenizer = byte_tokenizer()
    stream, source = TextStream(tokenizer), random.Random(0)
    ids = [source.randrange(256) for _ in range(200)]
    shown = ""
    for token in ids:
        shown += stream.push(token)
    assert len(shown) > 100
    assert shown + stream.end() == tokenizer.decode(ids)


def test_the_window_stays_small():
    stream = TextStream(byte_tokenizer())
    for token in stream._tokenizer.encode("many words " * 40).ids:
        stream.push(token)
        assert len(stream._ids) < 40


@pytest.mark.parametrize(
    ("words", "pieces", "text", "found"),
    [
        ([], ["a", "b"], "ab", False),
        (["END"], ["one E", "N", "D two"], "one ", True),
        (["END"], ["one E", "N", " two"], "one EN two", False),
        (["END"], ["one EN"], "one EN", False),
        (["\n\n", "stop"], ["a\n", "b st", "op c"], "a\nb ", True),
        (["aab"], ["aaa", "ab"], "aa", True),
        (["bc", "abcd"], ["abc"], "a", True),
        (["x"], ["xyz"], "", True),
    ],
)
def test_stop_words(words, pieces, text, found):
    stop = StopText(words)
    assert "".join([*map(stop.push, pieces), stop.end()]) == text
    assert stop.found is found


def test_a_damaged_tokenizer_is_named(tmp_path):
    assert read_tokenizer(tmp_path) is None
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(ArtifactError, match=r"tokenizer\.json cannot be read"):
        read_tokenizer(tmp_path)
