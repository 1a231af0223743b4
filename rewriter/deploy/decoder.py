"""An exported language model, ready to generate."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from rewriter.deploy.layout import read_layout
from rewriter.deploy.sampling import Sampling
from rewriter.deploy.session import OnnxSession
from rewriter.deploy.text import StopText, TextStream, read_tokenizer
from rewriter.errors import ArtifactError, ConfigError, InputError
from rewriter.export.directory import MANIFEST, check_files
from rewriter.export.onnx_file import MODEL, OnnxFile, open_onnx

__all__ = ["Generated", "OnnxDecoder", "Piece"]

logger = logging.getLogger(__name__)
Prompt = str | Sequence[int]
FATAL = 4
"""Severity of the runtime's log: what fails is raised."""
DEVICES = {"CPUExecutionProvider": "cpu", "CUDAExecutionProvider": "cuda"}
PLAIN = {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "num_beams": 1, "min_length": 0}
PLAIN |= {"forced_bos_token_id": None, "forced_eos_token_id": None, "suppress_tokens": None}
"""Settings of Hugging Face's loop that this one does not have, with the values that mean nothing."""


@dataclass(frozen=True)
class Piece:
    """One step of a generation.

    Attributes:
        ids: the new tokens. text: what they add; "" inside of a character, or without a tokenizer.
        finish_reason: at the end "stop" (end of sequence, or a stop word) or "length".
    """

    ids: tuple[int, ...]
    text: str
    finish_reason: str | None = None


@dataclass(frozen=True)
class Generated:
    """What a prompt led to: new tokens without the prompt's, their text, and why it ended."""

    prompt_ids: tuple[int, ...]
    ids: tuple[int, ...]
    text: str
    finish_reason: str


