"""`genai_config.json`: right for what onnxruntime-genai can keep, refused for the rest."""

from __future__ import annotations

import json

import numpy as np
import pytest

from rewriter.deploy import OnnxDecoder
from rewriter.deploy.genai import GENAI_CONFIG, genai_config
from rewriter.errors import ExportError
from rewriter.export.onnx_file import open_onnx
from tests.deploy.small_decoders import (
    HEAD_DIM,
    HEADS,
    KV_HEADS,
    POSITIONS,
    VOCAB,
    WIDTH,
    write_bounded,
    write_gqa,
    write_portable,
)

CONFIG = {"num_attention_heads": HEADS, "hidden_size": WIDTH, "bos_token_id": 3}


def test_dimensions_tokens_and_buffers(tmp_path):
    settings = genai_config(open_onnx(write_gqa(tmp_path, config=CONFIG)).metadata)
    model, decoder = settings["model"], settings["model"]["decoder"]
    assert (model["vocab_size"], model["context_length"]) == (VOCAB, POSITIONS)
    assert (model["bos_token_id"], model["eos_token_id"], model["pad_token_id"]) == (3, [1, 2], 1)
    assert (decoder["num_hidden_layers"], decoder["hidden_size"]) == (1, WIDTH)
    assert (decoder["num_attention_heads"], decoder["num_key_value_heads"]) == (HEADS, KV_HEADS)
    assert decoder["head_size"] == HEAD_DIM
    assert settings["search"]["past_present_share_buffer"] is True
    portable = genai_config(open_onnx(write_portable(tmp_path)).metadata)
    assert portable["search"]["past_present_share_buffer"] is False


@pytest.mark.parametrize("changes", [{"kind": "module"}, {"vocab_size": None}, {"states": []}])
def test_what_it_cannot_run_is_said(tmp_path, changes):
    with pytest.raises(ExportError, match="onnxruntime-genai"):
        genai_config(open_onnx(write_gqa(tmp_path, **changes)).metadata)


def test_state_that_forgets_is_refused(tmp_path):
    with pytest.raises(ExportError, match="not sums"):
        genai_config(open_onnx(write_bounded(tmp_path)).metadata)


@pytest.mark.parametrize("write", [write_gqa, write_portable], ids=lambda write: write.__name__)
def test_onnxruntime_genai_gives_the_same_tokens(tmp_path, write):
    genai = pytest.importorskip("onnxruntime_genai", reason="needs onnxruntime-genai")
    path = write(tmp_path, config=CONFIG, generation_config={"eos_token_id": VOCAB - 1})
    settings = genai_config(open_onnx(path).metadata)
    (tmp_path / GENAI_CONFIG).write_text(json.dumps(settings))
    decoder = OnnxDecoder(path, threads=1)
    expected = decoder.generate([5, 6, 7], max_new_tokens=20)
    params = genai.GeneratorParams(model := genai.Model(str(tmp_path)))
    params.set_search_options(max_length=23)
    generator = genai.Generator(model, params)
    generator.append_tokens(np.array([5, 6, 7], np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    found = [int(token) for token in generator.get_sequence(0)][3:]
    assert found == [token for token in expected.ids if token != VOCAB - 1]
