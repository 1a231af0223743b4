"""The commands as a user types them: results on stdout, exit codes that scripts can trust."""

import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from rewriter.cli.arguments import costed
from rewriter.cli.main import app
from rewriter.cost.context import current

PROBLEM = "tom has 1 4 apples . gets 2 5 more . loses 7 . how many ?"


def run(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    from pathlib import Path

    model = Path(__file__).parents[2] / "examples" / "models" / "trial_reasoner"
    directory = tmp_path_factory.mktemp("cli") / "saved"
    page = directory.parent / "report.html"
    result = run("optimize", model, "-o", directory, "--html", page, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["decoding"] == "derived"
    assert page.stat().st_size > 10_000
    return directory


def test_passes_lists_every_pass():
    result = run("passes", "--json")
    assert {item["name"] for item in json.loads(result.stdout)} >= {
        "grouped-attention",
        "streaming-llm",
    }
    assert "recent_window=1020" in run("passes").stdout


def test_a_saved_program_generates_the_right_answer(saved):
    result = run("generate", saved, "--prompt", PROBLEM, "--json")
    assert result.exit_code == 0, result.output
    assert "3 2 ." in json.loads(result.stdout)["text"]


def test_generate_streams_text(saved):
    result = run("generate", saved, "--prompt", PROBLEM)
    assert result.exit_code == 0
    assert result.stdout.startswith("1 4 + 2 5 = 3 9")


def test_sampling_follows_the_seed(saved):
    def sample(seed):
        options = ("--temperature", "2.0", "--seed", seed, "--json", "--max-new-tokens", "12")
        return json.loads(run("generate", saved, "--prompt-ids", "5 6 7", *options).stdout)["ids"]

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)


def test_verify_compares_with_the_model(saved, trial_reasoner):
    result = run("verify", saved, trial_reasoner, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["metrics"]["top1_agreement"] == 1.0


def test_verify_fails_on_a_damaged_program(saved, tmp_path):
    import shutil

    copy = shutil.copytree(saved, tmp_path / "copy")
    (copy / "weights.safetensors").write_bytes(b"broken")
    result = run("verify", copy)
    assert result.exit_code == 2
    assert "weights.safetensors" in result.output


def test_golden_tokens_on_the_command_line(stories260k):
    golden = json.loads((stories260k / "golden.json").read_text())
    count = len(golden["greedy_ids"]) - len(golden["prompt_ids"])
    prompt = " ".join(str(i) for i in golden["prompt_ids"])
    options = ("--prompt-ids", prompt, "--max-new-tokens", count, "--json")
    result = run("generate", stories260k, *options)
    assert json.loads(result.stdout)["ids"] == golden["greedy_ids"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("optimize", "/nowhere"), "/nowhere"),
        (("optimize", "/nowhere", "-p", "nope"), "nope"),
        (("optimize", "/nowhere", "--backend", "cuda"), "backend='cuda'"),
        (("optimize", "/nowhere", "--cost", "guess"), "cost='guess'"),
        (("optimize", "no.such:factory"), "no.such"),
        (("explain", "/nowhere"), "/nowhere"),
        (("generate", "/nowhere", "--prompt-ids", "1 x"), "1 x"),
        (("generate", "/nowhere"), "exactly one of"),
        (("verify", "/nowhere"), "/nowhere"),
        (("optimize", "torch.nn:Identity", "--input-shape", "2xq"), "positive integers"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_two(arguments, message):
    result = run(*arguments)
    assert result.exit_code == 2
    assert message in result.output
    assert "Traceback" not in result.output


@pytest.mark.parametrize("name", ["roofline", "learned"])
def test_costs_by_name(name):
    if name == "learned":
        pytest.importorskip("lightgbm", reason="pip install 'rewriter[ir]'")
    with costed(name):
        found = current()
        assert found is not None and found.model.name == name
    with costed("none"):
        assert current() is None


def test_an_occupied_output_is_refused_before_any_work(tmp_path, trial_reasoner):
    (tmp_path / "mine.txt").write_text("mine")
    result = run("optimize", trial_reasoner, "-o", tmp_path)
    assert result.exit_code == 2
    assert "other files" in result.output
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_plain_module_by_factory():
    result = run("explain", "torch.nn:Identity", "--input-shape", "2x3", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["decoding"] == "not a causal language model"


def test_the_module_runs_as_a_command():
    done = subprocess.run(
        [sys.executable, "-m", "rewriter", "optimize", "/nowhere"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
