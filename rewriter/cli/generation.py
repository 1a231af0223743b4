"""`rewriter generate`: prompt in, tokens out as they come."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rewriter.cli.console import err, write_json
from rewriter.errors import ConfigError, InputError, ModelError
from rewriter.optimized import OptimizedModel

__all__ = ["Sampling", "generate_text"]


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; at temperature 0 always the most likely one.

    Raises:
        ConfigError: top_k or top_p without a temperature, or out of range.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("top_k", "top_p"):
            value = getattr(self, name)
            if value is not None and self.temperature == 0:
                raise ConfigError(name, value, "only with a --temperature above 0")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ConfigError("top_p", self.top_p, "above 0, at most 1")

    @property
    def arguments(self) -> dict[str, Any]:
        """As Hugging Face's `generate` takes them."""
        if self.temperature == 0:
            return {"do_sample": False}
        limits = {"top_k": self.top_k, "top_p": self.top_p}
        chosen = {name: value for name, value in limits.items() if value is not None}
        return {"do_sample": True, "temperature": self.temperature} | chosen


def generate_text(
    optimized: OptimizedModel,
    prompt: str | None,
    prompt_ids: list[int] | None,
    max_new_tokens: int,
    sampling: Sampling,
    as_json: bool,
) -> None:
    """Generate from a text or ids, streaming text to stdout or printing one JSON document."""
    tokenizer = _tokenizer(optimized.source_directory)
    ids = _prompt(tokenizer, prompt, prompt_ids)
    _check_vocabulary(ids, optimized.config or {})
    streamer = None if as_json else _Streamer(tokenizer)
    torch.manual_seed(sampling.seed)
    start = time.perf_counter()
    output = optimized.generate(
        ids, max_new_tokens=max_new_tokens, streamer=streamer, **sampling.arguments
    )
    seconds = time.perf_counter() - start
    new = output[0, ids.shape[1] :].tolist()
    if as_json:
        text = None if tokenizer is None else tokenizer.decode(new, skip_special_tokens=True)
        result = {"prompt_ids": ids[0].tolist(), "ids": output[0].tolist(), "new_ids": new}
        write_json(result | {"text": text, "seconds": seconds, "tokens_per_s": len(new) / seconds})
        return
    err.print(f"{len(new)} tokens, {len(new) / seconds:.0f} tokens/s", style="dim")


def _check_vocabulary(ids: Tensor, config: dict[str, Any]) -> None:
    vocab_size = config.get("vocab_size")
    if isinstance(vocab_size, int) and int(ids.max()) >= vocab_size:
        raise InputError(f"token id {int(ids.max())} is not allowed: 0 to {vocab_size - 1}")


def _tokenizer(directory: Path | None) -> Any:
    """The tokenizer beside the model; None when there is none. Raises ModelError if damaged."""
    if directory is None or not (directory / "tokenizer_config.json").is_file():
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(
            str(directory), local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # whatever the library and the file formats raise
        first = (str(error).splitlines() or [""])[0]
        raise ModelError(f"cannot read the tokenizer in {directory}: {first}") from error


def _prompt(tokenizer: Any, prompt: str | None, prompt_ids: list[int] | None) -> Tensor:
    if prompt_ids is not None:
        return torch.tensor([prompt_ids])
    if tokenizer is None:
        raise InputError("the model's directory has no tokenizer; give --prompt-ids")
    ids = tokenizer(prompt)["input_ids"]
    if not ids:
        raise ConfigError("prompt", prompt, "at least one token")
    return torch.tensor([ids])


class _Streamer:
    """Prints new tokens as text, or as ids where there is no tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._shown = self._context = 0  # tokens printed, and where decoding starts anew
        self._prompt = True

    def put(self, value: Tensor) -> None:
        """Called by the generation loop: first with the prompt, then with each token."""
        if self._prompt:
            self._prompt = False
            return
        self._ids += value.flatten().tolist()
        self._show(whole=False)

    def end(self) -> None:
        """Called when it is over."""
        self._show(whole=True)
        sys.stdout.write("\n")
        sys.stdout.flush()

    def _show(self, *, whole: bool) -> None:
        """Print what is new, decoded behind the tokens before it: spaces depend on them."""
        known = self._text(self._context, self._shown)
        text = self._text(self._context, len(self._ids))
        if text.endswith("\ufffd") and not whole:  # half a character
            return
        sys.stdout.write(text[len(known) :])
        sys.stdout.flush()
        self._context, self._shown = self._shown, len(self._ids)

    def _text(self, start: int, end: int) -> str:
        part = self._ids[start:end]
        if self._tokenizer is None:
            return "".join(f"{i} " for i in part)
        return self._tokenizer.decode(part, skip_special_tokens=True)
