"""What optimize() gives back is called like the model, and refuses what it cannot honour."""

import copy

import pytest
import torch
from torch import nn
from transformers import DynamicCache

from rewriter import InputError, optimize
from tests.decoding.mixers import with_operator
from tests.small_lms import small_lm as tiny

CACHE = {}


def optimized(family="llama"):
    if family not in CACHE:
        CACHE[family] = optimize(tiny(family), verify=False)
    return CACHE[family]


def masks(rows=2, length=9):
    left = torch.ones(rows, length, dtype=torch.long)
    left[0, :3] = 0
    hole = torch.ones_like(left)
    hole[:, 2] = 0
    return {"left": left, "right": left.flip(1), "hole": hole}


def difference(opt, model, ids, mask, **kwargs):
    ours = opt(ids, attention_mask=mask, **kwargs).logits
    theirs = model(ids, attention_mask=mask, **kwargs).logits
    return (ours - theirs)[mask.bool()].abs().max().item()


@pytest.mark.parametrize(
    ("family", "padding"),
    [
        ("llama", "left"),
        ("llama", "right"),
        ("gpt2", "right"),
        ("bloom", "left"),
        ("bloom", "right"),
    ],
)
def test_padding_gives_the_models_logits_where_positions_follow(family, padding):
    ids, mask = torch.randint(3, 128, (2, 9)), masks()[padding]
    assert difference(optimized(family), tiny(family), ids, mask) < 1e-4


@pytest.mark.parametrize(
    ("family", "padding"), [("gpt2", "left"), ("gpt2", "hole"), ("llama", "hole")]
)
def test_positions_have_to_be_given_where_padding_leaves_them_open(family, padding):
    opt, ids, mask = optimized(family), torch.randint(3, 128, (2, 9)), masks()[padding]
    with pytest.raises(InputError, match="position_ids is missing"):
        opt(ids, attention_mask=mask)
    by_token = (mask.cumsum(1) - 1).clamp_min(0)
    for positions in (torch.arange(9).expand(2, 9), by_token):
        assert difference(opt, tiny(family), ids, mask, position_ids=positions) < 1e-4


def test_other_ways_to_call_it_are_the_models_own():
    opt, model, ids = optimized(), tiny(), torch.randint(3, 128, (2, 9))
    expected = model(ids).logits
    for result in (opt(ids), opt(input_ids=ids), opt(ids, torch.ones_like(ids)), opt(ids.int())):
        torch.testing.assert_close(result.logits, expected, atol=1e-4, rtol=1e-4)
    plain = opt(ids, return_dict=False, output_attentions=False, labels=None)
    assert type(plain) is tuple
    last = opt(ids, logits_to_keep=2).logits
    torch.testing.assert_close(last, expected[:, -2:], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((), {}, "input_ids is missing"),
        ((), {"inputs_embeds": torch.zeros(1, 2, 32)}, "inputs_embeds is not supported"),
        (([[1, 2]],), {}, "list"),
        ((torch.zeros(3, dtype=torch.long),), {}, "shape"),
        ((torch.zeros(1, 0, dtype=torch.long),), {}, "shape"),
        ((torch.zeros(1, 2),), {}, "dtype"),
        ((torch.full((1, 2), 999),), {}, "token 999; allowed: 0 to 127"),
        ((torch.full((1, 2), -1),), {}, "token -1"),
        ((torch.ones(1, 300, dtype=torch.long),), {}, "256 positions"),
        ((torch.ones(1, 2, dtype=torch.long),), {"labels": torch.ones(1, 2)}, "labels"),
        ((torch.ones(1, 2, dtype=torch.long),), {"output_hidden_states": True}, "output_hidden"),
        (
            (torch.ones(1, 2, dtype=torch.long),),
            {"attention_mask": torch.ones(1, 1, 2, 2)},
            "shape",
        ),
        ((torch.ones(1, 2, dtype=torch.long),), {"logits_to_keep": -1}, "logits_to_keep"),
        ((torch.ones(1, 2, dtype=torch.long),), {"position_ids": torch.tensor([[-1, 0]])}, "-1"),
        ((torch.ones(1, 2, dtype=torch.long), DynamicCache()), {}, "positional"),
    ],
)
def test_wrong_input_is_named(args, kwargs, message):
    with pytest.raises(InputError, match=message):
        optimized()(*args, **kwargs)


