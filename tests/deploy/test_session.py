"""State in the runtime's tensors: however tokens are fed, the logits are the same."""

from __future__ import annotations

import numpy as np
import pytest

from rewriter.deploy import OnnxDecoder
from rewriter.errors import ConfigError, InputError
from tests.deploy.small_decoders import POSITIONS, VOCAB, write_bounded, write_gqa, write_portable

CLOSE = {"rtol": 0, "atol": 2e-5}
"""fp32 products of one layer, added in another order."""


@pytest.fixture(scope="module")
def gqa(tmp_path_factory):
    return OnnxDecoder(write_gqa(tmp_path_factory.mktemp("gqa")), threads=1)


@pytest.fixture(scope="module")
def gqa_all(tmp_path_factory):
    return OnnxDecoder(write_gqa(tmp_path_factory.mktemp("gqa"), logits="all"), threads=1)


@pytest.fixture(scope="module")
def bounded(tmp_path_factory):
    return OnnxDecoder(write_bounded(tmp_path_factory.mktemp("bounded")), threads=1)


@pytest.fixture(scope="module")
def portable(tmp_path_factory):
    return OnnxDecoder(write_portable(tmp_path_factory.mktemp("portable")), threads=1)


@pytest.fixture(params=["gqa", "portable", "bounded"])
def decoder(request):
    return request.getfixturevalue(request.param)


def tokens(rows, length, seed=0):
    return np.random.default_rng(seed).integers(0, VOCAB, (rows, length))


@pytest.mark.parametrize("batch_size", [1, 3])
def test_token_by_token_equals_one_call(decoder, batch_size):
    ids = tokens(batch_size, 20)
    session = decoder.session(batch_size, capacity=20)
    for end in range(1, 21):
        logits = session.run(ids[:, end - 1 : end])
        assert logits.shape == (batch_size, 1, VOCAB)
        np.testing.assert_allclose(logits, decoder.run(ids[:, :end]), **CLOSE)


@pytest.mark.parametrize("chunk", [1, 2, 7, 100])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_chunks_equal_one_call(decoder, batch_size, chunk):
    ids = tokens(batch_size, 20)
    session = decoder.session(batch_size, prefill_chunk=chunk)
    np.testing.assert_allclose(session.run(ids), decoder.run(ids), **CLOSE)
    following = tokens(batch_size, 3, seed=1)
    whole = decoder.run(np.concatenate((ids, following), axis=1))
    np.testing.assert_allclose(session.run(following), whole, **CLOSE)


@pytest.mark.parametrize("chunk", [None, 1, 4])
def test_rows_of_other_lengths_equal_each_alone(decoder, chunk):
    lengths, new = (2, 11, 7), 5
    rows = [tokens(1, length + new, seed=length)[0] for length in lengths]
    ids, mask = np.zeros((3, 13), int), np.zeros((3, 13), int)
    for index, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        ids[index, :length], mask[index, :length] = row[:length], 1
    session = decoder.session(3, prefill_chunk=chunk)
    logits = session.run(ids, mask)
    for step in range(new + 1):
        for index, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            alone = decoder.run(row[None, : length + step])
            np.testing.assert_allclose(logits[index], alone[0], **CLOSE)
        if step < new:
            column = [[row[n + step]] for row, n in zip(rows, lengths, strict=True)]
            logits = session.run(np.array(column))
    assert session.lengths.tolist() == [length + new for length in lengths]


def test_rows_may_go_on_by_other_numbers_of_tokens(decoder):
    first, second = tokens(2, 4), tokens(2, 3, seed=1)
    mask = np.array([[1, 0, 0], [1, 1, 1]])
    session = decoder.session(2)
    session.run(first)
    logits = session.run(second, mask)
    for index, count in ((0, 1), (1, 3)):
        alone = np.concatenate((first[index], second[index, :count]))
        np.testing.assert_allclose(logits[index], decoder.run(alone[None])[0], **CLOSE)


@pytest.mark.parametrize("chunk", [None, 2])
@pytest.mark.parametrize("name", ["portable", "bounded"])
def test_padding_on_either_side_where_it_is_allowed(request, name, chunk):
    decoder = request.getfixturevalue(name)
    ids = tokens(3, 7)
    mask = np.array([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0, 0]])
    session = decoder.session(3, prefill_chunk=chunk)
    logits = session.run(ids, mask)
    following = tokens(3, 1, seed=1)
    later = session.run(following)
    for row in range(3):
        real = ids[row][mask[row] == 1][None]
        np.testing.assert_allclose(logits[row], decoder.run(real)[0], **CLOSE)
        longer = np.concatenate((real, following[row : row + 1]), axis=1)
        np.testing.assert_allclose(later[row], decoder.run(longer)[0], **CLOSE)


