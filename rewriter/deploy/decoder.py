"""An exported language model, ready to generate."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from rewriter.deploy.generation import Generated, Piece, Row
from rewriter.deploy.layout import read_layout
from rewriter.deploy.options import Options
from rewriter.deploy.session import OnnxSession
from rewriter.deploy.text import read_tokenizer
from rewriter.errors import ArtifactError, ConfigError, InputError
from rewriter.export.directory import MANIFEST, check_files
from rewriter.export.onnx_file import MODEL, OnnxFile, open_onnx

__all__ = ["OnnxDecoder"]

logger = logging.getLogger(__name__)
Prompt = str | Sequence[int]
FATAL = 4
"""Severity of the runtime's log: what fails is raised."""
DEVICES = {"CPUExecutionProvider": "cpu", "CUDAExecutionProvider": "cuda"}
PLAIN = {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "num_beams": 1, "min_length": 0}
PLAIN |= {"forced_bos_token_id": None, "forced_eos_token_id": None, "suppress_tokens": None}
"""Settings of Hugging Face's loop that this one does not have, with the values that mean nothing."""


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

    def generate(self, prompt: Prompt, **options: Any) -> Generated:
        """Continue one prompt, a text or token ids.

        Args:
            options: fields of `Options`: max_new_tokens, temperature, top_k, top_p, seed, stop,
                ignore_eos.

        Raises:
            InputError: no tokens or unknown ones, or more than the model has positions.
            ConfigError: an option with a value that is not allowed.
        """
        return self.generate_batch([prompt], **options)[0]

    def generate_batch(self, prompts: Sequence[Prompt], **options: Any) -> list[Generated]:
        """Continue several prompts at once, of any lengths; otherwise like `generate`."""
        chosen = Options(**options)
        rows = self._rows(prompts, chosen)
        for _ in self._steps(rows, chosen):
            pass
        return [row.result() for row in rows]

    def stream(self, prompt: Prompt, **options: Any) -> Iterator[Piece]:
        """Like `generate`, token by token."""
        for (piece,) in self.stream_batch([prompt], **options):
            yield piece

    def stream_batch(self, prompts: Sequence[Prompt], **options: Any) -> Iterator[list[Piece]]:
        """Like `generate_batch`: a piece of every prompt at each step, empty once it is done."""
        chosen = Options(**options)
        rows = self._rows(prompts, chosen)
        for _ in self._steps(rows, chosen):
            yield [row.taken() for row in rows]

    def _rows(self, prompts: Sequence[Prompt], options: Options) -> list[Row]:
        if not prompts:
            raise InputError("prompts is empty; allowed: 1 or more")
        if options.stop and self.tokenizer is None:
            raise InputError(f"stop={options.stop!r} needs a tokenizer.json beside the file")
        ids = [self.encode(p) if isinstance(p, str) else [int(i) for i in p] for p in prompts]
        for prompt, found in zip(prompts, ids, strict=True):
            if not found:
                raise InputError(f"prompt={prompt!r} has no tokens; allowed: 1 or more")
        return [Row(found, self.tokenizer, options.stop) for found in ids]

    def _steps(self, rows: list[Row], options: Options) -> Iterator[None]:
        """One new token of each row that is not done, until all are."""
        ids, mask = _right_padded([row.prompt_ids for row in rows])
        longest, limit = ids.shape[1], options.max_new_tokens
        self._check_length(longest, limit)
        session = self.session(len(rows), capacity=longest + limit)
        ends = frozenset() if options.ignore_eos else self.eos_ids
        random = options.generator()
        logits = _last(session.run(ids, mask), mask)
        for step in range(1, limit + 1):
            tokens = options.choose(logits, random)
            for row, token in zip(rows, tokens.tolist(), strict=True):
                row.push(token, end=token in ends, last=step == limit)
            yield
            if all(row.finish_reason for row in rows):
                return
            logits = session.run(tokens[:, None])[:, -1]

    def _check_length(self, longest: int, new: int) -> None:
        limit = self.layout.max_positions
        if limit is not None and longest + new - 1 > limit:
            raise InputError(
                f"a prompt of {longest} tokens and max_new_tokens={new} are longer than the model's"
                f" {limit} positions"
            )


def _right_padded(prompts: Sequence[Sequence[int]]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Token ids and mask, int64 [prompts, longest]."""
    longest = max(map(len, prompts))
    ids = np.array([[*prompt, *[0] * (longest - len(prompt))] for prompt in prompts], np.int64)
    mask = np.arange(longest) < np.array([[len(prompt)] for prompt in prompts])
    return ids, mask.astype(np.int64)


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
    options.add_session_config_entry("session.load_model_format", "ONNX")  # what was checked
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
