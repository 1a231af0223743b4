"""A tokenizer of whole words and single digits, made from the vocabulary of the tasks."""

from __future__ import annotations

import re
from random import Random

from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rewriter.quality.tasks import TASKS
from rewriter.quality.tasks.people import FIRST_NAMES, LAST_NAMES
from rewriter.quality.tasks.sentences import text
from rewriter.quality.tasks.words import WORDS

PIECES = r"\n|\d|[A-Za-z]+|[^\sA-Za-z\d]"
BOS, EOS, PAD, UNKNOWN = "<s>", "\n", "<pad>", "<unk>"


def build_tokenizer(max_length: int) -> PreTrainedTokenizerFast:
    """Words in a fixed order: specials, digits and signs, then words as they are named."""
    vocabulary = dict.fromkeys((PAD, BOS, EOS, UNKNOWN, *"0123456789"))
    vocabulary |= dict.fromkeys(re.findall(PIECES, _examples()))
    vocabulary |= dict.fromkeys((*FIRST_NAMES, *LAST_NAMES, *WORDS))
    ids = {piece: index for index, piece in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(PIECES), behavior="removed", invert=True)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=UNKNOWN,
        model_max_length=max_length,
    )


def _examples() -> str:
    """Enough text to meet every word that a template has."""
    rng = Random(0)
    samples = [task.draw(rng, 2, 400) for task in TASKS.values() if hasattr(task, "problem")]
    problems = [f"{q.prompt} {q.answer}" for s in samples for q in s.questions]
    brackets = [task.draw(rng, 2, 1) for task in TASKS.values() if not hasattr(task, "problem")]
    contexts = [f"{''.join(c for c in s.context if not c.isalpha())} ?" for s in brackets]
    return " ".join((*problems, *contexts, text(rng, 2000)))
