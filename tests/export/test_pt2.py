"""A .pt2: what was compiled computes what the program computes, over one set of weights."""

from __future__ import annotations

import os
import shutil
import subprocess

import pytest
import torch

from codegen.cpp_kernels.compiler import find_compiler
from rewriter import ConfigError, InputError, load, optimize
from rewriter.errors import ExportError, VerificationError
from rewriter.export.pt2 import export_pt2
from rewriter.export.pt2_archive import open_pt2
from rewriter.export.pt2_check import check_artifact
from rewriter.export.pt2_compile import check_target, compile_entry
from rewriter.export.pt2_cpu import cpu_kind
from rewriter.export.pt2_entry import Limits, module_entry
from rewriter.export.pt2_step import CarriedSteps
from tests.conftest import ROOT
from tests.export.pt2_files import members, rewritten
from tests.tiny import TinyConvNet, tiny_llama, token_ids

LIMITS = Limits(batch=2, max_length=80)
pytestmark = pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler")


@pytest.fixture(scope="session")
def llama():
    return tiny_llama(num_hidden_layers=1)


@pytest.fixture(scope="session")
def optimized(llama):
    return optimize(llama, backend="eager", verify=False)


@pytest.fixture(scope="session")
def written(optimized, tmp_path_factory):
    """The summary of one artifact that all tests share: AOTInductor takes its time."""
    path = tmp_path_factory.mktemp("pt2") / "model.pt2"
    stages = []
    summary = export_pt2(optimized, path, max_length=80, batch=2, on_stage=stages.append)
    assert stages == ["compile prefill", "compile decode", "compile decode steps", "write", "check"]
    return summary


@pytest.fixture(scope="module")
def model(written):
    return load(written.path)


def left_padded(ids, *missing):
    mask = (torch.arange(ids.shape[1]) >= torch.tensor(missing)[:, None]).long()
    return ids.masked_fill(mask == 0, 0), mask


def test_a_new_process_has_checked_every_kind_of_call(written):
    assert written.checked == (
        "prompt 2x1",
        "prompt 2x2",
        "prompt 2x7",
        "prompt 2x64",
        "left padded 2x7",
    )
    assert (written.entries, written.native, written.limits) == (("prefill", "decode"), 2, LIMITS)
    assert list(written.path.parent.iterdir()) == [written.path]


def test_it_is_called_like_the_model(model, llama, written):
    ids = token_ids(2, 9)
    torch.testing.assert_close(model(ids).logits, llama(ids).logits, rtol=1e-4, atol=1e-4)
    assert model.report.backend == "pt2"
    assert "carried C++ calls" in model.report.backend_reason
    expected = llama.generate(ids, max_new_tokens=12, do_sample=False)
    assert torch.equal(model.generate(ids, max_new_tokens=12, do_sample=False), expected)


def test_left_padding_changes_nothing(model, llama):
    ids, mask = left_padded(token_ids(2, 9), 0, 4)
    options = {"attention_mask": mask, "max_new_tokens": 10, "do_sample": False}
    assert torch.equal(model.generate(ids, **options), llama.generate(ids, **options))


def test_steps_are_those_that_were_carried(model):
    run = model.run
    assert isinstance(run, CarriedSteps)
    assert {key[0] for key in run.steps} == {2}
    before = run.fallback
    run.fallback = None  # whatever is no decode step would fail
    session = model.session(2)
    try:
        session.run(token_ids(2, 1))
        with pytest.raises(TypeError):
            session.run(token_ids(2, 2))
    finally:
        run.fallback = before


def test_other_batches_run_too(model, llama):
    ids = token_ids(3, 6)
    expected = llama.generate(ids, max_new_tokens=5, do_sample=False)
    assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False), expected)


def test_sessions_keep_states_of_their_own(model, optimized):
    first, second = model.session(2), model.session(2)
    ids, others = token_ids(2, 6, seed=1), token_ids(2, 6, seed=2)
    for session, tokens in ((first, ids), (second, others)):
        session.run(tokens[:, :4])
    for at in (4, 5):
        for session, tokens in ((first, ids), (second, others)):
            found = session.run(tokens[:, at : at + 1])[:, -1]
            expected = optimized(tokens[:, : at + 1]).logits[:, -1]
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    first.reset()
    torch.testing.assert_close(first.run(ids), optimized(ids).logits, rtol=1e-4, atol=1e-4)


def test_the_room_is_what_was_asked_for(model):
    session = model.session(2)
    session.run(token_ids(2, 78))
    session.run(token_ids(2, 2))
    with pytest.raises(InputError, match="81 entries do not fit: capacity=80"):
        session.run(token_ids(2, 1))


def test_entries_and_steps_read_the_same_weights(written):
    """A change of a mapped weight shows in the prompt, the compiled step and the carried one."""
    changed = load(written.path)
    head = changed.program.module.get_parameter("lm_head.weight")
    ids = token_ids(2, 5)
    outputs = []
    for scale in (1.0, 2.0):
        head.mul_(scale)
        for run in (changed.run, changed.run.fallback):
            session = changed.session(2)
            session._run = run
            outputs.append((session.run(ids), session.run(ids[:, :1])))
    for plain, doubled in zip(outputs[:2], outputs[2:], strict=True):
        for a, b in zip(plain, doubled, strict=True):
            torch.testing.assert_close(2 * a, b, rtol=1e-4, atol=1e-4)
    again = load(written.path)  # and the file is as it was
    torch.testing.assert_close(again(ids).logits, outputs[0][0], rtol=1e-4, atol=1e-4)


