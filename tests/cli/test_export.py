"""Artifacts as a user makes and uses them; the formats' own tests stand under tests/export."""

from __future__ import annotations

import json
import shutil

import pytest
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from rewriter.cli.main import app

PROBLEM = "tom has 1 4 apples . gets 2 5 more . loses 7 . how many ?"


def run(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.fixture(scope="module")
def exported(trial_reasoner, tmp_path_factory):
    directory = tmp_path_factory.mktemp("export") / "deployed"
    result = run("export", trial_reasoner, "-o", directory, "--dtype", "float32", "--json")
    assert result.exit_code == 0, result.output
    summary = json.loads(result.stdout)
    assert summary["operators"]["Attention"] == 4
    assert summary["rewrites"] == {"grouped-attention": 4}
    return directory


def test_a_directory_has_everything_that_deployment_needs(exported):
    names = {path.name for path in exported.iterdir()}
    assert names >= {"model.onnx", "model.onnx.data", "config.json", "tokenizer.json"}


def test_it_generates_the_right_answer(exported):
    result = run("generate", exported, "--prompt", PROBLEM, "--json")
    assert result.exit_code == 0, result.output
    assert "3 2 ." in json.loads(result.stdout)["text"]
    assert run("generate", exported, "--prompt", PROBLEM).stdout.startswith("1 4 + 2 5 = 3 9")


def test_it_shows_what_it_is(exported):
    facts = json.loads(run("inspect", exported, "--json").stdout)
    assert facts["format"] == "onnx"
    assert facts["passes"] == ["grouped-attention"]
    assert facts["certificates"] == {"applied": 4}
    shown = run("inspect", exported).stdout
    assert "layer0_keys -> past_key_values.0.key" in shown
    assert "   4  Attention" in shown


def test_it_is_verified_beside_the_model_and_itself(exported, trial_reasoner):
    result = run("verify", exported, trial_reasoner, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["metrics"]["greedy"] == 1
    assert run("verify", exported).exit_code == 0


def test_another_model_is_not_the_one(exported, trial_reasoner, tmp_path):
    other = AutoModelForCausalLM.from_pretrained(trial_reasoner)
    other.model.layers[1].mlp.up_proj.weight.data.mul_(1.5)
    other.save_pretrained(tmp_path)
    result = run("verify", exported, tmp_path)
    assert result.exit_code == 1
    assert "other logits than the program" in result.stderr


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data", "config.json"])
def test_a_damaged_file_is_refused_by_every_command(exported, tmp_path, name):
    copy = tmp_path / "copy"
    shutil.copytree(exported, copy)
    content = bytearray((copy / name).read_bytes())
    content[len(content) // 2] ^= 1
    (copy / name).write_bytes(content)
    for command in (("generate", copy, "--prompt-ids", "5"), ("verify", copy)):
        result = run(*command)
        assert result.exit_code == 2, command
        assert name in result.stderr


def test_options_of_another_format_are_refused_before_the_work(tmp_path):
    for arguments in (
        ("m.onnx", "--target", "cuda:sm_90"),
        ("m.onnx", "--batch", "2"),
        ("m.pt2", "--ep", "cpu"),
        ("m.pt2", "--logits", "all"),
        ("m.onnx", "--dtype", "int3"),
    ):
        result = run("export", "no-such-model", "-o", tmp_path / arguments[0], *arguments[1:])
        assert result.exit_code == 2
        assert arguments[1].removeprefix("--") in result.stderr
        assert "no-such-model" not in result.stderr


def test_other_files_are_not_overwritten(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    result = run("export", "no-such-model", "-o", tmp_path)
    assert result.exit_code == 2
    assert "holds other files" in result.stderr
