"""`rewriter generate`: prompt in, tokens out as they come."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rewriter.cli.console import err, out, write_json
from rewriter.errors import ConfigError, InputError
from rewriter.optimized import OptimizedModel

__all__ = ["generate_text", "parse_ids"]


def generate_text(
    optimized: OptimizedModel,
    prompt: str | None,
    prompt_ids: list[int] | None,
    max_new_tokens: int,
    sampling: dict[str, Any],
    as_json: bool,
) -> None:
    """Generate from a text or ids, streaming text to stdout or printing one JSON document."""
    tokenizer = _tokenizer(optimized.source_directory)
    ids = _prompt(tokenizer, prompt, prompt_ids)
    streamer = None if as_json else _Streamer(tokenizer)
    start = time.perf_counter()
    output = optimized.generate(
        ids, max_new_tokens=max_new_tokens, streamer=streamer, **sampling
    )
    seconds = time.perf_counter() - start
    new = output[0, ids.shape[1] :].tolist()
    text = None if tokenizer is None else tokenizer.decode(new, skip_special_tokens=True)
    if as_json:
        result = {"prompt_ids": ids[0].tolist(), "ids": output[0].tolist(), "new_ids": new}
        write_json(result | {"text": text, "seconds": seconds, "tokens_per_s": len(new) / seconds})
        return
    err.print(f"{len(new)} tokens, {len(new) / seconds:.0f} tokens/s", style="dim")


def _tokenizer(directory: Path | None) -> Any:
    """The tokenizer beside the model; None when there is none."""
    if directory is None or not (directory / "tokenizer_config.json").is_file():
        return None
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(directory), local_files_only=True)


def parse_ids(text: str | None) -> list[int] | None:
    """Token ids from "1 2 3" or "1,2,3". Raises ConfigError."""
    if text is None:
        return None
    try:
        ids = [int(item) for item in text.replace(",", " ").split()]
    except ValueError:
        raise ConfigError("prompt-ids", text, "integers") from None
    if not ids:
        raise ConfigError("prompt-ids", text, "at least one integer")
    return ids


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
        self.tokenizer, self.ids, self.shown, self.prompt = tokenizer, [], "", True

    def put(self, value: Tensor) -> None:
        """Called by the generation loop: first with the prompt, then with each token."""
        if self.prompt:
            self.prompt = False
            return
        self.ids += value.flatten().tolist()
        if self.tokenizer is None:
            text = " ".join(str(i) for i in self.ids)
        else:
            text = self.tokenizer.decode(self.ids, skip_special_tokens=True)
        if not text.endswith("�"):
            sys.stdout.write(text[len(self.shown) :])
            sys.stdout.flush()
            self.shown = text

    def end(self) -> None:
        """Called when it is over."""
        out.print()