GENERATION = {
    "by inputs": {},
    "return sequences": {"do_sample": True, "num_return_sequences": 3},
    "sampled beams": {"do_sample": True, "num_beams": 3},
    "no cache": {"use_cache": False},
    "chunked prefill": {"prefill_chunk_size": 4},
    "end of text": {"eos_token_id": list(range(3, 128, 4))},
    "forbidden tokens": {"bad_words_ids": [[5], [7]]},
    "guidance": {"guidance_scale": 1.5},
}


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom", "qwen2", "gemma3_text"])
@pytest.mark.parametrize("sample", [False, True], ids=["greedy", "sampling"])
def test_families_generate_the_models_tokens_from_a_padded_batch(family, sample):
    model, ids, mask = tiny(family), torch.randint(3, 128, (2, 9)), masks()["left"]
    options = {"attention_mask": mask, "max_new_tokens": 12, "pad_token_id": 0, "do_sample": sample}
    torch.manual_seed(1)
    expected = model.generate(ids, **options)
    torch.manual_seed(1)
    CACHE.pop(family, None)  # optimizing draws no number of the user's
    assert torch.equal(optimized(family).generate(ids, **options), expected)


@pytest.mark.parametrize("name", GENERATION)
def test_generation_options_give_the_models_tokens(name):
    options = {"inputs": torch.randint(3, 128, (2, 9)), "max_new_tokens": 10, "pad_token_id": 0}
    options |= GENERATION[name]
    model = tiny()
    torch.manual_seed(1)
    expected = model.generate(**options)
    torch.manual_seed(1)
    assert torch.equal(optimized().generate(**options), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"past_key_values": DynamicCache()}, "past_key_values"),
        ({"prompt_lookup_num_tokens": 3}, "assisted decoding"),
        ({"output_hidden_states": True, "return_dict_in_generate": True}, "output_hidden_states"),
        ({"max_new_tokens": 300}, "256 positions"),
    ],
)
def test_generation_that_cannot_be_honoured_is_refused(options, message):
    with pytest.raises(InputError, match=message):
        optimized().generate(torch.ones(1, 4, dtype=torch.long), **{"max_new_tokens": 4} | options)


def test_a_model_that_is_not_derived_is_still_called_like_itself():
    model = with_operator(lambda h: h.mean(1, keepdim=True).expand_as(h))
    opt, ids = optimize(model, verify=False), torch.randint(3, 128, (2, 9))
    ones = torch.ones_like(ids)
    for result in (opt(ids), opt(input_ids=ids, attention_mask=ones)):
        torch.testing.assert_close(result.logits, model(ids).logits, atol=1e-4, rtol=1e-4)
    with pytest.raises(InputError, match="padding"):
        opt(ids, attention_mask=masks()["left"])
    with pytest.raises(InputError, match="256 positions"):
        opt(torch.ones(1, 300, dtype=torch.long))
    with pytest.raises(InputError, match="mean"):
        opt.generate(ids)


class Switched(nn.Module):
    """Negates unless a flag, which capture fixes, says otherwise."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x, flag=False):
        return self.linear(x) if flag else -self.linear(x)


def test_a_flag_that_was_fixed_cannot_be_changed():
    module, x = Switched(), torch.randn(2, 4)
    opt = optimize(copy.deepcopy(module), (x, False), verify=False)
    torch.testing.assert_close(opt(x, False), module(x))
    for other in (True, torch.tensor(True)):
        with pytest.raises(InputError, match="flag"):
            opt(x, other)


def test_weights_that_are_cast_or_loaded_are_the_ones_that_run():
    opt, module, x = (
        optimize(nn.Linear(4, 4), (torch.randn(2, 4),)),
        nn.Linear(4, 4),
        torch.ones(2, 4),
    )
    weights = {f"module.{name}": value for name, value in module.state_dict().items()}
    opt.load_state_dict(weights, assign=True)
    torch.testing.assert_close(opt(x), module(x))
    opt.double()
    assert opt.run(x.double())[0].dtype == torch.float64


class Blocks(nn.Module):
    """Tokens in blocks of 16 add something once a block is full."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        full = x.shape[1] // 16 * 16
        return self.linear(x) + (x[:, :full].mean() if full > 0 else 0.0)


def test_sizes_that_take_another_path_are_refused():
    module, x = Blocks(), torch.randn(2, 9, 4)
    opt = optimize(module, (x,))
    torch.testing.assert_close(opt(x), module(x))
    with pytest.raises(InputError, match="another path"):
        opt(torch.randn(2, 40, 4))
