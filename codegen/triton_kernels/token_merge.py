"""Merging of similar tokens: who is like whom, who may go, and the weighted mean of those that meet.

    match   best[s], to[s]  = max and argmax over targets u of cos(metric[s], metric[u])
    energy  energy[t]       = mean over u of f(cos(metric[t], metric[u]))
            f(c) = ELU(c - margin), or of `gauss` exp(-((1 - c) / (1 - margin))² / 2)
    merge   out[k]          = Σ size · x / Σ size over token kept[k] and the sources sent to k

Layouts: metric and x [batch_size, tokens, width], any strides, columns contiguous; lists of tokens int32
[batch_size, count], contiguous; size, best and energy fp32. Similarities are never stored: a program
of the first two takes `block_m` tokens of one request and walks over the others, norms being made on
the way in fp32. A program of the third makes `block_d` columns of one kept token; it reads the whole
list of destinations and the rows of its own sources, in order, so nothing depends on who was first.
Of equal similarities the first target wins. A row of zeros is like nothing (cosine 0).
Sources: https://arxiv.org/abs/2210.09461 (ToMe), https://arxiv.org/abs/2405.16148 (PiToMe)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from codegen.kernel import Kernel, KernelDescription
from codegen.triton_kernels.checks import float_refusal, one_of
from codegen.triton_kernels.generate import Launch, generate, pointer, run
from codegen.triton_kernels.product import product
from rewriter.cost.cost import Cost
from rewriter.errors import InputError

__all__ = [
    "TOKEN_MERGE",
    "TOKEN_SIMILARITY",
    "merge_tokens",
    "merge_tokens_reference",
    "similarity_cost",
    "token_energy",
    "token_energy_reference",
    "token_match",
    "token_match_reference",
]

SOURCE_URL = "https://arxiv.org/abs/2210.09461"
FORMS = ("match", "elu", "gauss")
MAX_WIDTH = 256


@dataclass(frozen=True)
class MergeConfig:
    """Tiles.

    Attributes:
        block_m, block_n: tokens asking and asked of one similarity tile.
        block_s, block_d: sources and columns of one merging tile.
    """

    block_m: int = 32
    block_n: int = 32
    block_s: int = 16
    block_d: int = 128
    num_warps: int = 4
    num_stages: int = 2


CONFIG = MergeConfig()
"""197 tokens of a ViT give 7 programs for each image and no spill at widths up to 256; not timed."""


@triton.jit
def unit(rows: tl.tensor) -> tl.tensor:
    """1 / |row| as [M, 1], of rows [M, D]; a great number for a row of zeros, to multiply zeros with."""
    wide = rows.to(tl.float32)
    square = tl.sum(wide * wide, 1, keep_dims=True)
    return tl.rsqrt(tl.maximum(square, 1e-30))


@triton.jit
def token_similarity_kernel(
    metric: tl.tensor,
    sources: tl.tensor,  # int32 [batch_size, num_sources]
    targets: tl.tensor,  # int32 [batch_size, num_targets]
    score: tl.tensor,  # fp32 [batch_size, num_sources]
    to: tl.tensor,  # int32 [batch_size, num_sources], written by `match`
    num_sources: int,
    num_targets: int,
    margin: float,
    metric_batch: int,
    metric_row: int,
    FORM: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    """See the module."""
    b = tl.program_id(1).to(tl.int64)
    s = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)  # [M]
    d = tl.arange(0, BLOCK_D)  # [D]
    asks = s < num_sources
    live_d = d < WIDTH
    own = tl.load(sources + b * num_sources + s, mask=asks, other=0).to(tl.int64)
    base = metric + b * metric_batch
    mask = asks[:, None] & live_d[None, :]
    a = tl.load(base + own[:, None] * metric_row + d[None, :], mask=mask, other=0.0)  # [M, D]
    a_unit = unit(a)  # [M, 1]
    best = tl.full([BLOCK_M], float("-inf"), tl.float32)
    where = tl.zeros([BLOCK_M], tl.int32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for start in range(0, num_targets, BLOCK_N):
        u = start + tl.arange(0, BLOCK_N)  # [N]
        live = u < num_targets
        other = tl.load(targets + b * num_targets + u, mask=live, other=0).to(tl.int64)
        mask = live[:, None] & live_d[None, :]
        t = tl.load(base + other[:, None] * metric_row + d[None, :], mask=mask, other=0.0)  # [N, D]
        cos = product(a, tl.trans(t)) * a_unit * tl.trans(unit(t))  # [M, N]
        if FORM == "match":
            cos = tl.where(live[None, :], cos, float("-inf"))
            peak, at = tl.max(cos, 1, return_indices=True)
            where = tl.where(peak > best, (start + at).to(tl.int32), where)
            best = tl.maximum(best, peak)
        else:
            if FORM == "elu":
                beyond = cos - margin
                value = tl.where(beyond > 0.0, beyond, tl.exp(beyond) - 1.0)
            else:
                far = (1.0 - cos) / (1.0 - margin)
                value = tl.exp(far * far * -0.5)
            total += tl.sum(tl.where(live[None, :], value, 0.0), 1)
    place = b * num_sources + s
    if FORM == "match":
        tl.store(score + place, best, mask=asks)
        tl.store(to + place, where, mask=asks)
    else:
        tl.store(score + place, total / num_targets, mask=asks)


@triton.jit
def token_merge_kernel(
    x: tl.tensor,
    size: tl.tensor,  # fp32 [batch_size, tokens]
    kept: tl.tensor,  # int32 [batch_size, num_kept]
    sources: tl.tensor,  # int32 [batch_size, num_sources]
    to: tl.tensor,  # int32 [batch_size, num_sources]: places in `kept`
    out: tl.tensor,  # [batch_size, num_kept, width], contiguous
    new_size: tl.tensor,  # fp32 [batch_size, num_kept]
    tokens: int,
    num_kept: int,
    num_sources: int,
    width: int,
    x_batch: int,
    x_row: int,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """See the module."""
    k = tl.program_id(0).to(tl.int64)
    b = tl.program_id(2).to(tl.int64)
    d = tl.program_id(1).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)  # [D]
    live_d = d < width
    own = tl.load(kept + b * num_kept + k).to(tl.int64)
    weight = tl.load(size + b * tokens + own)
    row = tl.load(x + b * x_batch + own * x_row + d, mask=live_d, other=0.0)
    acc = weight * row.to(tl.float32)
    for start in range(0, num_sources, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)  # [S]
        place = b * num_sources + s
        meets = tl.load(to + place, mask=s < num_sources, other=-1).to(tl.int64) == k
        token = tl.load(sources + place, mask=meets, other=0).to(tl.int64)
        heavy = tl.load(size + b * tokens + token, mask=meets, other=0.0)  # [S]
        mask = meets[:, None] & live_d[None, :]
        at = x + b * x_batch + token[:, None] * x_row + d[None, :]
        v = tl.load(at, mask=mask, other=0.0).to(tl.float32)  # [S, D]
        acc += tl.sum(heavy[:, None] * v, 0)
        weight += tl.sum(heavy, 0)
    place = b * num_kept + k
    tl.store(out + place * width + d, (acc / weight).to(out.dtype.element_ty), mask=live_d)
    tl.store(new_size + place, weight)


class TokenSimilarity(Kernel):
    """`form` is `"match"`, `"elu"` or `"gauss"`, `head_dim` the metric's width."""

    operator = "token_similarity"
    backend = "triton"

    def supports(self, description: KernelDescription) -> str | None:
        """See `Kernel`."""
        refusal = float_refusal(description) or one_of("form", description.form, FORMS)
        if refusal is None and not 1 <= description.head_dim <= MAX_WIDTH:
            return f"head_dim={description.head_dim}, allowed: a metric of 1 to {MAX_WIDTH}"
        return refusal or one_of("epilogue", description.epilogue, (None,))

    def source(self, description: KernelDescription) -> str:
        """See `Kernel`."""
        aligned = "i64:16" if description.head_dim % 16 == 0 else "i64"
        return generate(
            token_similarity_kernel,
            description=description,
            source_url=SOURCE_URL,
            signature={
                "metric": pointer(description.dtype),
                **dict.fromkeys(("sources", "targets", "to"), pointer(torch.int32)),
                "score": pointer(torch.float32),
                **dict.fromkeys(("num_sources", "num_targets"), "i64"),
                "margin": "fp32",
                **dict.fromkeys(("metric_batch", "metric_row"), aligned),
            },
            constants={
                "FORM": description.form,
                "WIDTH": description.head_dim,
                "BLOCK_D": max(16, triton.next_power_of_2(description.head_dim)),
                "BLOCK_M": CONFIG.block_m,
                "BLOCK_N": CONFIG.block_n,
            },
            launch=Launch(
                ("cdiv(num_sources, BLOCK_M)", "batch_size"), CONFIG.num_warps, CONFIG.num_stages
            ),
        )


