"""Exported models generate what the optimized ones do, and nothing damaged is loaded."""

from __future__ import annotations

import logging
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from rewriter import optimize
from rewriter.deploy import OnnxDecoder
from rewriter.errors import ArtifactError, ConfigError, InputError
from rewriter.export.directory import write_manifest
from rewriter.export.onnx_export import export_onnx
from tests.conftest import ROOT
from tests.deploy.small_decoders import write_bounded, write_gqa
from tests.tiny import tiny_llama

REASONER = ROOT / "examples" / "models" / "reasoner"
PROMPTS = ["<s> age of ada abel?", "<s>", "<s> the big doctor that the small doctor remembers"]
STREAMING = "streaming-llm{num_sink_tokens=2,recent_window=6}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The reasoner for ONNX Runtime on a CPU, with its tokenizer."""
    directory = tmp_path_factory.mktemp("reasoner")
    optimized = optimize(REASONER, verify=False, backend="eager")
    export_onnx(optimized, directory / "model.onnx", ep="cpu")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(REASONER / name, directory / name)
    write_manifest(directory)
    return optimized, directory


@pytest.fixture(scope="module")
def reasoner(folder):
    return OnnxDecoder(folder[1], threads=1)


@pytest.fixture(scope="module")
def streaming(tmp_path_factory):
    """A random Llama that forgets, as standard operators."""
    model = tiny_llama(num_hidden_layers=1)
    optimized = optimize(model, passes=[STREAMING], verify=False, backend="eager")
    path = tmp_path_factory.mktemp("streaming") / "tiny.onnx"
    export_onnx(optimized, path)
    return optimized, OnnxDecoder(path, threads=1)


def greedy(optimized, ids, count):
    """New tokens of `opt.generate`, going on after the end of a sequence."""
    options = {"max_new_tokens": count, "do_sample": False, "eos_token_id": None}
    return tuple(optimized.generate(torch.tensor([ids]), **options)[0, len(ids) :].tolist())


def test_greedy_tokens_and_text_are_those_of_the_optimized_model(folder, reasoner):
    tokenizer = AutoTokenizer.from_pretrained(REASONER)
    for prompt in PROMPTS:
        found = reasoner.generate(prompt, max_new_tokens=40, ignore_eos=True)
        ids = tokenizer(prompt)["input_ids"]
        assert found.prompt_ids == tuple(ids)
        assert found.ids == greedy(folder[0], ids, 40)
        assert found.text == tokenizer.decode(found.ids, skip_special_tokens=True)
        assert found.finish_reason == "length"


def test_a_batch_gives_what_each_prompt_gives_alone(reasoner):
    options = {"max_new_tokens": 24, "ignore_eos": True}
    found = reasoner.generate_batch(PROMPTS, **options)
    assert found == [reasoner.generate(prompt, **options) for prompt in PROMPTS]


def test_rows_stop_by_themselves(reasoner):
    found = reasoner.generate_batch(PROMPTS, max_new_tokens=30)
    assert found == [reasoner.generate(prompt, max_new_tokens=30) for prompt in PROMPTS]
    assert {row.finish_reason for row in found} == {"stop"}
    assert len({len(row.ids) for row in found}) > 1
    assert all(row.ids[-1] == 2 and 2 not in row.ids[:-1] for row in found)


def test_pieces_join_to_the_whole(reasoner):
    whole = reasoner.generate(PROMPTS[0], max_new_tokens=40, ignore_eos=True)
    pieces = list(reasoner.stream(PROMPTS[0], max_new_tokens=40, ignore_eos=True))
    assert "".join(piece.text for piece in pieces) == whole.text
    assert tuple(token for piece in pieces for token in piece.ids) == whole.ids
    assert [piece.finish_reason for piece in pieces] == [None] * 39 + ["length"]


def test_stop_words_end_the_text(reasoner):
    whole = reasoner.generate(PROMPTS[0], max_new_tokens=40, ignore_eos=True)
    options = {"max_new_tokens": 40, "ignore_eos": True, "stop": ("doctor that",)}
    found = reasoner.generate(PROMPTS[0], **options)
    assert found.text == whole.text[: whole.text.index("doctor that")]
    assert found.finish_reason == "stop"
    pieces = [piece.text for piece in reasoner.stream(PROMPTS[0], **options)]
    assert "".join(pieces) == found.text


def test_sampling_follows_the_seed(reasoner):
    options = {"max_new_tokens": 20, "temperature": 1.0, "ignore_eos": True}
    one, same, other = (
        reasoner.generate("<s>", seed=seed, top_p=0.95, **options) for seed in (1, 1, 2)
    )
    assert one == same != other
    likeliest = reasoner.generate("<s>", top_k=1, **options)
    assert likeliest == reasoner.generate("<s>", max_new_tokens=20, ignore_eos=True)


