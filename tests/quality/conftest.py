"""A tiny random Llama over the vocabulary of a word-level tokenizer, optimised once."""

from __future__ import annotations

import functools
from random import Random

import pytest
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rewriter import optimize
from rewriter.quality.tasks import TASKS
from rewriter.quality.tasks.people import FIRST_NAMES, LAST_NAMES
from rewriter.quality.tasks.sentences import text
from rewriter.quality.tasks.words import WORDS

PIECES = r"\n|\d|[A-Za-z]+|[^\sA-Za-z\d]"


def make_tokenizer(words: list[str], **specials: str) -> PreTrainedTokenizerFast:
    ids = {word: i for i, word in enumerate(dict.fromkeys(["<unk>", *specials.values(), *words]))}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(PIECES), behavior="removed", invert=True)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", **specials)


def every_word() -> list[str]:
    import re

    samples = [task.draw(Random(0), 4, 300) for task in TASKS.values()]
    texts = [s.context for s in samples] + [
        f"{q.prompt} {q.answer}\n" for s in samples for q in s.questions
    ]
    found = re.findall(PIECES, " ".join((*texts, text(Random(0), 3000))))
    return [*found, *FIRST_NAMES, *LAST_NAMES, *WORDS, *"0123456789"]


@pytest.fixture(scope="session")
def tokenizer():
    return make_tokenizer(every_word(), bos_token="<s>", eos_token="\n")


def tiny_llama(vocab_size: int, **changes) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 256,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": None,
    }
    model = LlamaForCausalLM(LlamaConfig(vocab_size=vocab_size, **{**sizes, **changes})).eval()
    for name, weight in model.named_parameters():
        if weight.dim() >= 2 and "norm" not in name:
            torch.nn.init.normal_(weight, std=0.3)
    return model


@pytest.fixture(scope="session")
def model(tokenizer) -> LlamaForCausalLM:
    return tiny_llama(len(tokenizer))


@functools.cache
def _optimized(model, passes):
    return optimize(model, passes=[*passes, "default"])


@pytest.fixture(scope="session")
def optimized(model):
    """By specs: `optimized("streaming-llm{...}")`."""
    return lambda *passes: _optimized(model, passes)
