"""What scripts rely on: exit codes, one document on stdout, nothing half-written, no tracebacks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from rewriter import ModelError, VerificationError
from rewriter.cli.console import guarded
from rewriter.cli.generation import _Streamer
from rewriter.cli.main import app

ROOT = Path(__file__).parents[2]
FACTORIES = """
import torch
from torch import nn

class Sum(nn.Module):
    def __init__(self, bias=0.0):
        super().__init__()
        self.line = nn.Linear(4, 4)
        nn.init.constant_(self.line.weight, 0.5)
        nn.init.constant_(self.line.bias, bias)

    def forward(self, x):
        return self.line(x)

def model():
    return Sum(), (torch.ones(2, 4),)

def other():
    return Sum(bias=1.0), (torch.ones(2, 4),)

def broken():
    raise ValueError("on purpose")

def stuck():
    import time
    print("asleep", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    (tmp_path / "factories.py").write_text(FACTORIES)
    monkeypatch.chdir(tmp_path)
    yield lambda *arguments: CliRunner().invoke(app, [str(a) for a in arguments])
    sys.modules.pop("factories", None)


def command(*arguments, cwd):
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, "-m", "rewriter", *map(str, arguments)],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": paths},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_optimize_save_and_verify_a_plain_module(run, tmp_path):
    result = run("optimize", "factories:model", "-o", "saved", "--html", "report.html", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["schema"] == 1
    assert (tmp_path / "report.html").read_text().startswith("<!doctype html>")
    verified = run("verify", "saved", "factories:model", "--json")
    assert verified.exit_code == 0, verified.output
    assert json.loads(verified.stdout)["metrics"]["relative_l2"] == 0
    assert run("verify", "saved").exit_code == 0


def test_verify_against_another_model_fails_with_code_one(run):
    assert run("optimize", "factories:model", "-o", "saved").exit_code == 0
    result = run("verify", "saved", "factories:other")
    assert result.exit_code == 1
    assert result.output.splitlines()[-1].startswith("error: the optimized model differs")


def test_optimize_into_a_saved_program_replaces_it(run):
    assert run("optimize", "factories:model", "-o", "saved").exit_code == 0
    assert run("optimize", "factories:other", "-o", "saved").exit_code == 0
    assert run("verify", "saved", "factories:other").exit_code == 0


def test_strict_says_what_matched_nothing(run):
    result = run("optimize", "factories:model", "-p", "grouped-attention", "--strict")
    assert result.exit_code == 2
    assert "grouped-attention matched nothing" in result.output


def test_without_verification_the_report_says_so(run):
    result = run("optimize", "factories:model", "--no-verify", "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["end_to_end"] == {}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("optimize", "factories:broken"), "on purpose"),
        (("optimize", "factories:nothing"), "nothing"),
        (("optimize", "torch.nn:Identity"), "example_inputs"),
        (("optimize", "factories:model", "--html", "missing/report.html"), "html"),
        (("optimize", "factories:model", "--html", "."), "html"),
        (("optimize", "factories:model", "-o", "factories.py"), "is a file"),
        (("optimize", "factories:model", "-p", "streaming-llm{recent_window=x}"), "recent_window"),
        (("optimize", "factories:model", "-p", "streaming-llm{recent_window=-1}"), "recent_window"),
        (("optimize", "factories:model", "--input-shape", "0x4"), "positive integers"),
        (("generate", "factories:model", "--prompt-ids", "1 2"), "cannot generate"),
        (("generate", "factories:model", "--prompt", "a"), "no tokenizer"),
        (("generate", "factories:model", "--prompt", "a", "--prompt-ids", "1"), "exactly one of"),
        (("generate", "factories:model", "--prompt-ids", "-1"), "token ids"),
        (("generate", "factories:model", "--prompt-ids", "1", "--top-k", "3"), "temperature"),
        (
            ("generate", "m", "--prompt-ids", "1", "--temperature", "1", "--top-p", "0"),
            "above 0, at most 1",
        ),
    ],
)
def test_bad_usage(run, arguments, message):
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert message in result.output
    assert "Traceback" not in result.output
    assert result.stdout == ""


