"""optimize(): the result is used like the model, and the model is left alone."""

import json

import pytest
import torch
from torch import nn
from transformers import StoppingCriteria, StoppingCriteriaList

import rewriter
from rewriter import ConfigError, InputError, ModelError, RewriteError, optimize
from tests.small_lms import small_lm as tiny


@pytest.fixture(scope="module")
def optimized():
    return optimize(tiny())


def test_golden_tokens_before_and_after_saving(stories260k, tmp_path):
    golden = json.loads((stories260k / "golden.json").read_text())
    wanted, prompt = golden["greedy_ids"], torch.tensor([golden["prompt_ids"]])
    opt = optimize(stories260k)
    count = len(wanted) - prompt.shape[1]
    assert opt.generate(prompt, max_new_tokens=count, do_sample=False)[0].tolist() == wanted
    opt.save(tmp_path / "saved")
    loaded = rewriter.load(tmp_path / "saved")
    assert loaded.generate(prompt, max_new_tokens=count, do_sample=False)[0].tolist() == wanted


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"do_sample": True, "temperature": 0.8, "top_k": 20},
        {"num_beams": 3},
        {"repetition_penalty": 1.3},
    ],
    ids=["greedy", "sampling", "beams", "logits-processor"],
)
def test_generate_equals_the_models_own(optimized, options):
    ids = torch.randint(3, 128, (3, 8))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    common = {"attention_mask": mask, "max_new_tokens": 20, "pad_token_id": 0} | options
    torch.manual_seed(5)
    expected = tiny().generate(ids, **common)
    torch.manual_seed(5)
    assert torch.equal(optimized.generate(ids, **common), expected)


def test_streamer_and_stopping_criteria_are_honoured(optimized):
    class Collect:
        def __init__(self):
            self.calls, self.ended = [], False

        def put(self, value):
            self.calls.append(value.tolist())

        def end(self):
            self.ended = True

    class AfterFive(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.full((input_ids.shape[0],), input_ids.shape[1] >= 9)

    streamer = Collect()
    out = optimized.generate(
        torch.randint(3, 128, (1, 4)),
        streamer=streamer,
        stopping_criteria=StoppingCriteriaList([AfterFive()]),
        max_new_tokens=30,
        eos_token_id=None,
    )
    assert out.shape[1] == 9
    assert len(streamer.calls) == 6
    assert streamer.ended


def test_forward_has_the_models_outputs_and_honours_the_mask(optimized):
    ids = torch.randint(3, 128, (2, 9))
    with torch.no_grad():
        expected = tiny()(ids)
    result = optimized(ids)
    assert type(result) is type(expected)
    torch.testing.assert_close(result.logits, expected.logits, atol=1e-4, rtol=1e-4)


def test_the_model_is_not_changed():
    model = tiny("qwen2")
    before = {name: (p.data_ptr(), p.requires_grad) for name, p in model.named_parameters()}
    config = model.config.to_dict()
    optimize(model)
    assert before == {n: (p.data_ptr(), p.requires_grad) for n, p in model.named_parameters()}
    assert config == model.config.to_dict()


def test_two_runs_give_the_same_program():
    assert optimize(tiny()).program.code == optimize(tiny()).program.code


def test_the_code_runs_as_it_is_printed(optimized):
    ids = torch.randint(3, 128, (1, 5))
    assert "rewriter.grouped_attention" in optimized.program.code
    session = optimized.session(1)
    torch.testing.assert_close(session.run(ids), optimized(ids).logits)


def test_report_says_what_was_done(optimized):
    report = optimized.report
    assert {c.op: (c.raised, c.candidates) for c in report.coverage}["attention"] == (2, 2)
    assert [c.status for c in report.certificates] == ["applied", "applied"]
    assert all(c.implementation_error <= c.tolerance for c in report.certificates)
    assert report.end_to_end["top1_agreement"] == 1.0
    assert "grouped-attention" in str(report)
    json.dumps(report.to_json())


def test_plain_module_keeps_its_signature():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))

        def forward(self, x, *, scale):
            return {"y": self.inner(x) * scale, "x": x}

    net = Net()
    example = {"x": torch.randn(2, 5, 8), "scale": torch.randn(8)}
    opt = optimize(net, example)
    inputs = {"x": torch.randn(3, 7, 8), "scale": torch.randn(8)}
    out = opt(**inputs)
    assert out.keys() == {"y", "x"}
    torch.testing.assert_close(out["y"], net(**inputs)["y"])
    with pytest.raises(InputError, match="dtype"):
        opt(x=torch.randn(3, 7, 8).double(), scale=torch.randn(8))
    with pytest.raises(InputError, match="shape"):
        opt(x=torch.randn(3, 7, 9), scale=torch.randn(8))
    with pytest.raises(InputError, match="generate"):
        opt.generate(torch.zeros(1, 1, dtype=torch.long))


@pytest.mark.parametrize(
    ("passes", "message"),
    [
        ("nope", "one of"),
        ("streaming-lm", "did you mean 'streaming-llm'"),
        ("streaming-llm{window=3}", "recent_window"),
        ("streaming-llm{recent_window=0}", "at least 1"),
        ("streaming-llm{recent_window=x}", "an integer"),
        ("streaming-llm{", "knob=value"),
        (["streaming-llm", "streaming-llm{recent_window=8}"], "not together"),
        ([3], "a spec or a pass object"),
    ],
)
def test_bad_passes_are_refused_before_any_work(passes, message):
    with pytest.raises(ConfigError, match=message):
        optimize("/nowhere", passes=passes)


def test_bad_backend_and_missing_model_are_named():
    with pytest.raises(ConfigError, match="backend='cuda'"):
        optimize(tiny(), backend="cuda")
    with pytest.raises(ModelError, match="/nowhere"):
        optimize("/nowhere")


def test_strict_names_what_did_not_match():
    with pytest.raises(RewriteError, match="grouped-attention matched nothing"):
        optimize(nn.Linear(4, 4), (torch.randn(2, 4),), strict=True)


def test_verify_false_says_unverified():
    report = optimize(tiny(), verify=False).report
    assert {c.status for c in report.certificates} == {"unverified"}


def test_explain_applies_nothing_and_names_misses():
    report = rewriter.explain(tiny("gpt2"), passes=["streaming-llm"])
    assert {c.status for c in report.certificates} <= {"unverified"}
    reasons = [m.reason for m in report.misses if m.subject == "streaming-llm"]
    assert len(reasons) == 2
    assert all("re-position" in reason for reason in reasons)


def test_list_passes_has_knobs():
    names = {info.name: info for info in rewriter.list_passes()}
    assert names["streaming-llm"].knobs["num_sink_tokens"] == "4"
    assert names["streaming-llm"].fidelity == "approximate"
