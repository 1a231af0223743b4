"""`rewriter kernels`: all or nothing in a directory, without a GPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

pytest.importorskip("triton", reason="Triton comes for Linux alone")

from codegen import compile as ahead
from codegen.cache import content_hash
from rewriter.capture.causal_lm import capture_causal_lm
from rewriter.cli.kernels import kernels_of
from rewriter.cli.main import app
from rewriter.decoding.derive import derive
from rewriter.errors import ArtifactError, ConfigError
from rewriter.export.directory import check_files
from rewriter.raising import raise_program
from tests.small_lms import small_lm


class Block(nn.Module):
    """Products with a bias, a residual and an odd width."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(32, 48)
        self.down = nn.Linear(48, 32, bias=False)
        self.odd = nn.Linear(32, 7, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = x + self.down(torch.sigmoid(self.up(x)) * 2)
        return self.odd(hidden.cumsum(0))


def block() -> Block:
    """The factory for the command line."""
    return Block().eval()


def run(*arguments: object):
    return CliRunner().invoke(app, [str(a) for a in arguments])


MODEL = ("tests.cli.test_kernels:block", "--input-shape", "3x32")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    directory = tmp_path_factory.mktemp("kernels") / "out"
    example = (torch.randn(3, 32),)
    summary = kernels_of(block(), directory, target="cuda:sm_90", example_inputs=example)
    return directory, summary


def test_every_kernel_has_its_files(written: tuple[Path, dict]) -> None:
    directory, summary = written
    check_files(directory, ("kernels.json",))
    assert json.loads((directory / "kernels.json").read_text()) == summary
    assert {f"{kernel['name']}.{ending}" for kernel in summary["kernels"] for ending in
            ("py", "cubin", "ptx", "json")} | {"kernels.json", "manifest.json"} == {
        path.name for path in directory.iterdir()
    }  # fmt: skip
    for kernel in summary["kernels"]:
        text = (directory / f"{kernel['name']}.py").read_text()
        assert kernel["name"].endswith(content_hash(text)[:12])
        assert kernel["description"] in text
        assert (directory / f"{kernel['name']}.cubin").read_bytes().startswith(b"\x7fELF")
        assert ".target sm_90" in (directory / f"{kernel['name']}.ptx").read_text()
        assert kernel["spilled_bytes"] == 0
        assert 0 < kernel["registers"] < 256


def test_pointwise_work_around_a_product_is_in_it(written: tuple[Path, dict]) -> None:
    _, summary = written
    told = [kernel["description"] for kernel in summary["kernels"]]
    assert any("add(value,column_0)" in text for text in told)
    assert any("add(element_0,value)" in text for text in told)
    odd = [k for k in summary["kernels"] if k["description"] == "gemv{form=rows}"]
    (kernel,) = odd  # its seven outputs start rows anywhere
    strides = {a["name"]: a["divisible_by"] for a in kernel["arguments"]}
    assert strides["out_row"] == 1


def test_the_command_prints_one_json_document(tmp_path: Path) -> None:
    result = run("kernels", *MODEL, "-o", tmp_path / "k", "--target", "hip:gfx942", "--json")
    assert result.exit_code == 0, result.output
    summary = json.loads(result.stdout)
    assert summary["target"] == "hip:gfx942"
    assert all((tmp_path / "k" / f"{k['name']}.hsaco").is_file() for k in summary["kernels"])


def test_wrong_use_is_one_line(tmp_path: Path) -> None:
    result = run("kernels", *MODEL, "-o", tmp_path / "k", "--target", "cuda:sm_12")
    assert result.exit_code == 2
    assert "one of cuda:sm_80" in result.stderr
    (tmp_path / "mine").write_text("x")
    result = run("kernels", *MODEL, "-o", tmp_path)
    assert result.exit_code == 2
    assert "holds other files" in result.stderr
    assert (tmp_path / "mine").read_text() == "x"


def test_a_failure_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(texts: dict, target: str) -> dict:
        raise ahead.KernelCompileError("no luck")

    monkeypatch.setattr(ahead, "compile_texts", fail)
    result = run("kernels", *MODEL, "-o", tmp_path / "k")
    assert result.exit_code == 2
    assert "no luck" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_unusable_targets_are_refused_before_the_long_work(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="target"):
        kernels_of("nowhere", tmp_path / "k", target="tpu")
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match="is a file"):
        kernels_of("nowhere", tmp_path / "file", target="cuda:sm_90")


def test_what_a_language_model_wants() -> None:
    from codegen.wanted_kernels import wanted_kernels

    program = capture_causal_lm(small_lm("llama"))
    raise_program(program)
    program = derive(program)
    wanted, unmet = wanted_kernels(program)
    assert not unmet
    operators = {each.description.operator for each in wanted}
    assert operators == {
        "rms_norm",
        "gemv",
        "rotary_append",
        "prefill_attention",
        "decode_attention",
        "merge_lse",
        "gated_activation",
    }
    (decode,) = [w for w in wanted if w.description.operator == "decode_attention"]
    assert (decode.description.head_dim, decode.description.group_size) == (8, 2)
    assert len(decode.nodes) == 2