@pytest.mark.parametrize("arguments", [("optimise",), ("optimize",), ("passes", "--what")])
def test_what_the_parser_refuses_has_code_two(run, arguments):
    assert run(*arguments).exit_code == 2


@pytest.mark.parametrize("place", ["/proc/saved", "/proc/1/saved"])
def test_an_unwritable_place_is_refused_before_the_model_is_read(run, place):
    result = run("optimize", "factories:broken", "-o", place)
    assert result.exit_code == 2
    assert "cannot be written" in result.output
    page = run("optimize", "factories:broken", "--html", "/proc/report.html")
    assert page.exit_code == 2
    assert "writable file" in page.output


def test_saved_programs_have_their_passes_already(run):
    assert run("optimize", "factories:model", "-o", "saved").exit_code == 0
    result = run("generate", "saved", "--prompt-ids", "1", "-p", "grouped-attention")
    assert result.exit_code == 2
    assert "has its passes already" in result.output


def test_a_token_beyond_the_vocabulary_is_refused(run, trial_reasoner):
    result = run("generate", trial_reasoner, "--prompt-ids", "5 100000")
    assert result.exit_code == 2
    assert "100000" in result.output


def test_explain_names_reasons(run):
    result = run("explain", "factories:model", "-p", "streaming-llm", "--json")
    assert result.exit_code == 0
    misses = json.loads(result.stdout)["misses"]
    assert any(m["subject"] == "streaming-llm" and m["reason"] for m in misses)
    assert "streaming-llm" in run("explain", "factories:model", "-p", "streaming-llm").stdout


def test_help_documents_the_exit_codes(run):
    assert "130" in run("--help").stdout


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (VerificationError("differs"), 1, "error: differs"),
        (ModelError("[bold]no[/bold]"), 2, "error: [bold]no[/bold]"),
        (KeyError("x"), 3, "error: unexpected KeyError: 'x' (run with --debug"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_every_error_has_its_code(error, code, message, capsys):
    import typer

    with pytest.raises(typer.Exit) as raised, guarded(debug=False):
        raise error
    assert raised.value.exit_code == code
    assert message in capsys.readouterr().err


def test_debug_shows_the_traceback():
    with pytest.raises(KeyError), guarded(debug=True):
        raise KeyError("x")


def test_interrupting_gives_130_and_no_traceback(tmp_path):
    (tmp_path / "factories.py").write_text(FACTORIES)
    process = command("optimize", "factories:stuck", cwd=tmp_path)
    assert process.stdout.readline() == "asleep\n"
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in errors


def test_a_closed_pipe_is_no_error(tmp_path):
    process = command("passes", cwd=tmp_path)
    process.stdout.close()
    errors = process.stderr.read()
    process.stderr.close()
    process.wait(timeout=60)
    assert "Traceback" not in errors
    assert "unexpected" not in errors


class _Letters:
    """A tokenizer of bytes, where a character may take several tokens."""

    def decode(self, ids, skip_special_tokens):
        return bytes(ids).decode(errors="replace")


def test_streaming_waits_for_whole_characters(capsys):
    streamer = _Streamer(_Letters())
    streamer.put(torch.tensor([[1, 2, 3]]))
    for byte in "né €!".encode():
        streamer.put(torch.tensor([byte]))
        assert "\ufffd" not in capsys.readouterr().out
    streamer.end()


def test_streaming_gives_the_whole_text(capsys):
    streamer = _Streamer(_Letters())
    streamer.put(torch.tensor([[1, 2, 3]]))
    for byte in "né €!\n🙂 z".encode():
        streamer.put(torch.tensor([byte]))
    streamer.end()
    assert capsys.readouterr().out == "né €!\n🙂 z\n"


def test_streaming_without_a_tokenizer_gives_ids(capsys):
    streamer = _Streamer(None)
    streamer.put(torch.tensor([[1, 2]]))
    streamer.put(torch.tensor([7]))
    streamer.put(torch.tensor([8]))
    streamer.end()
    assert capsys.readouterr().out == "7 8 \n"
