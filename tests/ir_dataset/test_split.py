import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("msgspec", reason="pip install 'rewriter[ir]'")

from ir_dataset.audit import audit_split, require_clean
from ir_dataset.records import decode, encode
from ir_dataset.split import FunctionKey, Split, SplitInput, assign, assign_randomly
from rewriter.errors import VerificationError


def keys(*hashes, cluster=-1):
    return tuple(FunctionKey(f"h{one}", cluster, 10) for one in hashes)


def audited(items, **options):
    split = assign(items, **options)
    return split, audit_split(items, split, assign_randomly(items))


@st.composite
def corpora(draw):
    """Modules of a few projects whose functions are drawn from one pool, so that they overlap."""
    pool = draw(
        st.lists(
            st.tuples(st.integers(0, 30), st.integers(-1, 12), st.integers(1, 200)),
            min_size=1,
            max_size=30,
        )
    )
    functions = [FunctionKey(f"h{one}", cluster, size) for one, cluster, size in pool]
    modules = draw(st.integers(1, 30))
    return [
        SplitInput(
            module=f"m{at}",
            project=f"p{draw(st.integers(0, 9))}",
            language=draw(st.sampled_from(["c", "rust", "zig"])),
            functions=tuple(draw(st.lists(st.sampled_from(functions), min_size=1, max_size=6))),
        )
        for at in range(modules)
    ]


@settings(max_examples=40, deadline=None)
@given(items=corpora(), seed=st.integers(0, 5), max_shared=st.sampled_from([0.0, 0.5, 1.0]))
def test_no_set_shares_a_function_with_another(items, seed, max_shared):
    split, audit = audited(items, seed=seed, max_shared=max_shared)
    assert audit.clean
    require_clean(audit)
    assert [module.module for module in split.modules] == [item.module for item in items]
    for item, module in zip(items, split.modules, strict=True):
        assert len(module.functions) == len(item.functions)
        if item.language == "zig":
            assert module.split in ("ood", "")
        if module.split == "train":
            assert all(module.functions)
        if max_shared == 0 and module.split:
            assert all(module.functions)
    assert decode(encode(split), Split) == split


def overlapping():
    return [SplitInput(f"m{at}", f"p{at}", "c", keys(at, 100 + at, "shared")) for at in range(40)]


def test_without_the_guard_the_audit_fails():
    _, guarded = audited(overlapping())
    assert guarded.clean
    split, audit = audited(overlapping(), guard=False)
    assert {module.split for module in split.modules} == {"train", "validation", "test"}
    assert not audit.clean
    assert all(one.same_norm_hash for one in audit.sets)
    with pytest.raises(VerificationError, match=r"test: [1-9]"):
        require_clean(audit)


def test_the_audit_sees_clusters_projects_and_other_pairs_of_sets():
    items = [
        SplitInput("m0", "a", "c", keys(0, cluster=7)),
        SplitInput("m1", "b", "c", keys(1, cluster=7)),
        SplitInput("m2", "a", "c", keys(2)),
        SplitInput("m3", "c", "c", keys(2)),
    ]
    names = ("train", "test", "test", "validation")
    template = assign(items, guard=False).modules
    wrong = Split(
        modules=tuple(
            type(one)(module=one.module, split=name, functions=one.functions)
            for one, name in zip(template, names, strict=True)
        ),
        families={},
        groups={},
    )
    audit = audit_split(items, wrong, wrong)
    test = next(one for one in audit.sets if one.name == "test")
    assert (test.same_norm_hash, test.same_cluster, test.same_project) == (0, 1, 1)
    assert test.percent_shared == 50
    assert audit.between == 1
    assert not audit.clean


def test_the_random_control_leaks_and_tells_how_much():
    items = [
        SplitInput(f"m{at}", f"p{at // 20}", "c", keys(at // 2, f"own{at}")) for at in range(400)
    ]
    _, audit = audited(items)
    assert audit.clean
    control = next(one for one in audit.control if one.name == "test")
    assert control.percent_shared > 20


def test_projects_stay_whole_and_do_not_move_when_the_corpus_grows():
    small = [SplitInput(f"m{at}", f"p{at % 50}", "c", keys(at)) for at in range(200)]
    large = small + [SplitInput(f"n{at}", f"q{at % 50}", "c", keys(f"n{at}")) for at in range(200)]
    first, second = assign(small), assign(large)
    assert first.groups == {name: second.groups[name] for name in first.groups}
    shares = [list(second.groups.values()).count(name) for name in ("train", "validation", "test")]
    assert shares[0] > 65 and min(shares) > 2
    assert assign(small, seed=1).groups != first.groups


def test_every_set_gets_a_family_where_there_are_three():
    items = [SplitInput(f"m{at}", f"p{at}", "c", keys(at)) for at in range(3)]
    for seed in range(10):
        assert sorted(assign(items, seed=seed).groups.values()) == ["test", "train", "validation"]


def test_projects_that_are_one_another_are_a_family():
    fork = tuple(FunctionKey(f"h{at}", at, 30) for at in range(20))
    items = [
        SplitInput("m0", "openthing", "c", fork),
        SplitInput("m1", "librething", "c", fork[:15] + keys("own", cluster=99)),
        SplitInput("m2", "user", "c", fork[:1] + keys("u", cluster=98)),
        *(SplitInput(f"n{at}", f"p{at}", "c", keys(f"n{at}")) for at in range(5)),
    ]
    assert assign(items).families == {"librething": "openthing"}


def test_what_everybody_includes_makes_no_family():
    header = tuple(FunctionKey(f"h{at}", at, 30) for at in range(20))
    items = [SplitInput(f"m{at}", f"p{at}", "c++", header) for at in range(5)]
    assert assign(items).families == {}


def test_a_module_that_is_mostly_elsewhere_is_dropped_as_a_whole():
    taken = tuple(FunctionKey(f"t{at}", -1, 100) for at in range(3))
    items = [
        *(SplitInput(f"m{at}", f"p{at}", "c", taken) for at in range(30)),
        SplitInput("z0", "z", "zig", (*taken, FunctionKey("own", -1, 100))),
        SplitInput("z1", "z", "zig", (taken[0], FunctionKey("own2", -1, 900))),
    ]
    by_name = {one.module: one for one in assign(items).modules}
    assert (by_name["z0"].split, by_name["z0"].functions) == ("", (False,) * 4)
    assert (by_name["z1"].split, by_name["z1"].functions) == ("ood", (False, True))
    strict = {one.module: one for one in assign(items, max_shared=0.0).modules}
    assert strict["z1"].split == ""
