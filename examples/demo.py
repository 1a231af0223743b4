"""A trained language model, optimised, checked, and put to work: `make demo`.

The model (`examples/models/reasoner`, 2.3M parameters) calculates in steps and looks things up. It is
optimised with the default passes, which keep its function, and with `streaming-llm`, which forgets: the
same questions show what that costs, the quality suite measures it, and a conversation longer than the
model's positions shows what it is good for.
"""

from __future__ import annotations

import logging
import os
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"

import torch
from rich.console import Console
from rich.live import Live
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

from rewriter import OptimizedModel, Report, optimize
from rewriter.cli.quality import show, write
from rewriter.quality.measure import measure_quality
from rewriter.quality.suite import Settings
from rewriter.quality.tasks import TASKS, Question, final_answer

MODEL = Path(__file__).parent / "models" / "reasoner"
OUT = Path(__file__).parents[1] / "out"
STREAMING = "streaming-llm{num_sink_tokens=4,recent_window=252}"
PAIRS = 200
"""Of the context in which something is looked up; a pair takes three tokens."""
MAX_REPLY = 128
"""Tokens."""
CONVERSATION = 5000
"""Tokens of the long conversation; the model has 4,096 positions."""
TRADE = Settings(tasks=("retrieval",), length=640, rows=1, samples=6, seeds=(0, 1))
console = Console(highlight=False)


