"""Find the rewrite that makes a program wrong when every rewrite looks right by itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rewriter.engine.pipeline import Applied
from rewriter.errors import VerificationError
from rewriter.verify.bench import Bench, Identity, Plan

__all__ = ["culprit", "first_failing"]


def first_failing(count: int, fails: Callable[[int], bool]) -> int:
    """Length of the shortest prefix found that fails, its own prefix one shorter being good.

    Args:
        count: length of the whole, which fails; the empty prefix is taken to be good.
        fails: whether a prefix of this length fails; called about log2(count) times.
    """
    good, bad = 0, count
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (good, middle) if fails(middle) else (middle, bad)
    return bad


def culprit(
    bench: Bench, plan: Plan, applied: Sequence[Applied], excluded: frozenset[Identity]
) -> tuple[Applied, str]:
    """The last rewrite of the shortest failing prefix, and why it has to go.

    Raises:
        VerificationError: the program is wrong without any rewrite.
    """
    problem = bench.problem(plan, excluded | _identities(applied))
    if problem or not applied:
        raise VerificationError(f"before any pass the program differs from the model: {problem}")

    def fails(kept: Sequence[Applied]) -> str:
        left_out = _identities(applied) - _identities(kept)
        return bench.problem(plan, excluded | left_out)

    end = first_failing(len(applied), lambda length: bool(fails(applied[:length])))
    found, earlier = applied[end - 1], applied[: end - 1]
    alone = fails([found])
    if alone or not earlier:
        return found, alone or fails([*earlier, found])
    partner = earlier[first_failing(len(earlier), lambda n: bool(fails([*earlier[:n], found]))) - 1]
    problem = fails([partner, found]) or fails([*earlier, found])
    return found, f"only together with {partner.rewrite} at {partner.label}: {problem}"


def _identities(applied: Sequence[Applied]) -> frozenset[Identity]:
    return frozenset(a.identity for a in applied)
