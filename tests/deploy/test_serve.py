"""The server of the examples, as a client sees it."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from rewriter.deploy import OnnxDecoder
from tests.conftest import ROOT
from tests.deploy.small_decoders import VOCAB, write_gqa

pytest.importorskip("fastapi", reason="needs fastapi: pip install 'rewriter[serve]'")
pytest.importorskip("uvicorn", reason="needs uvicorn: pip install 'rewriter[serve]'")
STARTING = 60
"""Seconds that a server may take to answer."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random decoder whose words are w0 to w39."""
    directory = tmp_path_factory.mktemp("served")
    write_gqa(directory)
    words = {f"w{index}": index for index in range(VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory


@pytest.fixture(scope="module")
def address(folder):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = ROOT / "examples" / "serve_onnx.py"
    options = ["--name", "small", "--threads", "1", "--port", str(port)]
    command = [sys.executable, str(script), str(folder), *options]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        address = f"http://127.0.0.1:{port}"
        try:
            _wait(process, address)
            yield address
        finally:
            process.terminate()


def _wait(process, address):
    limit = time.monotonic() + STARTING
    while time.monotonic() < limit:
        assert process.poll() is None, process.stderr.read()
        try:
            urllib.request.urlopen(f"{address}/v1/models", timeout=STARTING).close()
            return
        except urllib.error.URLError:
            time.sleep(0.1)
    raise TimeoutError(f"no answer in {STARTING} s")


def post(address, **body):
    """Status and text of the answer."""
    request = urllib.request.Request(
        f"{address}/v1/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=STARTING) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def complete(address, **body):
    status, text = post(address, **body)
    assert status == 200, text
    return json.loads(text)


def events(address, **body):
    """What a stream holds."""
    status, text = post(address, stream=True, **body)
    assert status == 200, text
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


def test_the_model_is_listed(address):
    with urllib.request.urlopen(f"{address}/v1/models", timeout=STARTING) as answer:
        listed = json.load(answer)
    assert [card["id"] for card in listed["data"]] == ["small"]


def test_greedy_text_is_the_decoder_s(address, folder):
    prompt = "w5 w6 w7"
    expected = OnnxDecoder(folder, threads=1).generate(prompt, max_new_tokens=12)
    answer = complete(address, prompt=prompt, max_tokens=12, temperature=0, model="small")
    assert answer["object"] == "text_completion"
    assert answer["choices"][0]["text"] == expected.text
    assert answer["choices"][0]["finish_reason"] == expected.finish_reason
    count = len(expected.ids)
    usage = {"prompt_tokens": 3, "completion_tokens": count, "total_tokens": 3 + count}
    assert answer["usage"] == usage


def test_several_prompts_and_ids_are_answered_in_order(address):
    prompts = ["w5 w6 w7", "w9"]
    both = complete(address, prompt=prompts, temperature=0)["choices"]
    assert [choice["index"] for choice in both] == [0, 1]
    ids = complete(address, prompt=[[5, 6, 7], [9]], temperature=0)["choices"]
    alone = [complete(address, prompt=p, temperature=0)["choices"][0]["text"] for p in prompts]
    assert [c["text"] for c in both] == [c["text"] for c in ids] == alone


def test_a_stream_joins_to_the_whole_and_counts(address):
    body = {"prompt": ["w5 w6 w7", "w9"], "max_tokens": 12, "temperature": 0}
    whole = complete(address, **body)
    *pieces, last = events(address, stream_options={"include_usage": True}, **body)
    assert last["usage"] == whole["usage"]
    assert last["choices"] == []
    for choice in whole["choices"]:
        parts = [c for piece in pieces for c in piece["choices"] if c["index"] == choice["index"]]
        assert "".join(part["text"] for part in parts) == choice["text"]
        reasons = [part["finish_reason"] for part in parts]
        assert reasons[-1] == choice["finish_reason"]
        assert set(reasons[:-1]) <= {None}


def test_stop_words_and_seeds(address):
    body = {"prompt": "w5", "max_tokens": 12, "temperature": 0}
    whole = complete(address, **body)["choices"][0]["text"]
    word = whole.split()[3]
    stopped = complete(address, stop=[word], **body)["choices"][0]
    assert stopped["text"] == whole[: whole.index(word)]
    assert stopped["finish_reason"] == "stop"
    drawn = {
        seed: complete(address, prompt="w5", temperature=2, top_p=0.99, seed=seed)
        for seed in (1, 2)
    }
    again = complete(address, prompt="w5", temperature=2, top_p=0.99, seed=1)
    texts = [answer["choices"][0]["text"] for answer in (drawn[1], again, drawn[2])]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "prompt"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"prompt": []}, None),
        ({"prompt": [99]}, None),
        ({"prompt": [99], "stream": True}, None),
        ({"prompt": "w1", "max_tokens": 0}, "max_tokens"),
        ({"prompt": "w1", "max_tokens": 1000}, None),
        ({"prompt": "w1", "temperature": 3}, "temperature"),
        ({"prompt": "w1", "top_p": 0}, "top_p"),
        ({"prompt": "w1", "seed": -1}, "seed"),
        ({"prompt": "w1", "n": 2}, "n"),
        ({"prompt": "w1", "echo": True}, "echo"),
        ({"prompt": "w1", "stop": [""]}, "stop"),
        ({"prompt": "w1", "logprobs": 1}, "logprobs"),
    ],
)
def test_bad_fields_are_named_as_openai_does(address, body, param):
    status, text = post(address, **body)
    assert status == 400
    error = json.loads(text)["error"]
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert error["message"]