class OnnxDecoder:
    """A language model that `export` wrote, loaded into ONNX Runtime once it was checked.

    Args:
        path: the `.onnx` file, or the directory with it; text needs its `tokenizer.json`.
        providers: "CPUExecutionProvider" or "CUDAExecutionProvider"; the first has to work.
        threads: of one operator; None = as many as there are cores.
        check_data: whether to hash the weights; everything else is always checked.
        on_stage: called with the stage at work and, where it is known, the share that is done.

    Raises:
        ArtifactError: the file is damaged or no decoder. ConfigError: a provider that is not there.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        providers: Sequence[str] = ("CPUExecutionProvider",),
        threads: int | None = None,
        check_data: bool = True,
        on_stage: Callable[..., None] | None = None,
    ) -> None:
        _check_providers(providers)
        if threads is not None and threads < 1:
            raise ConfigError("threads", threads, "1 or more, or None")
        path = Path(path)
        self.file = open_onnx(path, check_data=check_data, on_stage=on_stage)
        if path.is_dir() and (path / MANIFEST).is_file():
            _check_directory(path, self.file)
        if on_stage is not None:
            on_stage("load")
        self._runtime = _load(self.file.model_path, providers, threads)
        self._device = DEVICES[providers[0]]
        self.metadata = self.file.metadata
        self.layout = read_layout(self.metadata, self._runtime)
        self.tokenizer = read_tokenizer(self.file.model_path.parent)
        self.name = str(self.metadata.get("name", ""))
        self.eos_ids = _eos_ids(self.metadata)
        _warn_of_settings(self.metadata.get("generation_config") or {})

    def session(
        self,
        batch_size: int = 1,
        *,
        capacity: int | None = None,
        prefill_chunk: int | None = None,
    ) -> OnnxSession:
        """Fresh decoding state for a batch."""
        return OnnxSession(
            self._runtime,
            self.layout,
            batch_size,
            capacity=capacity,
            prefill_chunk=prefill_chunk,
            device=self._device,
        )

    def run(
        self, input_ids: NDArray[Any], attention_mask: NDArray[Any] | None = None
    ) -> NDArray[Any]:
        """Logits of a batch without a past; arguments, result and errors as of `OnnxSession.run`."""
        ids = np.asarray(input_ids)
        if ids.ndim != 2 or 0 in ids.shape:
            raise InputError(
                f"input_ids has shape {list(ids.shape)}; allowed: [1 or more, 1 or more]"
            )
        return self.session(len(ids), capacity=ids.shape[1]).run(ids, attention_mask)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, with the special tokens that a prompt has.

        Raises:
            InputError: the directory has no tokenizer.
        """
        if self.tokenizer is None:
            raise InputError("there is no tokenizer.json beside the file; give token ids")
        return self.tokenizer.encode(text).ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of tokens, without special ones; "" where there is no tokenizer."""
        return "" if self.tokenizer is None else self.tokenizer.decode(list(ids))

    def generate(self, prompt: Prompt, max_new_tokens: int = 64, **options: Any) -> Generated:
        """Continue one prompt; options as of `stream`."""
        return self.generate_batch([prompt], max_new_tokens, **options)[0]

    def stream(
        self,
        prompt: Prompt,
        max_new_tokens: int = 64,
        *,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
        ignore_eos: bool = False,
    ) -> Iterator[Piece]:
        """Continue one prompt, token by token.

        Args:
            prompt: a text, or token ids.
            sampling: how tokens are chosen; None = always the most likely one.
            stop: words that end the text; they are not part of it.
            ignore_eos: go on after the end of a sequence.

        Raises:
            InputError: an empty or unknown prompt, or more tokens than the model has positions.
        """
        rows = self._rows([prompt], stop)
        for _ in self._steps(rows, max_new_tokens, sampling or Sampling(), ignore_eos):
            yield rows[0].taken()

    def generate_batch(
        self,
        prompts: Sequence[Prompt],
        max_new_tokens: int = 64,
        *,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
        ignore_eos: bool = False,
    ) -> list[Generated]:
        """Continue several prompts at once, of any lengths; arguments and errors as of `stream`."""
        rows = self._rows(prompts, stop)
        for _ in self._steps(rows, max_new_tokens, sampling or Sampling(), ignore_eos):
            pass
        return [row.result() for row in rows]

    def _rows(self, prompts: Sequence[Prompt], stop: Sequence[str]) -> list[_Row]:
        if not prompts:
            raise InputError("prompts is empty; allowed: 1 or more")
        if stop and self.tokenizer is None:
            raise InputError(f"stop={list(stop)!r} needs a tokenizer.json beside the file")
        return [_Row(self, self._prompt_ids(prompt), stop) for prompt in prompts]

    def _prompt_ids(self, prompt: Prompt) -> list[int]:
        ids = self.encode(prompt) if isinstance(prompt, str) else [int(token) for token in prompt]
        if not ids:
            raise InputError(f"prompt={prompt!r} has no tokens; allowed: 1 or more")
        return ids

    def _steps(
        self, rows: list[_Row], max_new_tokens: int, sampling: Sampling, ignore_eos: bool
    ) -> Iterator[None]:
        """One new token of each row that is not done, until all are."""
        longest = max(len(row.prompt_ids) for row in rows)
        self._check_length(longest, max_new_tokens)
        session = self.session(len(rows), capacity=longest + max_new_tokens)
        ends = frozenset() if ignore_eos else self.eos_ids
        random = sampling.generator()
        ids = np.zeros((len(rows), longest), np.int64)
        mask = np.zeros_like(ids)
        for row, known, shown in zip(rows, ids, mask, strict=True):
            known[: len(row.prompt_ids)], shown[: len(row.prompt_ids)] = row.prompt_ids, 1
        logits = _last(session.run(ids, mask), mask)
        for step in range(max_new_tokens):
            tokens = sampling.choose(logits, random)
            for row, token in zip(rows, tokens, strict=True):
                row.push(int(token), int(token) in ends, step + 1 == max_new_tokens)
            yield
            if all(row.finish_reason for row in rows):
                return
            logits = session.run(tokens[:, None])[:, -1]

    def _check_length(self, longest: int, max_new_tokens: int) -> None:
        if max_new_tokens < 1:
            raise ConfigError("max_new_tokens", max_new_tokens, "1 or more")
        limit = self.layout.max_positions
        if limit is not None and longest + max_new_tokens - 1 > limit:
            raise InputError(
                f"a prompt of {longest} tokens and max_new_tokens={max_new_tokens} are longer than"
                f" the model's {limit} positions"
            )


class _Row:
    """One prompt of a batch, and what came of it."""

    def __init__(self, decoder: OnnxDecoder, prompt_ids: list[int], stop: Sequence[str]) -> None:
        self.prompt_ids, self.ids, self.text = prompt_ids, [], ""
        self.finish_reason: str | None = None
        self._stream = None if decoder.tokenizer is None else TextStream(decoder.tokenizer)
        self._stop = StopText(stop)
        self._taken_ids = self._taken_text = 0

    def push(self, token: int, end: bool, last: bool) -> None:
        """One more token; ignored once the row is done."""
        if self.finish_reason:
            return
        self.ids.append(token)
        text = "" if self._stream is None else self._stream.push(token)
        if self._stream is not None and (end or last):
            text += self._stream.end()
        self.text += self._stop.push(text)
        if end or self._stop.found:
            self.finish_reason = "stop"
        elif last:
            self.finish_reason = "length"
        if self.finish_reason:
            self.text += self._stop.end()

    def taken(self) -> Piece:
        """What is new since the last call."""
        ids, text = tuple(self.ids[self._taken_ids :]), self.text[self._taken_text :]
        self._taken_ids, self._taken_text = len(self.ids), len(self.text)
        return Piece(ids, text, self.finish_reason)

    def result(self) -> Generated:
        """All of it."""
        reason = self.finish_reason or "length"
        return Generated(tuple(self.prompt_ids), tuple(self.ids), self.text, reason)


def _last(logits: NDArray[Any], mask: NDArray[Any]) -> NDArray[Any]:
    """Those of the last token of each row, whether the file gives them alone or all."""
    if logits.shape[1] == 1:
        return logits[:, 0]
    return logits[np.arange(len(mask)), mask.sum(axis=1) - 1]


def _check_providers(providers: Sequence[str]) -> None:
    there = [name for name in DEVICES if name in onnxruntime.get_available_providers()]
    wrong = [name for name in providers if name not in there]
    if wrong or not providers:
        raise ConfigError("providers", list(providers), f"of {', '.join(there)}")


def _check_directory(directory: Path, file: OnnxFile) -> None:
    """Every file as it was saved; the weights were checked, or were not to be."""
    known = frozenset({file.data_path.name} if file.data_path else ())
    check_files(directory, (MODEL,), known=known)


def _load(
    path: Path, providers: Sequence[str], threads: int | None
) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = FATAL
    if threads is not None:
        options.intra_op_num_threads = threads
    try:
        runtime = onnxruntime.InferenceSession(str(path), options, providers=list(providers))
    except Exception as error:  # the runtime's errors share no base
        first = (str(error).splitlines() or [""])[0]
        raise ArtifactError(f"{path} cannot be loaded by ONNX Runtime: {first}") from error
    if runtime.get_providers()[0] != providers[0]:
        raise ConfigError(
            "providers", list(providers), f"{runtime.get_providers()} on this machine"
        )
    return runtime


def _eos_ids(metadata: dict[str, Any]) -> frozenset[int]:
    """Tokens that end a sequence, from the generation config, else from the config."""
    for name in ("generation_config", "config"):
        found = (metadata.get(name) or {}).get("eos_token_id")
        if found is not None:
            return frozenset(found if isinstance(found, list) else [found])
    return frozenset()


def _warn_of_settings(config: dict[str, Any]) -> None:
    for name, nothing in PLAIN.items():
        if config.get(name, nothing) not in (nothing, None):
            logger.warning("generation_config asks for %s=%r: not applied", name, config[name])