class TokenMerge(Kernel):
    """Of any width."""

    operator = "token_merge"
    backend = "triton"

    def supports(self, description: KernelDescription) -> str | None:
        """See `Kernel`."""
        return float_refusal(description) or one_of("epilogue", description.epilogue, (None,))

    def source(self, description: KernelDescription) -> str:
        """See `Kernel`."""
        sizes = ("tokens", "num_kept", "num_sources")
        return generate(
            token_merge_kernel,
            description=description,
            source_url=SOURCE_URL,
            signature={
                **dict.fromkeys(("x", "out"), pointer(description.dtype)),
                **dict.fromkeys(("size", "new_size"), pointer(torch.float32)),
                **dict.fromkeys(("kept", "sources", "to"), pointer(torch.int32)),
                **dict.fromkeys(sizes, "i64"),
                **dict.fromkeys(("width", "x_batch", "x_row"), "i64:16"),
            },
            constants={"BLOCK_S": CONFIG.block_s, "BLOCK_D": CONFIG.block_d},
            launch=Launch(
                ("num_kept", "cdiv(width, BLOCK_D)", "batch_size"),
                CONFIG.num_warps,
                CONFIG.num_stages,
            ),
        )


TOKEN_SIMILARITY, TOKEN_MERGE = TokenSimilarity(), TokenMerge()


