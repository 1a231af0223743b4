"""Views of a tensor's place: the same elements that PyTorch's views have."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from codegen.step.extent import plus, times
from codegen.step.value import Place, Refusal, Value, contiguous_strides

MEMORY = torch.arange(4096)


def value_of(shape, start=0):
    return Value(Place(None), tuple(shape), contiguous_strides(shape), torch.float32, start)


def seen(value):
    """The elements that a value stands for."""
    return torch.as_strided(MEMORY, value.fixed_shape, value.strides, value.start)


def like(shape):
    return torch.arange(torch.Size(shape).numel()).view(shape)


shapes = st.lists(st.integers(1, 4), min_size=1, max_size=4)


@settings(max_examples=60, deadline=None)
@given(shapes, st.data())
def test_views_are_those_of_pytorch(shape, data):
    value, tensor = value_of(shape), like(shape)
    for _ in range(3):
        dims = tensor.dim()
        dim = data.draw(st.integers(0, dims - 1))
        kind = data.draw(st.sampled_from(["transpose", "unsqueeze", "slice", "squeeze"]))
        if kind == "transpose":
            other = data.draw(st.integers(0, dims - 1))
            value, tensor = value.transposed(dim, other), tensor.transpose(dim, other)
        elif kind == "unsqueeze":
            value, tensor = value.unsqueezed(dim), tensor.unsqueeze(dim)
        elif kind == "squeeze" and dims > 1:
            value, tensor = value.squeezed([dim]), tensor.squeeze(dim)
        else:
            start = data.draw(st.integers(0, tensor.shape[dim] - 1))
            length = tensor.shape[dim] - start
            value, tensor = value.sliced(dim, start, length), tensor.narrow(dim, start, length)
    assert torch.equal(seen(value), tensor)
    assert value.is_contiguous == tensor.is_contiguous()


@settings(max_examples=80, deadline=None)
@given(shapes, st.permutations(range(4)), st.lists(st.integers(1, 6), min_size=1, max_size=3))
def test_a_reshape_is_a_view_exactly_where_pytorch_has_one(shape, order, wanted):
    order = [i for i in order if i < len(shape)]
    value, tensor = value_of(shape).permuted(order), like(shape).permute(order)
    total = tensor.numel()
    for extent in wanted:
        if total % extent == 0:
            new = (extent, total // extent)
            viewed = value.reshaped(new)
            try:
                expected = tensor.view(new)
            except RuntimeError:
                assert viewed is None
                continue
            assert viewed is not None
            assert torch.equal(seen(viewed), expected)


def test_growing_extents_stay_expressions():
    cache = value_of((1, 2, "capacity", 8))
    kept = cache.sliced(2, 0, "(entries + 1)")
    assert kept.shape == (1, 2, "(entries + 1)", 8)
    assert kept.strides[2:] == (8, 1)
    assert kept.strides[1] == times(8, "capacity")
    with pytest.raises(Refusal, match="grows"):
        _ = kept.fixed_shape


def test_expressions_are_short():
    assert times(3, 4) == 12
    assert times(1, "entries") == "entries"
    assert times(0, "entries") == 0
    assert plus(0, "entries") == "entries"
    assert eval(str(plus(times(2, "entries"), 3)), {"entries": 5}) == 13
