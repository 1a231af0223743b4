import base64
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("msgspec", reason="pip install 'rewriter[ir]'")

from ir_dataset.dedup import Entry, deduplicate
from ir_dataset.near_duplicates import cluster_signatures
from ir_dataset.verify import FunctionSummary, ModuleSummary


def function(norm, signature=None, size=30):
    packed = (
        "" if signature is None else base64.b85encode(signature.astype("<u2").tobytes()).decode()
    )
    return FunctionSummary(
        name=f"f{norm}",
        n_instructions=size,
        n_blocks=1,
        fn_hash=norm,
        norm_hash=norm,
        minhash=packed,
    )


def entry(module, *functions, norm="", struct="", project="p", path="a.c", tier="a", ok=True):
    summary = ModuleSummary(
        module=module,
        reader_ok=ok,
        n_functions=len(functions),
        norm_hash=norm or module,
        struct_hash=struct,
        empty=ok and not functions,
        functions=tuple(functions),
    )
    return Entry(summary, project, project, "1", path, tier)


def levels(found):
    return {one.entry: (one.level, one.kept) for one in found.dropped}


def test_copies_are_found_by_bytes_by_norm_hash_and_by_structure():
    found = deduplicate(
        [
            entry("m0", function("x"), norm="n0", struct="s"),
            entry("m0", function("x"), norm="n0", struct="s", path="b.c"),
            entry("m1", function("x"), norm="n0", path="c.c"),
            entry("m2", function("x"), norm="n2", struct="s", path="d.c"),
            entry("m3", function("y"), norm="n3", struct="s", path="e.c"),
            entry("m4", ok=False),
            entry("m5"),
        ]
    )
    assert levels(found) == {
        1: ("exact", "m0"),
        2: ("norm", "m0"),
        3: ("structural", "m0"),
        5: ("unread", ""),
        6: ("empty", ""),
    }
    assert [(one.module, one.dup_count) for one in found.modules] == [("m0", 4), ("m3", 1)]
    assert found.counts["units"] == 7
    assert found.counts["modules_kept"] == 2


def test_equal_structural_hashes_alone_are_not_enough():
    found = deduplicate(
        [entry("m0", function("x"), struct="s"), entry("m1", function("y"), struct="s")]
    )
    assert len(found.modules) == 2


def test_the_freest_copy_is_kept_then_the_first_by_place():
    copies = [
        entry("m0", function("x"), norm="n", tier="c", project="a"),
        entry("m1", function("x"), norm="n", tier="b", project="z"),
        entry("m2", function("x"), norm="n", tier="b", project="y"),
        entry("m3", function("x"), norm="n", tier="none", project="b"),
    ]
    for order in (copies, copies[::-1]):
        found = deduplicate(order)
        assert [one.module for one in found.modules] == ["m2"]
        assert order[found.modules[0].entry].project == "y"


def test_functions_are_marked_and_clustered():
    rng = np.random.default_rng(0)
    one = rng.integers(0, 1 << 16, 64)
    near, far = one.copy(), one.copy()
    near[:6] += 1
    far[:20] += 1
    found = deduplicate(
        [
            entry("m0", function("x", one), function("short"), project="a"),
            entry("m1", function("x", one), function("y", near), project="b"),
            entry("m2", function("z", far), function("short"), project="c"),
        ]
    )
    clusters = [module.cluster for module in found.modules]
    assert [module.duplicate for module in found.modules] == [
        (False, False),
        (True, False),
        (False, True),
    ]
    assert clusters == [(0, -1), (0, 0), (1, -1)]
    assert found.counts["functions_unique"] == 4
    assert found.counts["functions_clustered"] == 3


def exact_clusters(rows, needed=55):
    labels = list(range(len(rows)))
    for at in range(len(rows)):
        for other in range(at):
            if (rows[at] == rows[other]).sum() >= needed and labels[at] != labels[other]:
                low, high = sorted((labels[at], labels[other]))
                labels = [low if one == high else one for one in labels]
    return labels


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), noise=st.sampled_from([0.0, 0.03, 0.06]))
def test_clusters_are_those_of_comparing_all_pairs(seed, noise):
    rng = np.random.default_rng(seed)
    base = rng.integers(0, 1 << 16, (12, 64))
    rows = base[rng.integers(0, 12, 60)]
    rows = np.where(rng.random(rows.shape) < noise, rng.integers(0, 1 << 16, rows.shape), rows)
    assert cluster_signatures(rows.astype(np.uint16)).tolist() == exact_clusters(rows)


def test_no_functions_give_no_clusters():
    assert cluster_signatures(np.zeros((0, 64), np.uint16)).tolist() == []
    assert cluster_signatures(np.zeros((1, 64), np.uint16)).tolist() == [0]


def test_the_order_of_entries_does_not_count():
    rng = np.random.default_rng(1)
    entries = [
        entry(
            f"m{at}",
            *(function(f"h{rng.integers(40)}", rng.integers(0, 1 << 16, 64)) for _ in range(3)),
            project=f"p{at % 5}",
            path=f"{at}.c",
        )
        for at in range(30)
    ]
    expected = deduplicate(entries)
    shuffled = entries[:]
    random.Random(0).shuffle(shuffled)
    found = deduplicate(shuffled)
    assert [one.module for one in found.modules] == [one.module for one in expected.modules]
    assert [(one.cluster, one.duplicate) for one in found.modules] == [
        (one.cluster, one.duplicate) for one in expected.modules
    ]
    assert found.counts == expected.counts
