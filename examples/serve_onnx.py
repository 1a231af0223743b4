"""An OpenAI-style server over an exported model, without PyTorch.

    pip install -e '.[onnx,serve]'
    rewriter export MODEL -o out/deployed
    python examples/serve_onnx.py out/deployed --port 8000
    curl localhost:8000/v1/completions -H 'Content-Type: application/json' -d '{"prompt": "once"}'

`/v1/models` and `/v1/completions`, whole or streamed. Requests wait in a queue and run one at a time;
the prompts of one request run as a batch.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import queue
import threading
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any, Literal

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field, StrictInt
from starlette.exceptions import HTTPException

from rewriter.deploy import OnnxDecoder, Piece
from rewriter.errors import RewriterError

Ids = list[StrictInt]


class Completion(BaseModel):
    """The body of a request; a field that is not here, or another value, is refused."""

    model_config = ConfigDict(extra="forbid")

    prompt: str | list[str] | Ids | list[Ids]
    model: str | None = None
    max_tokens: int = Field(16, ge=1)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    stop: str | list[str] | None = None
    seed: int | None = Field(None, ge=0)
    stream: bool = False
    stream_options: dict[str, bool] = {}
    user: str | None = None
    n: Literal[1] = 1
    best_of: Literal[1] = 1
    echo: Literal[False] = False
    frequency_penalty: Literal[0] = 0
    presence_penalty: Literal[0] = 0

    @property
    def prompts(self) -> list[str] | list[Ids]:
        """One or several, as a list."""
        one = isinstance(self.prompt, str) or all(isinstance(part, int) for part in self.prompt)
        return [self.prompt] if one else self.prompt  # type: ignore[return-value]

    @property
    def options(self) -> dict[str, Any]:
        """As the decoder takes them."""
        options: dict[str, Any] = {"max_new_tokens": self.max_tokens, "seed": self.seed}
        if self.temperature > 0:
            options |= {"temperature": self.temperature, "top_p": self.top_p}
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return options | {"stop": tuple(stop)}


class Busy(Exception):
    """Too many requests wait."""


class Worker:
    """One thread that runs requests in turn, because each uses every core."""

    def __init__(self, waiting: int) -> None:
        self._jobs: queue.Queue[Callable[[], None]] = queue.Queue(waiting)
        threading.Thread(target=self._work, daemon=True).start()

    def _work(self) -> None:
        while True:
            self._jobs.get()()

    async def run(self, make: Callable[[], Iterator[Any]]) -> AsyncGenerator[Any]:
        """What an iterator gives, computed on the thread; it stops when nobody listens any more."""
        loop, results = asyncio.get_running_loop(), asyncio.Queue()
        gone = threading.Event()

        def job() -> None:
            last: BaseException | None = None
            try:
                for item in () if gone.is_set() else make():
                    if gone.is_set():
                        break
                    loop.call_soon_threadsafe(results.put_nowait, (item, None))
            except Exception as error:
                last = error
            if not loop.is_closed():
                loop.call_soon_threadsafe(results.put_nowait, (None, last or StopAsyncIteration()))

        try:
            self._jobs.put_nowait(job)
        except queue.Full:
            raise Busy from None
        try:
            while True:
                item, end = await results.get()
                if isinstance(end, StopAsyncIteration):
                    return
                if end is not None:
                    raise end
                yield item
        finally:
            gone.set()


def serve(decoder: OnnxDecoder, name: str, *, waiting: int = 64) -> FastAPI:
    """The application."""
    app, worker, started = FastAPI(title="rewriter"), Worker(waiting), int(time.time())

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        card = {"id": name, "object": "model", "created": started, "owned_by": "rewriter"}
        return {"object": "list", "data": [card]}

    @app.post("/v1/completions")
    async def completions(body: Completion) -> Any:
        if body.model not in (None, name):
            return _error(404, f"model={body.model!r}; allowed: {name}", "model", "model_not_found")
        prompts = [decoder.encode(p) if isinstance(p, str) else p for p in body.prompts]
        answer = {"id": f"cmpl-{uuid.uuid4().hex}", "object": "text_completion"}
        answer |= {"created": int(time.time()), "model": name}
        if not body.stream:
            return await _whole(worker, decoder, prompts, body, answer)
        pieces = worker.run(lambda: decoder.stream_batch(prompts, **body.options))
        first = await anext(pieces)  # what is wrong with a request shows before the answer starts
        events = _events(first, pieces, prompts, body, answer)
        return StreamingResponse(events, media_type="text/event-stream")

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        field = next((str(part) for part in first["loc"] if part != "body"), None)
        return _error(400, f"{field or 'body'}: {first['msg']}", field)

    @app.exception_handler(RewriterError)
    async def refused(_: Request, error: RewriterError) -> JSONResponse:
        return _error(400, str(error), getattr(error, "field", None))

    @app.exception_handler(Busy)
    async def busy(_: Request, __: Busy) -> JSONResponse:
        return _error(429, f"{waiting} requests wait already", None, "queue_full")

    @app.exception_handler(HTTPException)
    async def other(_: Request, error: HTTPException) -> JSONResponse:
        return _error(error.status_code, str(error.detail))

    return app


async def _whole(
    worker: Worker,
    decoder: OnnxDecoder,
    prompts: list[Ids],
    body: Completion,
    answer: dict[str, Any],
) -> dict[str, Any]:
    async with aclosing(
        worker.run(lambda: iter([decoder.generate_batch(prompts, **body.options)]))
    ) as results:
        rows = await anext(results)
    choices = [_choice(i, row.text, row.finish_reason) for i, row in enumerate(rows)]
    return answer | {"choices": choices, "usage": _usage(prompts, [row.ids for row in rows])}


async def _events(
    first: list[Piece],
    pieces: AsyncGenerator[list[Piece]],
    prompts: list[Ids],
    body: Completion,
    answer: dict[str, Any],
) -> AsyncIterator[str]:
    """Server-sent events: a choice for each new piece of text, at last the usage if it was asked for."""
    ids: list[list[int]] = [[] for _ in prompts]
    rows: list[Piece] | None = first
    async with aclosing(pieces):  # also when the client goes away
        while rows is not None:
            for index, piece in enumerate(rows):
                ids[index] += piece.ids
                if piece.text or (piece.ids and piece.finish_reason):
                    choice = _choice(index, piece.text, piece.finish_reason)
                    yield _event(answer | {"choices": [choice]})
            rows = await anext(pieces, None)
    if body.stream_options.get("include_usage"):
        yield _event(answer | {"choices": [], "usage": _usage(prompts, ids)})
    yield "data: [DONE]\n\n"


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value)}\n\n"


def _choice(index: int, text: str, reason: str | None) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": None, "finish_reason": reason}


def _usage(prompts: Sequence[Sequence[int]], new: Sequence[Sequence[int]]) -> dict[str, int]:
    read, written = sum(map(len, prompts)), sum(map(len, new))
    counts = {"prompt_tokens": read, "completion_tokens": written}
    return counts | {"total_tokens": read + written}


def _error(
    status: int, message: str, param: str | None = None, code: str | None = None
) -> JSONResponse:
    kind = "invalid_request_error" if status < 500 else "server_error"
    error = {"message": message, "type": kind, "param": param, "code": code}
    return JSONResponse({"error": error}, status_code=status)


def main() -> None:
    """Load, then serve until interrupted."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="a directory or .onnx file that was exported")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--name", help="of the model; default: the file's or directory's")
    parser.add_argument("--threads", type=int, help="of one operator; default: all cores")
    parser.add_argument("--cuda", action="store_true", help="run on a GPU")
    args = parser.parse_args()
    provider = "CUDAExecutionProvider" if args.cuda else "CPUExecutionProvider"
    try:
        decoder = OnnxDecoder(args.model, providers=(provider,), threads=args.threads)
    except RewriterError as error:
        parser.exit(2, f"error: {error}\n")
    name = args.name or args.model.resolve().stem
    uvicorn.run(serve(decoder, name), host=args.host, port=args.port, log_level="warning")


if __name__ == "__main__":
    main()
