"""`rewriter generate` with an exported file: ONNX Runtime alone, which starts without PyTorch."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from rewriter.cli.console import err, write_json
from rewriter.deploy import OnnxDecoder

__all__ = ["generate_with_onnx"]


def generate_with_onnx(
    path: Path,
    prompt: str | None,
    prompt_ids: list[int] | None,
    max_new_tokens: int,
    as_json: bool,
    **sampling: Any,
) -> None:
    """Continue a text or ids, streaming text (or ids, without a tokenizer) or printing JSON.

    Args:
        sampling: as `rewriter.deploy.Options` has it.
    """
    decoder = OnnxDecoder(path)
    given = decoder.encode(prompt) if prompt is not None else prompt_ids or []
    start = time.perf_counter()
    new: list[int] = []
    text = ""
    for piece in decoder.stream(given, max_new_tokens=max_new_tokens, **sampling):
        new += piece.ids
        text += piece.text
        if not as_json:
            plain = "".join(f"{token} " for token in piece.ids)
            sys.stdout.write(plain if decoder.tokenizer is None else piece.text)
            sys.stdout.flush()
    seconds = time.perf_counter() - start
    if as_json:
        result = {"prompt_ids": given, "ids": [*given, *new], "new_ids": new}
        shown = None if decoder.tokenizer is None else text
        write_json(result | {"text": shown, "seconds": seconds, "tokens_per_s": len(new) / seconds})
        return
    sys.stdout.write("\n")
    err.print(f"{len(new)} tokens, {len(new) / seconds:.0f} tokens/s", style="dim")
