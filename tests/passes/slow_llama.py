"""A whole Llama decoding with sinks and a recent window, one token at a time, from its weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["SlowLlama"]


class SlowLlama:
    """Reads the weights of a Hugging Face Llama and nothing else of it; float64.

    `kept[layer]` is a pair of tensors [n, num_kv_heads, head_dim]: keys before their rotation and
    values, sinks first, then the recent ones in order; a key's place among them is its position.
    """

    def __init__(self, model: nn.Module, num_sink_tokens: int, recent_window: int) -> None:
        self.config = model.config
        self.weights = {name: w.detach().double() for name, w in model.state_dict().items()}
        self.num_sink_tokens, self.budget = num_sink_tokens, num_sink_tokens + recent_window
        self.head_dim = self.config.head_dim
        exponent = torch.arange(0, self.head_dim, 2).double() / self.head_dim
        theta = self.config.rope_parameters["rope_theta"]
        angles = torch.arange(self.budget).double()[:, None] / theta**exponent
        self.cos, self.sin = angles.cos()[:, None], angles.sin()[:, None]
        empty = torch.empty(0, self.config.num_key_value_heads, self.head_dim).double()
        self.kept = [(empty, empty) for _ in range(self.config.num_hidden_layers)]

    def forget_recent(self) -> None:
        """Keep only the sinks."""
        sinks = self.num_sink_tokens
        self.kept = [(keys[:sinks], values[:sinks]) for keys, values in self.kept]

    def step(self, token: int) -> Tensor:
        """Logits [vocab_size] after one more token."""
        x = self.weights["model.embed_tokens.weight"][token]
        for layer in range(self.config.num_hidden_layers):
            prefix = f"model.layers.{layer}."
            x = x + self._attention(layer, self._norm(x, prefix + "input_layernorm"))
            h = self._norm(x, prefix + "post_attention_layernorm")
            gate, up = (self._linear(h, f"{prefix}mlp.{name}_proj") for name in ("gate", "up"))
            x = x + self._linear(functional.silu(gate) * up, prefix + "mlp.down_proj")
        return self._linear(self._norm(x, "model.norm"), "lm_head")

    def _linear(self, x: Tensor, name: str) -> Tensor:
        return self.weights[name + ".weight"] @ x

    def _norm(self, x: Tensor, name: str) -> Tensor:
        scale = torch.rsqrt(x.square().mean() + self.config.rms_norm_eps)
        return x * scale * self.weights[name + ".weight"]

    def _turn(self, x: Tensor, first_rank: int) -> Tensor:
        """x [n, heads, head_dim] at the ranks first_rank, first_rank + 1, ..."""
        at = slice(first_rank, first_rank + x.shape[0])
        low, high = x.chunk(2, dim=-1)
        cos, sin = self.cos[at], self.sin[at]
        return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1)

    def _keep(self, kept: Tensor, new: Tensor) -> Tensor:
        """All entries, or without the first one after the sinks when that is one too many."""
        if len(kept) < self.budget:
            return torch.cat((kept, new[None]))
        sinks, recent = kept[: self.num_sink_tokens], kept[self.num_sink_tokens + 1 :]
        return torch.cat((sinks, recent, new[None]))

    def _attention(self, layer: int, x: Tensor) -> Tensor:
        prefix = f"model.layers.{layer}.self_attn."
        q, k, v = (
            self._linear(x, f"{prefix}{name}_proj").view(-1, self.head_dim) for name in "qkv"
        )
        keys, values = (
            self._keep(old, new) for old, new in zip(self.kept[layer], (k, v), strict=True)
        )
        self.kept[layer] = (keys, values)
        query = self._turn(q[None], len(keys) - 1)[0].view(k.shape[0], -1, self.head_dim)
        scores = torch.einsum("hgd,nhd->hgn", query, self._turn(keys, 0)) * self.head_dim**-0.5
        out = torch.einsum("hgn,nhd->hgd", torch.softmax(scores, dim=-1), values)
        return self._linear(out.flatten(), prefix + "o_proj")