def test_weights_are_in_the_file_once(written):
    sizes = {name: len(data) for name, data in members(written.path)}
    assert sizes["weights.bin"] < written.weight_bytes + 64 * 100
    assert open_pt2(written.path).places["weights.bin"][0] % 4096 == 0


def test_another_processor_runs_the_graph_and_says_so(written, llama, tmp_path):
    kind = cpu_kind()
    other = {**kind, "instructions": [*kind["instructions"], "avx9000"]}
    path = rewritten(written.path, tmp_path / "other.pt2", metadata={"cpu": other})
    model = load(path)
    assert "this processor has no avx9000" in model.report.notes[-1]
    ids = token_ids(2, 7)
    torch.testing.assert_close(model(ids).logits, llama(ids).logits, rtol=1e-4, atol=1e-4)


def test_another_torch_runs_the_graph_and_says_so(written, tmp_path):
    versions = {**open_pt2(written.path).metadata["versions"], "torch": "1.0.0"}
    path = rewritten(written.path, tmp_path / "other.pt2", metadata={"versions": versions})
    assert "made with torch 1.0" in load(path).report.notes[-1]


def test_a_difference_is_found(written):
    wrong = optimize(tiny_llama(num_hidden_layers=1, seed=1), backend="eager", verify=False)
    with pytest.raises(VerificationError, match="differs from the program: output 0"):
        check_artifact(wrong, written.path, LIMITS)


def test_a_plain_module_takes_any_batch(tmp_path):
    net = TinyConvNet()
    optimized = optimize(net, (torch.randn(2, 3, 16, 16),), backend="eager", verify=False)
    summary = export_pt2(optimized, tmp_path / "net.pt2", portable=True)
    assert (summary.entries, summary.native, summary.limits) == (("forward",), 0, None)
    model = load(summary.path)
    for rows in (1, 2, 5):
        images = torch.randn(rows, 3, 16, 16)
        torch.testing.assert_close(model(images), net(images), rtol=1e-4, atol=1e-5)


def test_greedy_tokens_in_cpp(written, llama, tmp_path):
    """`examples/cpp`, built and run: libtorch alone, and the same tokens."""
    cmake = shutil.which("cmake")
    if cmake is None:
        pytest.skip("no cmake: pip install cmake")
    prefix = torch.utils.cmake_prefix_path
    source, build = str(ROOT / "examples" / "cpp"), str(tmp_path / "build")
    options = [f"-DCMAKE_PREFIX_PATH={prefix}", "-DCMAKE_BUILD_TYPE=Debug"]
    options.append("-DCMAKE_CXX_FLAGS=-g0 -w")
    for command in ([cmake, "-S", source, "-B", build, *options], [cmake, "--build", build]):
        made = subprocess.run(command, capture_output=True, text=True)
        assert made.returncode == 0, made.stdout[-3000:] + made.stderr[-3000:]
    ids = token_ids(1, 6)[0].tolist()
    command = [f"{build}/generate", str(written.path), "12", *map(str, ids)]
    run = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ))
    assert run.returncode == 0, run.stderr
    prompt = torch.tensor([ids])
    expected = llama.generate(prompt, max_new_tokens=12, do_sample=False)[0, 6:].tolist()
    assert [int(token) for token in run.stdout.split()] == expected


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"target": "cuda:sm_90"}, "target='cuda:sm_90' is not allowed: cpu: this machine"),
        ({"target": "tpu"}, "target='tpu' is not allowed: cpu, or cuda:sm_NN"),
        ({"max_length": 8}, "max_length=8 is not allowed: 16 to 128 entries"),
        ({"max_length": 129}, "max_length=129 is not allowed: 16 to 128 entries"),
        ({"batch": 0}, "batch=0 is not allowed: an integer of at least 1"),
    ],
)
def test_what_cannot_be_is_said_before_the_work(optimized, tmp_path, options, told):
    if options.get("target") == "cuda:sm_90" and torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    with pytest.raises(ConfigError, match=told):
        export_pt2(optimized, tmp_path / "model.pt2", **options)
    assert list(tmp_path.iterdir()) == []


def test_sizes_of_state_are_not_for_plain_modules(tmp_path):
    net = optimize(TinyConvNet(), (torch.randn(2, 3, 8, 8),), backend="eager", verify=False)
    with pytest.raises(ConfigError, match="batch=2 is not allowed: nothing, for a program without"):
        export_pt2(net, tmp_path / "net.pt2", batch=2)


def test_a_compiler_is_asked_for(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    find_compiler.cache_clear()
    try:
        with pytest.raises(ConfigError, match="which AOTInductor needs: set CXX"):
            check_target("cpu")
    finally:
        monkeypatch.undo()
        find_compiler.cache_clear()


def test_a_foreign_operator_is_named():
    class Foreign(torch.nn.Module):
        def forward(self, x):
            return torch.ops.pt2_tests.twice(x)

    library = torch.library.Library("pt2_tests", "DEF")
    library.define("twice(Tensor x) -> Tensor")
    library.impl("twice", lambda x: 2 * x, "CompositeExplicitAutograd")
    torch.library.register_fake("pt2_tests::twice", lambda x: torch.empty_like(x), lib=library)
    optimized = optimize(Foreign(), (torch.randn(2, 3),), backend="eager", verify=False)
    with pytest.raises(ExportError, match=r"pt2_tests\.twice"):
        compile_entry(module_entry(optimized.program, [torch.randn(2, 3)]))
