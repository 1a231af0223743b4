"""Derived decoding against the model itself: every way of feeding the same tokens."""

import pytest
import torch

from rewriter.capture.causal_lm import capture_causal_lm
from rewriter.decoding.derive import derive
from rewriter.decoding.state import Session
from rewriter.engine.miss import Miss
from rewriter.errors import ConfigError, InputError
from rewriter.raising import raise_program
from tests.small_lms import small_lm as tiny

FAMILIES = ("llama", "gpt2", "gemma3_text", "bloom", "gpt_neox", "mistral")
PROGRAMS = {}


def program_of(family):
    if family not in PROGRAMS:
        raised = capture_causal_lm(tiny(family))
        raise_program(raised)
        PROGRAMS[family] = derive(raised)
    return PROGRAMS[family]


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


def logits_of(model, ids, **kwargs):
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False, **kwargs).logits


@pytest.mark.parametrize("calls", [(20,), (7, 13), (10, 1, 1, 8), (1,) * 20])
def test_any_split_of_a_sequence_gives_the_models_logits(family, calls):
    ids = torch.randint(3, 128, (2, 20))
    session = Session(program_of(family), 2)
    parts = [session.run(part) for part in ids.split(calls, dim=1)]
    torch.testing.assert_close(
        torch.cat(parts, 1), logits_of(tiny(family), ids), atol=1e-4, rtol=1e-4
    )
    assert session.entries == 20
    assert session.true_positions.tolist() == [20, 20]


def test_padded_rows_count_their_own_positions(family):
    ids = torch.randint(3, 128, (3, 12))
    mask = torch.ones(3, 12, dtype=torch.long)
    mask[0, :5] = 0
    mask[2, :1] = 0
    session = Session(program_of(family), 3)
    logits = [session.run(ids[:, :9], attention_mask=mask[:, :9])]
    logits += [session.run(ids[:, i : i + 1]) for i in range(9, 12)]
    together = torch.cat(logits, 1)
    for row in range(3):
        real = mask[row].bool()
        alone = logits_of(tiny(family), ids[row : row + 1, real])[0]
        torch.testing.assert_close(together[row, real], alone, atol=1e-4, rtol=1e-4)
    assert session.true_positions.tolist() == [7, 12, 11]


def test_right_padding_in_the_prompt_keeps_rows_apart():
    ids = torch.randint(3, 128, (2, 8))
    mask = torch.ones(2, 8, dtype=torch.long)
    mask[0, 5:] = 0
    session = Session(program_of("llama"), 2)
    session.run(ids, attention_mask=mask)
    new = torch.tensor([[7], [9]])
    step = session.run(new)
    alone = logits_of(tiny(), torch.cat([ids[:1, :5], new[:1]], 1))[0, -1]
    torch.testing.assert_close(step[0, -1], alone, atol=1e-4, rtol=1e-4)


def test_capacity_grows_by_doubling_and_keeps_what_was_there():
    ids = torch.randint(3, 128, (1, 150))
    session = Session(program_of("llama"), 1)
    sizes = set()
    parts = []
    for part in ids.split(10, dim=1):
        parts.append(session.run(part))
        sizes.add(session.state_bytes())
    assert len(sizes) == 3
    torch.testing.assert_close(torch.cat(parts, 1), logits_of(tiny(), ids), atol=1e-4, rtol=1e-4)


def test_logits_to_keep_computes_the_last_rows_only():
    ids = torch.randint(3, 128, (1, 9))
    full = Session(program_of("llama"), 1).run(ids)
    for chunk in (None, 4):
        last = Session(program_of("llama"), 1, prefill_chunk=chunk).run(ids, logits_to_keep=3)
        assert last.shape[1] == 3
        torch.testing.assert_close(last, full[:, -3:], atol=1e-5, rtol=1e-5)


def test_crop_takes_back_tokens():
    session = Session(program_of("llama"), 1)
    ids = torch.randint(3, 128, (1, 9))
    before = session.run(ids)
    session.crop(5)
    again = session.run(ids[:, 5:])
    torch.testing.assert_close(again, before[:, 5:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("ids", "kwargs", "message"),
    [
        (torch.zeros(1, 3), {}, "dtype"),
        (torch.zeros(2, 3, dtype=torch.long), {}, "shape"),
        (torch.zeros(1, 300, dtype=torch.long), {}, "256 positions"),
        (torch.zeros(1, 3, dtype=torch.long), {"attention_mask": torch.ones(1, 2)}, "columns"),
        (
            torch.zeros(1, 3, dtype=torch.long),
            {"position_ids": torch.tensor([[0, 2, 4]])},
            "ascend",
        ),
    ],
)
def test_wrong_input_is_refused_and_changes_nothing(ids, kwargs, message):
    session = Session(program_of("llama"), 1)
    with pytest.raises(InputError, match=message):
        session.run(ids, **kwargs)
    assert session.entries == 0


def test_a_given_capacity_is_a_limit():
    session = Session(program_of("llama"), 1, capacity=4)
    with pytest.raises(InputError, match="capacity=4"):
        session.run(torch.zeros(1, 5, dtype=torch.long))
    with pytest.raises(ConfigError, match="batch_size"):
        Session(program_of("llama"), 0)


class CumulativeMean(torch.nn.Module):
    """Mixes tokens by a running sum."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, hidden):
        out = self.inner(hidden)
        return out.cumsum(1) * 0.1


def test_a_model_that_mixes_tokens_otherwise_is_a_miss_that_names_the_operator():
    import copy

    model = copy.deepcopy(tiny())
    model.model.layers[1].mlp = CumulativeMean(model.model.layers[1].mlp)
    raised = capture_causal_lm(model)
    raise_program(raised)
    miss = derive(raised)
    assert isinstance(miss, Miss)
    assert "cumsum" in miss.reason
    assert "test_decoding.py" in miss.source
