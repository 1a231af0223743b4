"""The main job on a real model: optimise it, check it, let it answer, and let it run without end.

Runs on the trained model beside this file; nothing is downloaded.
"""

from __future__ import annotations

import os
import time
import warnings
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
warnings.filterwarnings("ignore")

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging

from rewriter import OptimizedModel, optimize

logging.set_verbosity_error()
logging.disable_progress_bar()

HERE = Path(__file__).parent
MODEL = HERE / "models" / "trial_reasoner"
REPORT = HERE.parent / "out" / "demo.html"
PROBLEMS = (
    "tom has 1 4 apples . gets 2 5 more . loses 7 . how many ?",
    "{ w3 w77 w19 w4 w20 w51 w8 w9 } ? w19",
)
ENDLESS = 3000
STREAMING = "streaming-llm{num_sink_tokens=4,recent_window=252}"

console = Console()


def main() -> None:
    """Four acts, about a minute on two cores."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL, local_files_only=True)
    original = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    console.rule("1. optimise with exact passes, and check every rewrite")
    with console.status("capture, raise, derive, rewrite, verify"):
        exact = optimize(original)
    console.print(str(exact.report), markup=False, highlight=False)
    REPORT.parent.mkdir(exist_ok=True)
    exact.report.to_html(REPORT)
    console.print(f"\nstep through it in a browser: {REPORT}", markup=False)
    console.rule("2. the same answers")
    answer(tokenizer, original, exact)
    console.rule("3. an approximate pass: bounded memory")
    with console.status(STREAMING):
        endless = optimize(original, passes=[STREAMING, "default"])
    console.print(f"{STREAMING}: {endless.report.end_to_end}", markup=False)
    console.rule(f"4. {ENDLESS} tokens, past the model's 2,048 positions, in constant memory")
    run_on(endless)


def answer(tokenizer: object, original: PreTrainedModel, exact: OptimizedModel) -> None:
    """Both models on the problems, with their speed."""
    table = Table("problem", "answer", "equal", "original tokens/s", "optimised tokens/s")
    for problem in PROBLEMS:
        ids = tokenizer(problem, return_tensors="pt")["input_ids"]
        (expected, slow), (found, fast) = (
            timed(model, ids) for model in (original, exact)
        )
        text = tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True)
        equal = "yes" if torch.equal(expected, found) else "NO"
        table.add_row(problem, text, equal, f"{slow:.0f}", f"{fast:.0f}")
    console.print(table)


def timed(model: PreTrainedModel | OptimizedModel, ids: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Greedy output and tokens per second, the better of three runs."""
    best, output = 0.0, ids
    for _ in range(3):
        start = time.perf_counter()
        output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=48)
        best = max(best, (output.shape[1] - ids.shape[1]) / (time.perf_counter() - start))
    return output, best


def run_on(endless: OptimizedModel) -> None:
    """Decode far past the trained length and watch the state's bytes."""
    session = endless.session(1)
    token = torch.tensor([[5]])
    start = time.perf_counter()
    for step in range(1, ENDLESS + 1):
        token = session.run(token, logits_to_keep=1)[:, -1].argmax(-1, keepdim=True)
        if step % (ENDLESS // 3) == 0:
            rate = step / (time.perf_counter() - start)
            console.print(f"{step:5d} tokens  {session.state_bytes():,} state bytes  {rate:.0f} tokens/s")


if __name__ == "__main__":
    main()