def test_a_token_behind_padding_is_refused_where_rows_stand_in_place(gqa):
    with pytest.raises(InputError, match="allowed: right padding"):
        gqa.run(tokens(1, 3), np.array([[0, 1, 1]]))


def test_a_row_without_a_token_is_refused_at_first(gqa):
    with pytest.raises(InputError, match="a row without a token"):
        gqa.run(tokens(2, 3), np.array([[1, 1, 1], [0, 0, 0]]))


def test_a_call_without_a_token_is_refused(decoder):
    with pytest.raises(InputError, match="no token"):
        decoder.run(tokens(1, 3), np.zeros((1, 3)))


def test_all_logits(gqa_all, gqa):
    ids = tokens(2, 9)
    mask = np.array([[1] * 4 + [0] * 5, [1] * 7 + [0] * 2])
    whole = gqa_all.run(ids, mask)
    assert whole.shape == (2, 9, VOCAB)
    for row, length in ((0, 4), (1, 7)):
        for end in range(1, length + 1):
            alone = gqa.run(ids[row : row + 1, :end])[0, 0]
            np.testing.assert_allclose(whole[row, end - 1], alone, **CLOSE)
    chunked = gqa_all.session(2, prefill_chunk=3).run(ids, mask)
    np.testing.assert_allclose(chunked[1, :7], whole[1, :7], **CLOSE)


def test_buffers_are_shared_and_grow_when_they_are_full(gqa):
    session = gqa.session(1)
    ids = tokens(1, 90)
    sizes = set()
    for column in range(90):
        logits = session.run(ids[:, column : column + 1])
        sizes.add(session.state_bytes())
    np.testing.assert_allclose(logits, gqa.run(ids), **CLOSE)
    assert len(sizes) == 2
    assert max(sizes) == 2 * min(sizes)


def test_bounded_state_stays_as_it_is(bounded):
    session = bounded.session(2)
    before = session.state_bytes()
    session.run(tokens(2, 50))
    assert session.state_bytes() == before


def test_sessions_do_not_touch_each_other(decoder):
    ids = tokens(1, 8)
    one, other = decoder.session(), decoder.session()
    one.run(ids[:, :4])
    other.run(ids[:, 4:])
    np.testing.assert_allclose(one.run(ids[:, 4:]), decoder.run(ids), **CLOSE)
    one.reset()
    np.testing.assert_allclose(one.run(ids), decoder.run(ids), **CLOSE)


@pytest.mark.parametrize(
    ("ids", "mask", "match"),
    [
        (np.zeros(3, int), None, r"shape \[3\]"),
        (np.zeros((1, 0), int), None, r"shape \[1, 0\]"),
        (np.zeros((2, 3), int), None, r"allowed: \[1, 1 or more\]"),
        (np.zeros((1, 3)), None, "dtype float64"),
        (np.array([[VOCAB]]), None, f"token {VOCAB}; allowed: 0 to {VOCAB - 1}"),
        (np.array([[-1]]), None, "token -1"),
        (np.zeros((1, 3), int), np.ones((1, 4)), r"attention_mask has shape \[1, 4\]"),
        (np.zeros((1, 3), int), np.zeros((1, 3)), "no token"),
        (np.zeros((1, 11), int), None, "capacity=10"),
    ],
)
def test_wrong_inputs_are_refused_and_change_nothing(gqa, ids, mask, match):
    session = gqa.session(1, capacity=10)
    with pytest.raises(InputError, match=match):
        session.run(ids, mask)
    known = tokens(1, 5)
    np.testing.assert_allclose(session.run(known), gqa.run(known), **CLOSE)


def test_positions_that_the_model_does_not_have_are_refused(gqa):
    session = gqa.session(1)
    session.run(tokens(1, POSITIONS - 1))
    session.run(tokens(1, 1))
    with pytest.raises(InputError, match=f"{POSITIONS + 1} tokens are longer than the model's"):
        session.run(tokens(1, 1))


@pytest.mark.parametrize("field", ["batch_size", "capacity", "prefill_chunk"])
def test_sizes_below_one_are_refused(gqa, field):
    with pytest.raises(ConfigError, match=f"{field}=0"):
        gqa.session(**{field: 0})
