"""Every answer follows from its problem, held-out problems are apart, and seeds decide everything."""

from __future__ import annotations

import re
from random import Random

import pytest

from rewriter.quality.tasks import TASKS, final_answer
from rewriter.quality.tasks.people import AGES
from rewriter.quality.tasks.sentences import text
from rewriter.quality.tasks.task import is_held_out
from rewriter.quality.tasks.words import WORDS

SIZES = {"retrieval": 30, "tracking": 30, "affixes": 30}


def samples(name: str, count: int = 60, held_out: bool = True):
    rng = Random(3)
    return [TASKS[name].sample(rng, SIZES.get(name, 2), 4, held_out=held_out) for _ in range(count)]


def questions(name: str):
    return [(s.context, q) for s in samples(name) for q in s.questions]


def solve_story(prompt: str) -> int:
    """The total that a story ends with, from its words alone."""
    name, total, _ = re.match(r"(\w+ \w+) has (as many|\d+) (\w+)", prompt).groups()
    result = AGES[name] if total == "as many" else int(total)
    for verb, amount, bags in re.findall(r"(gets|loses) (\d+)(?: bags of (\d+))?\.", prompt):
        change = int(amount) * int(bags or 1)
        result += change if verb == "gets" else -change
        assert 0 <= result <= 99
    return result


@pytest.mark.parametrize("name", ["arithmetic", "recalled-arithmetic"])
def test_stories_end_with_their_total_and_every_step_is_true(name):
    for _, question in questions(name):
        assert int(question.final) == solve_story(question.prompt)
        for left, sign, right, result in re.findall(r"(\d+)([-+*])(\d+)=(\d+)", question.answer):
            value = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}[sign]
            assert value(int(left), int(right)) == int(result)


def test_every_step_of_a_story_changes_its_answer():
    for _, question in questions("arithmetic"):
        steps = re.findall(r"(?:gets|loses) [^.]*\.", question.prompt)
        assert 4 <= len(steps) <= 6
        for step in steps:
            shorter = question.prompt.replace(f" {step}", "", 1)
            amounts = [int(n) for n in re.findall(r"\d+", step)]
            product = amounts[0] * (amounts[1] if len(amounts) > 1 else 1)
            assert product > 0 and shorter != question.prompt


def test_recalled_stories_begin_with_the_age_in_the_table():
    for _, question in questions("recalled-arithmetic"):
        name = " ".join(question.prompt.split()[:2])
        assert question.answer.startswith(f"age {AGES[name]};")


def test_lists_are_sorted_and_the_wanted_number_is_picked():
    for _, question in questions("lists"):
        wanted, *_ = question.prompt.split()
        numbers = sorted(map(int, re.findall(r"\d+", question.prompt)))
        assert list(map(int, re.findall(r"\d+", question.answer.split(";")[0]))) == numbers
        right = {"max": numbers[-1], "min": numbers[0], "median": numbers[len(numbers) // 2]}
        assert int(question.final) == right[wanted]


def test_retrieval_asks_for_pairs_of_the_context():
    for context, question in questions("retrieval"):
        pairs = dict(pair.split() for pair in context.strip("{}").split(", "))
        assert len(pairs) == 30
        assert pairs[question.prompt.removeprefix("? ")] == question.answer


def test_tracking_follows_the_pointers():
    for context, question in questions("tracking"):
        values = dict(line.split() for line in context.strip("[]").split(", "))
        name, way = question.prompt.removeprefix("? "), []
        while name in values:
            name = values[name]
            way.append(name)
        assert question.answer == f"{' '.join(way)}; {name}"
        assert 2 <= len(way) <= 4


@pytest.mark.parametrize("size", [3, 4, 5, 30, 1024])
def test_every_name_is_at_one_place_of_one_chain(size):
    context = TASKS["tracking"].draw(Random(size), size, 1).context
    lines = [line.split() for line in context.strip("[]").split(", ")]
    left, right = zip(*lines, strict=True)
    assert len(set(left)) == len(left) and len(set(right)) == len(right)
    assert len({*left, *right}) <= size


def test_affixes_are_known_by_their_first_two_words():
    for sample in samples("affixes"):
        strings = [s.split() for s in sample.context.strip("()").split(", ")]
        words = [word for string in strings for word in string]
        assert len(strings) == 30 and len(set(words)) == len(words) == 3 * 30
        last = {f"{a} {b}": c for a, b, c in strings}
        for question in sample.questions:
            assert last[question.prompt.removeprefix("? ")] == question.answer


def test_affixes_have_as_many_strings_as_there_are_words_for():
    sample = TASKS["affixes"].draw(Random(0), 1000, 1)
    assert sample.context.count(",") + 1 == TASKS["affixes"].largest == len(WORDS) // 3


@pytest.mark.parametrize("name", TASKS)
def test_the_seed_decides(name):
    task = TASKS[name]
    drawn = [task.sample(Random(seed), 3, 2, held_out=True) for seed in (5, 5, 6)]
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize("name", sorted(set(TASKS) - {"people"}))
@pytest.mark.parametrize("held_out", [True, False])
def test_held_out_problems_are_apart(name, held_out):
    for sample in samples(name, 20, held_out):
        problems = (
            [sample.context] if TASKS[name].smallest else [q.prompt for q in sample.questions]
        )
        assert all(is_held_out(problem) == held_out for problem in problems)


def test_final_answers_are_compared_in_one_spelling():
    assert final_answer("14+25=39; 3 9 \n ? x") == "39"
    assert final_answer(" 14+17 = 3 1 ;  31 .") == "31"
    assert final_answer("temo gusa") == final_answer(" temo  gusa\n") == "temo gusa"
    assert final_answer("") == ""


def test_sentences_agree_in_number():
    lines = text(Random(0), 2000).split(". ")
    singular = re.compile(
        r"^(a|the) (\w+ )?(farmer|child|dog|cat|king) (walk|run|sleep|sing|work)\b"
    )
    plural = re.compile(r"^(two|many) (\w+ )?\w+s (walks|runs|sleeps|sings|works)\b")
    assert not any(singular.match(line) or plural.match(line) for line in lines)
    assert sum(line.split()[0] in ("two", "many") for line in lines) > 200
