"""`rewriter quality` as a script sees it: one document on stdout, files whole, errors in one line."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from rewriter.cli.main import app
from tests.quality.conftest import every_word, make_tokenizer, tiny_llama

QUICK = ("--length", 96, "--rows", 1, "--samples", 1, "--questions", 1, "--seeds", 1)
STREAMING = ("-p", "streaming-llm{num_sink_tokens=2}", "--densities", "25,100", "--no-controls")


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny")
    tokenizer = make_tokenizer(every_word(), bos_token="<s>", eos_token="\n")
    tiny_llama(len(tokenizer)).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def run(*arguments):
    return CliRunner().invoke(app, ["quality", *map(str, arguments)])


def test_json_picture_and_table_tell_the_same(directory, tmp_path):
    picture, saved = tmp_path / "trade.png", tmp_path / "trade.json"
    options = (*QUICK, *STREAMING, "--tasks", "retrieval", "--plot", picture, "-o", saved)
    result = run(directory, *options, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found == json.loads(saved.read_text())
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert [r["density"] for r in found["results"]] == [None, 0.25, 1.0]
    dense, quarter, whole = (r["fidelity"]["retrieval"] for r in found["results"])
    assert dense["kl_mean"] == 0 and whole["kl_mean"] < 1e-9 < 1e-3 < quarter["kl_mean"]
    assert {p.name for p in tmp_path.iterdir()} == {"trade.png", "trade.json"}


def test_the_table_names_what_was_compared(directory):
    result = run(directory, *QUICK, *STREAMING, "--tasks", "retrieval")
    assert result.exit_code == 0, result.output
    for text in ("dense", "streaming-llm 25 %", "streaming-llm 100 %", "kept", "dropped"):
        assert text in result.stdout
    assert "streaming-llm 25 %: streaming-llm{num_sink_tokens=2,recent_window=22}" in result.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--densities", "0,50"), "densities='0,50' is not allowed: percentages above 0"),
        (("--densities", "x"), "percentages above 0"),
        (("--tasks", "riddles"), "tasks='riddles' is not allowed: one of"),
        (("--tasks", ""), "at least one task or text"),
        (("--modes", "loud"), "modes='loud'"),
        (("--length", "1000"), "at most the model's 256 positions"),
        (("--dtype", "int8"), "dtype='int8' is not allowed: one of float32"),
        (("--text", "missing.txt", "--length", "96"), "missing.txt cannot be read"),
        (("--plot", "nowhere/trade.png"), "plot="),
        (("-o", "nowhere/trade.json"), "output="),
        (("-p", "nonsense"), "nonsense"),
    ],
)
def test_bad_usage(directory, options, message):
    result = run(directory, "--tasks", "retrieval", *options)
    assert result.exit_code == 2, result.output
    assert message in " ".join(result.output.split())
    assert "Traceback" not in result.output and result.stdout == ""


def test_a_directory_without_a_tokenizer_is_refused(directory, tmp_path):
    tiny_llama(60).save_pretrained(tmp_path)
    result = run(tmp_path)
    assert result.exit_code == 2
    assert "cannot read the tokenizer" in result.output
