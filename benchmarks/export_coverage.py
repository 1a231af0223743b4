"""Which decoder families become ONNX files, in which flavour, and how many attentions each file has.

    python benchmarks/export_coverage.py
    python benchmarks/export_coverage.py --families llama,gpt_oss --flavours portable,cpu

Every model is tiny and random (`families.py`). A file counts as written only after ONNX Runtime computed
the program's logits from it, for prompts of several lengths, padding and decode steps (`export_onnx`).
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import families
import torch
from rich.console import Console

from rewriter import RewriterError, optimize
from rewriter.export.onnx_export import export_onnx
from rewriter.optimized import OptimizedModel
from rewriter.program import StateSpec

RESULT = Path(__file__).parent / "results" / "export-coverage.json"
GROUPED = "com.microsoft::GroupQueryAttention"


@dataclass(frozen=True)
class Flavour:
    """Passes and execution provider."""

    passes: str
    ep: str


FLAVOURS = {
    "portable": Flavour("default", "portable"),
    "cpu": Flavour("default", "cpu"),
    "streaming": Flavour("streaming-llm{num_sink_tokens=2,recent_window=6}", "portable"),
    "random": Flavour("random-entries{num_random=5,recent_window=6}", "portable"),
}


def main() -> int:
    """Export, print and store. Returns 1 where a file was wrong."""
    arguments = _arguments()
    warnings.simplefilter("ignore")
    console = Console(stderr=True)
    stored = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    for family in families.DECODERS:
        if arguments.families and family.model_type not in arguments.families:
            continue
        row = stored.setdefault(family.model_type, {})
        for name in arguments.flavours:
            row[name] = _outcome(family, FLAVOURS[name])
            console.print(f"{family.model_type:18} {name:10} {row[name]}", highlight=False)
            RESULT.write_text(json.dumps(stored, indent=1, sort_keys=True) + "\n")
    outcomes = [outcome for row in stored.values() for outcome in row.values()]
    return int(any(outcome["status"] == "wrong" for outcome in outcomes))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--families", type=_names, default=[], metavar="NAME,...")
    parser.add_argument("--flavours", type=_names, default=list(FLAVOURS), metavar="NAME,...")
    return parser.parse_args()


def _names(text: str) -> list[str]:
    return text.split(",")


def _outcome(family: families.Family, flavour: Flavour) -> dict[str, Any]:
    torch.manual_seed(0)
    model = families.build(family, "eager")
    try:
        optimized = optimize(model, passes=flavour.passes, verify=False, backend="eager")
        if optimized.program.decoding is None:
            return {"status": "no decoding", "reason": optimized.report.decoding}
        if flavour.passes != "default" and not any(s.bounded for s in _states(optimized)):
            reason = optimized.report.misses[0].reason if optimized.report.misses else "no site"
            return {"status": "no match", "reason": reason}
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as directory:
            summary = export_onnx(optimized, Path(directory) / "model.onnx", ep=flavour.ep)
    except RewriterError as error:
        wrong = type(error).__name__ == "VerificationError"
        return {"status": "wrong" if wrong else "refused", "reason": str(error)[:300]}
    return {
        "status": "equal",
        "layers": len({s.layer for s in _states(optimized) if s.layer is not None}),
        "attention": summary.operators.get("Attention", 0),
        "group_query_attention": summary.operators.get(GROUPED, 0),
        "error": float(f"{summary.agreement['error']:.2g}"),
        "decomposed": sorted(summary.decomposed),
        "seconds": round(time.perf_counter() - start, 1),
    }


def _states(optimized: OptimizedModel) -> tuple[StateSpec, ...]:
    decoding = optimized.program.decoding
    return () if decoding is None else decoding.states


if __name__ == "__main__":
    sys.exit(main())