def token_match(metric: Tensor, sources: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The most similar target of every source.

    Args:
        metric: [batch_size, tokens, width].
        sources, targets: int32 [batch_size, count], tokens; at least one target.

    Returns:
        cosine fp32 and place in `targets` int32, both [batch_size, number of sources].

    Raises:
        InputError: shapes or dtypes that do not fit.
    """
    if targets.shape[-1] == 0:
        raise InputError("targets: none")
    score, to = _similar(metric, sources, targets, "match", 0.0)
    return score, to


def token_energy(metric: Tensor, *, margin: float, form: str = "elu") -> Tensor:
    """How many like it every token has, fp32 [batch_size, tokens]; metric [batch_size, tokens, width].

    Args:
        margin: cosine from which two tokens are alike.
        form: `"elu"` or `"gauss"`.

    Raises:
        InputError: shapes or dtypes that do not fit.
    """
    tokens = torch.arange(metric.shape[1], dtype=torch.int32, device=metric.device)
    everyone = tokens.expand(metric.shape[0], -1).contiguous()
    return _similar(metric, everyone, everyone, form, margin)[0]


def _similar(
    metric: Tensor, sources: Tensor, targets: Tensor, form: str, margin: float
) -> tuple[Tensor, Tensor]:
    if metric.dim() != 3 or metric.stride(2) != 1:
        raise InputError(f"metric: [batch, tokens, width] is expected, not {tuple(metric.shape)}")
    for name, tokens in (("sources", sources), ("targets", targets)):
        _check_list(name, tokens, metric.shape[0])
    description = KernelDescription(
        operator="token_similarity", dtype=metric.dtype, head_dim=metric.shape[2], form=form
    )
    refusal = TOKEN_SIMILARITY.supports(description)
    if refusal is not None:
        raise InputError(refusal)
    score = metric.new_empty(sources.shape, dtype=torch.float32)
    to = torch.empty_like(sources)
    count = sources.shape[1]
    grid = (triton.cdiv(count, CONFIG.block_m), metric.shape[0])
    sizes = (count, targets.shape[1], margin, metric.stride(0), metric.stride(1))
    run(TOKEN_SIMILARITY, description, grid, (metric, sources, targets, score, to, *sizes))
    return score, to


def merge_tokens(
    x: Tensor, size: Tensor, kept: Tensor, sources: Tensor, to: Tensor
) -> tuple[Tensor, Tensor]:
    """The kept tokens, each the mean, weighted by size, of itself and the sources sent to it.

    Args:
        x: [batch_size, tokens, width]; size: fp32 [batch_size, tokens], how many each stands for.
        kept, sources: int32 [batch_size, count], tokens.
        to: int32 like `sources`, places in `kept`.

    Returns:
        [batch_size, number kept, width] and fp32 [batch_size, number kept].

    Raises:
        InputError: shapes or dtypes that do not fit.
    """
    batch_size, tokens, width = x.shape
    if x.stride(2) != 1 and width > 1:
        raise InputError("x: its last dimension has to be contiguous")
    if size.shape != (batch_size, tokens) or size.dtype != torch.float32:
        raise InputError(f"size: float32 [{batch_size}, {tokens}] is expected")
    for name, listed in (("kept", kept), ("sources", sources), ("to", to)):
        _check_list(name, listed, batch_size)
    if to.shape != sources.shape:
        raise InputError(f"to: {tuple(to.shape)} beside sources {tuple(sources.shape)}")
    description = KernelDescription(operator="token_merge", dtype=x.dtype)
    refusal = TOKEN_MERGE.supports(description)
    if refusal is not None:
        raise InputError(refusal)
    num_kept = kept.shape[1]
    out = torch.empty((batch_size, num_kept, width), dtype=x.dtype, device=x.device)
    new_size = size.new_empty((batch_size, num_kept))
    sizes = (tokens, num_kept, sources.shape[1], width, x.stride(0), x.stride(1))
    grid = (num_kept, triton.cdiv(width, CONFIG.block_d), batch_size)
    tensors = (x, size.contiguous(), kept, sources, to, out, new_size)
    run(TOKEN_MERGE, description, grid, (*tensors, *sizes))
    return out, new_size


def _check_list(name: str, tokens: Tensor, batch_size: int) -> None:
    wrong = tokens.dim() != 2 or tokens.shape[0] != batch_size or not tokens.is_contiguous()
    if wrong or tokens.dtype != torch.int32:
        raise InputError(f"{name}: contiguous int32 [{batch_size}, count] is expected")


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    units = [torch.nn.functional.normalize(t.float(), dim=-1, eps=0.0).nan_to_num() for t in (a, b)]
    return units[0] @ units[1].transpose(1, 2)


def _rows(x: Tensor, tokens: Tensor) -> Tensor:
    return x.gather(1, tokens.long().unsqueeze(-1).expand(-1, -1, x.shape[2]))


def token_match_reference(
    metric: Tensor, sources: Tensor, targets: Tensor
) -> tuple[Tensor, Tensor]:
    """The same in plain PyTorch."""
    best, to = _cosine(_rows(metric, sources), _rows(metric, targets)).max(-1)
    return best, to.int()


def token_energy_reference(metric: Tensor, *, margin: float, form: str = "elu") -> Tensor:
    """The same in plain PyTorch."""
    cos = _cosine(metric, metric)
    if form == "elu":
        return torch.nn.functional.elu(cos - margin).mean(-1)
    return torch.exp(-(((1 - cos) / (1 - margin)) ** 2) / 2).mean(-1)


def merge_tokens_reference(
    x: Tensor, size: Tensor, kept: Tensor, sources: Tensor, to: Tensor
) -> tuple[Tensor, Tensor]:
    """The same in plain PyTorch."""
    weighted = x.float() * size.unsqueeze(-1)
    places = to.long()
    total = _rows(weighted, kept)
    total = total.scatter_add(
        1, places.unsqueeze(-1).expand(-1, -1, x.shape[2]), _rows(weighted, sources)
    )
    new_size = size.gather(1, kept.long())
    new_size = new_size.scatter_add(1, places, size.gather(1, sources.long()))
    return (total / new_size.unsqueeze(-1)).to(x.dtype), new_size


def similarity_cost(metric: Tensor) -> Cost:
    """All pairs; each tile of tokens reads the others once."""
    batch_size, tokens, width = metric.shape
    tiles = triton.cdiv(tokens, CONFIG.block_m)
    moved = batch_size * (tiles + 1) * tokens * width * metric.element_size()
    return Cost(2.0 * batch_size * tokens * tokens * width, float(moved), 1)