def test_unknown_models_and_paths_are_not_found(address):
    assert post(address, prompt="w1", model="gpt")[0] == 404
    with pytest.raises(urllib.error.HTTPError) as error:
        urllib.request.urlopen(f"{address}/v1/nothing", timeout=STARTING)
    with error.value:
        assert "error" in json.load(error.value)


def test_requests_at_once_do_not_mix(address):
    prompts = [f"w{index}" for index in range(12)]
    alone = [complete(address, prompt=p, temperature=0)["choices"][0]["text"] for p in prompts]
    with ThreadPoolExecutor(6) as pool:
        answers = pool.map(lambda p: complete(address, prompt=p, temperature=0), prompts)
        assert [answer["choices"][0]["text"] for answer in answers] == alone
    assert len(set(alone)) > 1


def test_a_damaged_file_is_said_before_the_server_starts(tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"x")
    command = [sys.executable, str(ROOT / "examples" / "serve_onnx.py"), str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "model.onnx" in done.stderr


@pytest.fixture(scope="module")
def example():
    """The script as a module."""
    path = ROOT / "examples" / "serve_onnx.py"
    spec = importlib.util.spec_from_file_location("serve_onnx", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its annotations are looked up there
    spec.loader.exec_module(module)
    return module


def test_work_stops_when_the_client_goes_away(example):
    stopped = threading.Event()

    def endless():
        try:
            while True:
                time.sleep(0.001)
                yield 1
        finally:
            stopped.set()

    async def listen_once():
        async with aclosing(example.Worker(1).run(endless)) as items:
            assert await anext(items) == 1

    asyncio.run(listen_once())
    assert stopped.wait(STARTING)


def test_too_many_requests_are_turned_away(example):
    worker, blocked, release = example.Worker(1), threading.Event(), threading.Event()

    def hold():
        blocked.set()
        release.wait(STARTING)
        yield 1

    async def three():
        first = asyncio.ensure_future(anext(worker.run(hold)))
        await asyncio.to_thread(blocked.wait, STARTING)
        second = asyncio.ensure_future(anext(worker.run(hold)))
        await asyncio.sleep(0)
        with pytest.raises(example.Busy):
            await anext(worker.run(hold))
        release.set()
        return await first, await second

    assert asyncio.run(three()) == (1, 1)


def test_an_error_on_the_way_reaches_the_client(example):
    def broken():
        yield 1
        raise ValueError("broken")

    async def listen():
        return [item async for item in example.Worker(1).run(broken)]

    with pytest.raises(ValueError, match="broken"):
        asyncio.run(listen())