def main() -> None:
    """The four acts."""
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    OUT.mkdir(exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(MODEL, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(MODEL, local_files_only=True, dtype=torch.float32)
    console.print(_intro(model))
    with torch.no_grad():
        optimized = _optimize("1  the default passes: the same function", model, "default")
        _compare(model, optimized, tokenizer)
        streaming = _optimize("2  streaming-llm: bounded memory", model, [STREAMING])
        _look_up(optimized, streaming, tokenizer)
        console.rule("[bold]3  what forgetting costs, and what it saves", align="left")
        _measure(model, tokenizer)
        console.rule("[bold]4  a conversation beyond the model's positions", align="left")
        _converse(optimized, streaming, tokenizer)
    _farewell()


def _intro(model: Any) -> str:
    config, size = model.config, sum(p.numel() for p in model.parameters())
    return (
        f"[bold]rewriter[/bold] on {config.architectures[0]}: {size / 1e6:.1f}M parameters, "
        f"{config.num_hidden_layers} layers, {config.num_attention_heads} query heads on "
        f"{config.num_key_value_heads} KV heads, {config.max_position_embeddings} positions, "
        f"torch {torch.__version__}"
    )


def _optimize(title: str, model: Any, passes: Any) -> OptimizedModel:
    """Optimise with a line of progress, print the report's gist, write its page."""
    console.rule(f"[bold]{title}", align="left")
    with console.status("") as status:
        optimized = optimize(
            model, passes=passes, on_stage=lambda stage: status.update(f"[dim]{stage} …")
        )
    console.print(_gist(optimized.report))
    page = OUT / f"{'default' if passes == 'default' else 'streaming'}.html"
    optimized.report.to_html(page)
    return optimized


def _gist(report: Report) -> Table:
    """What was raised, what was rewritten, and what it did to the logits."""
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    raised = (f"{c.op} {c.raised}/{c.candidates}" for c in report.coverage)
    table.add_row("[dim]raised", ", ".join(raised))
    table.add_row("[dim]decoding", report.decoding)
    for spec in dict.fromkeys(c.spec for c in report.certificates):
        own = [c for c in report.certificates if c.spec == spec]
        kept = [c for c in own if c.status == "applied"]
        worst = max((c.implementation_error or 0.0 for c in kept), default=0.0)
        text = f"{own[0].fidelity}, {len(kept)} of {len(own)} sites, error ≤ {worst:.1e} "
        table.add_row(f"[dim]{spec.partition('{')[0]}", f"{text}(allowed {own[0].tolerance:.0e})")
    metrics = report.end_to_end
    checked = f"KL to the original {metrics['kl_mean']:.1e} nats, "
    table.add_row("[dim]end to end", checked + f"same top token {metrics['top1_agreement']:.0%}")
    took = {name: report.seconds[name] for name in ("capture", "rewrite and verify")}
    table.add_row("[dim]seconds", ", ".join(f"{name} {value:.1f}" for name, value in took.items()))
    return table


def _compare(model: Any, optimized: OptimizedModel, tokenizer: Any) -> None:
    """Both answer the same problems; the tokens have to be equal."""
    table = Table("problem", "answer", "original", "optimised", "tokens")
    speeds: list[tuple[float, float]] = []
    for problem in _problems(4):
        prompt = torch.tensor([_ids(tokenizer, problem.prompt, begin=True)])
        (theirs, slow), (ours, quick) = _quickest((model, optimized), prompt)
        speeds.append((slow, quick))
        same = "[green]equal" if torch.equal(theirs, ours) else "[red]DIFFER"
        reply = tokenizer.decode(ours[0, prompt.shape[1] :], skip_special_tokens=True)
        table.add_row(problem.prompt, reply.strip(), f"{slow:.0f}/s", f"{quick:.0f}/s", same)
    console.print(table)
    slow, quick = (sum(column) / len(speeds) for column in zip(*speeds, strict=True))
    console.print(f"tokens a second: {slow:.0f} → [bold]{quick:.0f}[/bold], {quick / slow:.2f}×\n")


def _quickest(models: Sequence[Any], prompt: torch.Tensor) -> list[tuple[torch.Tensor, float]]:
    """The answers of several models, called in turns, with the best speed of three each."""
    turns = [[_answer(model, prompt) for model in models] for _ in range(3)]
    return [(runs[0][0], max(speed for _, speed in runs)) for runs in zip(*turns, strict=True)]


def _answer(model: Any, prompt: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Greedy tokens, and how many of them a second."""
    start = time.perf_counter()
    mask = torch.ones_like(prompt)
    ids = model.generate(prompt, attention_mask=mask, max_new_tokens=MAX_REPLY, do_sample=False)
    return ids, (ids.shape[1] - prompt.shape[1]) / (time.perf_counter() - start)


def _look_up(dense: OptimizedModel, streaming: OptimizedModel, tokenizer: Any) -> None:
    """Values from the beginning, the middle and the end of one context, dense and approximate."""
    sample = TASKS["retrieval"].sample(Random(1), PAIRS, PAIRS, held_out=True)
    questions = sorted(sample.questions, key=lambda q: sample.context.index(q.evidence[0]))
    context = _ids(tokenizer, sample.context, begin=True)
    console.print(f"a context of {PAIRS} pairs of words, {len(context)} tokens; 256 stay")
    table = Table("question", "pair", "right", "dense", "streaming-llm")
    sessions = [model.session(1) for model in (dense, streaming)]
    for session in sessions:
        session.run(torch.tensor([context]), logits_to_keep=1)
    for index in (5, PAIRS // 2, PAIRS - 20, PAIRS - 5):
        question, replies = questions[index], []
        for session in sessions:
            reply, _ = _ask(session.fork(), tokenizer, question.prompt)
            right = final_answer(reply) == question.final
            replies.append(f"[{'green' if right else 'red'}]{reply.strip()}")
        table.add_row(question.prompt, f"{index} of {PAIRS}", question.final, *replies)
    console.print(table)


def _measure(model: Any, tokenizer: Any) -> None:
    """The quality suite on retrieval, at a quarter, a half and all of the memory."""
    with console.status("") as status:
        report = measure_quality(
            model,
            tokenizer,
            passes=["streaming-llm"],
            densities=(0.25, 0.5, 1.0),
            settings=TRADE,
            name="reasoner",
            on_stage=lambda stage, *_: status.update(f"[dim]{stage} …"),
        )
    show(report)
    write(report, None, OUT / "quality.png")


def _converse(dense: OptimizedModel, streaming: OptimizedModel, tokenizer: Any) -> None:
    """Problem after problem in one session, its state never growing."""
    session = streaming.session(1)
    session.run(torch.tensor([[tokenizer.bos_token_id]]))
    before, tokens, solved = session.state_bytes(), 0, 0
    with Live(console=console, refresh_per_second=4) as live:
        for asked, problem in enumerate(_problems(), start=1):
            reply, fed = _ask(session, tokenizer, problem.prompt)
            tokens, solved = tokens + fed, solved + (final_answer(reply) == problem.final)
            live.update(_progress(tokens, solved, asked, problem, reply, session))
            if tokens >= CONVERSATION:
                break
    if not console.is_terminal:
        console.print()
    grown = "constant" if session.state_bytes() == before else "GREW"
    needed = _dense_bytes(dense, tokens)
    console.print(
        f"state: {before / 2**20:.2f} MiB, {grown}; a dense cache of {tokens:,} tokens takes "
        f"{needed / 2**20:.1f} MiB\n"
    )


def _ids(tokenizer: Any, text: str, *, begin: bool = False) -> list[int]:
    """Tokens of a text, after the beginning token if asked for."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return [tokenizer.bos_token_id, *ids] if begin else ids


def _ask(session: Any, tokenizer: Any, text: str) -> tuple[str, int]:
    """The reply to one problem, and how many tokens the session was fed."""
    prompt = _ids(tokenizer, text)
    logits = session.run(torch.tensor([prompt]), logits_to_keep=1)
    reply: list[int] = []
    while len(reply) < MAX_REPLY:
        token = logits[:, -1:].argmax(-1)
        logits = session.run(token, logits_to_keep=1)
        if token.item() == tokenizer.eos_token_id:
            break
        reply.append(int(token))
    return tokenizer.decode(reply), len(prompt) + len(reply) + 1


def _progress(
    tokens: int, solved: int, asked: int, problem: Question, reply: str, session: Any
) -> Table:
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_row("[dim]problem", problem.prompt)
    table.add_row("[dim]reply", reply.strip())
    table.add_row("[dim]so far", f"[bold]{solved} of {asked}[/bold] solved in {tokens:,} tokens")
    table.add_row("[dim]state", f"{session.state_bytes():,} bytes")
    return table


def _dense_bytes(optimized: OptimizedModel, tokens: int) -> int:
    """Of a cache that keeps every token."""
    decoding = optimized.program.decoding
    assert decoding is not None
    extents = {"batch": 1, "capacity": tokens}
    total = 0
    for spec in decoding.states:
        elements = 1
        for dim in spec.dims:
            elements *= extents[dim] if isinstance(dim, str) else dim
        total += elements * spec.dtype.itemsize
    return total


def _problems(count: int | None = None) -> Iterator[Question]:
    """Sums in words that were never trained on, always the same ones; endless by default."""
    rng, produced = Random(1), 0
    while count is None or produced < count:
        yield TASKS["arithmetic"].sample(rng, 0, 1, held_out=True).questions[0]
        produced += 1


def _farewell() -> None:
    console.rule("[bold]what to look at", align="left")
    pages = sorted(os.path.relpath(page) for page in OUT.glob("*.html"))
    console.print(f"every rewrite, before and after: {', '.join(pages)}", markup=False)
    console.print(f"quality against bytes: {os.path.relpath(OUT / 'quality.png')}", markup=False)
    console.print("what matches in your model: .venv/bin/rewriter explain MODEL", markup=False)


if __name__ == "__main__":
    sys.exit(main())