def test_a_program_that_forgets_gives_the_same_tokens(streaming):
    optimized, decoder = streaming
    prompts = [[5, 6, 7], list(range(20, 61)), [1]]
    expected = [greedy(optimized, prompt, 20) for prompt in prompts]
    options = {"max_new_tokens": 20, "ignore_eos": True}
    assert [decoder.generate(prompt, **options).ids for prompt in prompts] == expected
    assert [row.ids for row in decoder.generate_batch(prompts, **options)] == expected


def test_what_cannot_be_continued_is_refused(reasoner):
    for prompt, match in (("", "no tokens"), ([], "no tokens"), ([9999], "token 9999")):
        with pytest.raises(InputError, match=match):
            reasoner.generate(prompt)
    with pytest.raises(InputError, match="prompts is empty"):
        reasoner.generate_batch([])
    with pytest.raises(InputError, match="longer than the model's 4096 positions"):
        reasoner.generate("<s>", max_new_tokens=4097)
    with pytest.raises(TypeError, match="beams"):
        reasoner.generate("<s>", beams=3)
    with pytest.raises(InputError, match="shape"):
        reasoner.run(np.zeros(3, int))


def test_without_a_tokenizer_only_ids_are_taken(tmp_path):
    decoder = OnnxDecoder(write_gqa(tmp_path), threads=1)
    assert decoder.generate([5, 6], max_new_tokens=3, ignore_eos=True).text == ""
    for options in ({}, {"stop": ("x",)}):
        prompt = [5] if options else "text"
        with pytest.raises(InputError, match=r"tokenizer\.json"):
            decoder.generate(prompt, **options)


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data", "tokenizer.json"])
def test_a_damaged_folder_is_refused(folder, tmp_path, name):
    copy = shutil.copytree(folder[1], tmp_path / "copy")
    content = bytearray((copy / name).read_bytes())
    content[len(content) // 2] ^= 1
    (copy / name).write_bytes(content)
    with pytest.raises(ArtifactError, match=rf"{name} is damaged"):
        OnnxDecoder(copy)


@pytest.mark.parametrize(
    "changes",
    [
        {"kind": "module"},
        {"padding": "none"},
        {"logits": 3},
        {"max_positions": -1},
        {"max_chunk": True},
        {"vocab_size": "many"},
        {"states": []},
        {"states": None},
        {"states": [{"name": "sums"}]},
        {"states": [{"input": "past.sums", "output": "present.sums", "dims": ["batch", -4],
                     "dtype": "float32", "fill": 0}]},
        {"states": [{"input": "past.sums", "output": "present.sums", "dims": ["batch", 63],
                     "dtype": "float32", "fill": 0}]},
        {"states": [{"input": "past.sums", "output": "present.sums", "dims": ["batch", 64],
                     "dtype": "int64", "fill": 0}]},
        {"states": [{"input": "past.sums", "output": "present.sums", "dims": ["batch", 64],
                     "dtype": "object", "fill": 0}]},
        {"states": [{"input": "past.sums", "output": "other", "dims": ["batch", 64],
                     "dtype": "float32", "fill": 0}]},
    ],
)  # fmt: skip
def test_metadata_that_the_graph_contradicts_are_refused(tmp_path, changes):
    path = write_bounded(tmp_path, **changes)
    with pytest.raises(ArtifactError, match=r"the metadata|holds a module"):
        OnnxDecoder(path)


def test_providers_and_threads_that_are_not_there_are_refused(tmp_path):
    path = write_gqa(tmp_path)
    for providers in ((), ("TPU",), ("CPUExecutionProvider", "TPU")):
        with pytest.raises(ConfigError, match="providers"):
            OnnxDecoder(path, providers=providers)
    with pytest.raises(ConfigError, match="threads=0"):
        OnnxDecoder(path, threads=0)


def test_settings_that_are_not_applied_are_logged(tmp_path, caplog):
    path = write_gqa(tmp_path, generation_config={"repetition_penalty": 1.2, "num_beams": 1})
    with caplog.at_level(logging.WARNING, "rewriter.deploy"):
        OnnxDecoder(path, threads=1)
    assert caplog.messages == ["generation_config asks for repetition_penalty=1.2: not applied"]


def test_no_pytorch_is_imported(folder):
    code = (
        "import sys; from rewriter.deploy import OnnxDecoder;"
        " print(OnnxDecoder(sys.argv[1], threads=1).generate('<s>', max_new_tokens=3).ids);"
        " assert not {'torch', 'transformers', 'onnxscript'} & sys.modules.keys()"
    )
    command = [sys.executable, "-c", code, str(folder[1])]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("(")
