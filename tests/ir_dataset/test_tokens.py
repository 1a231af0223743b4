"""Tokens: deterministic, lossless, and numbers that are not common fall into digits."""

import pytest

pytest.importorskip("tokenizers", reason="pip install tokenizers")

from tokenizers import Tokenizer

from ir_dataset.tokens import common_constants, count, train_tokenizer
from rewriter.errors import ConfigError

TEXTS = [
    f"define i32 @f{n}(ptr %0) {{\n  %1 = load i32, ptr %0, align 16\n  %2 = add i32 %1, {9173 + n}\n"
    f"  ret i32 %2\n}}\n"
    for n in range(40)
]


@pytest.fixture(scope="module")
def trained():
    return train_tokenizer(TEXTS, 400)


def test_equal_texts_give_equal_bytes(trained):
    assert train_tokenizer(TEXTS, 400) == trained


def test_no_text_is_lost(trained):
    tokenizer = Tokenizer.from_str(trained.decode())
    text = '@é = global [3 x i8] c"\\00x\\FF", align 1 ; 0x7FF8\n'
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert tokenizer.get_vocab_size() <= 400


def test_constants_that_one_module_has_are_no_tokens(trained):
    assert common_constants(TEXTS, 10) == ["16"]
    tokens = Tokenizer.from_str(trained.decode()).encode("align 16, add 9173").tokens
    assert "Ġ16" in tokens
    assert tokens[-4:] == ["Ġ9", "1", "7", "3"]


def test_counts_add_up_line_by_line(trained):
    whole, parts = count(trained, ["".join(TEXTS)]), count(trained, TEXTS)
    assert whole[0] == sum(parts)
    assert 0 < whole[0] < len("".join(TEXTS)) / 2
    assert count(trained, [""]) == [0]


@pytest.mark.parametrize("size", [0, 299])
def test_a_vocabulary_below_the_bytes_is_refused(size):
    with pytest.raises(ConfigError, match="at least 300"):
        train_tokenizer(TEXTS, size)


def test_what_is_no_tokenizer_is_refused():
    with pytest.raises(ConfigError, match="tokenizer"):
        count(b"{}", ["x"])
