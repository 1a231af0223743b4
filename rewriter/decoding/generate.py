"""Hugging Face's own generation loop over a decoding session."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, GenerationConfig, GenerationMixin, PretrainedConfig
from transformers.modeling_outputs import CausalLMOutputWithPast

from rewriter.decoding.state import Session
from rewriter.errors import InputError

__all__ = ["Generator", "config_from_dict"]


def config_from_dict(values: dict[str, Any]) -> PretrainedConfig:
    """The configuration object of a `config.json`; a plain one for an unknown `model_type`."""
    values = dict(values)
    model_type = values.pop("model_type", "")
    try:
        return AutoConfig.for_model(model_type, **values)
    except ValueError:
        return PretrainedConfig(**values)


class SessionCache:
    """What the generation loop passes around as `past_key_values`."""

    is_compileable = False

    def __init__(self, session: Session) -> None:
        self.session = session

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens fed so far, padding included: what the loop's masks are as long as."""
        return self.session.entries

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows follow their beams."""
        self.session.reorder(beam_idx)

    def crop(self, max_length: int) -> None:
        """Drop the newest entries; a negative number counts from the end."""
        keep = max_length if max_length >= 0 else self.session.entries + max_length
        self.session.crop(keep)


class Generator(nn.Module, GenerationMixin):
    """One `generate` call: `forward` as the loop expects it, the state in a session.

    Args:
        owner: the optimized model: gives sessions.
        config: of the model. generation_config: defaults of the loop.
    """

    main_input_name = "input_ids"
    _is_stateful = False
    _supports_cache_class = True
    _owner: Any

    def __init__(
        self, owner: Any, config: PretrainedConfig, generation_config: GenerationConfig
    ) -> None:
        super().__init__()
        object.__setattr__(self, "_owner", owner)
        self._prefill_chunk: int | None = None
        self.config = config
        self.generation_config = generation_config
        parameter = next(iter(owner.parameters()), None)
        self.device = torch.device("cpu") if parameter is None else parameter.device
        self.dtype = torch.float32 if parameter is None else parameter.dtype

    @classmethod
    def can_generate(cls) -> bool:
        """Always."""
        return True

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def _optimize_model_for_decode(self) -> Any:
        return nullcontext()

    def is_remote_code(self) -> bool:
        """Never: nothing of the model's own code runs."""
        return False

    def _prepare_cache_for_generation(self, generation_config: Any, *_: Any, **__: Any) -> Any:
        """None to prepare: `forward` opens a session. Chunks of a prompt are the session's too."""
        self._prefill_chunk = generation_config.prefill_chunk_size
        generation_config.prefill_chunk_size = None

    def _assisted_decoding(self, *_: Any, **__: Any) -> Any:
        raise InputError(
            "assisted decoding (assistant_model, prompt_lookup_num_tokens) is not supported;"
            " allowed: greedy search, sampling and beam search"
        )

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: SessionCache | None = None,
        logits_to_keep: int = 0,
        use_cache: bool = True,
        return_dict: bool = True,
    ) -> CausalLMOutputWithPast:
        """Feed the tokens that the cache has not seen."""
        if past_key_values is not None and not isinstance(past_key_values, SessionCache):
            kind = type(past_key_values).__name__
            raise InputError(f"past_key_values is {kind}; allowed: none, the program keeps its own")
        if past_key_values is None or not use_cache:
            session = self._owner.session(input_ids.shape[0], prefill_chunk=self._prefill_chunk)
            past_key_values = SessionCache(session)
        logits = past_key_values.session.run(
            input_ids, attention_mask=attention_mask, logits_to_keep=logits_to_keep
        )
        return CausalLMOutputWithPast(logits=logits, past_key_values=past_key_values)  # pyright: ignore

    def prepare_inputs_for_generation(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        past_key_values: SessionCache | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """The new tokens, the whole mask and the cache."""
        if kwargs.get("inputs_embeds") is not None:
            raise InputError("inputs_embeds is not supported; give input_ids")
        for name in ("output_attentions", "output_hidden_states"):
            if kwargs.get(name):
                raise InputError(f"{name} is not supported: the program returns logits only")
        if next_sequence_length is not None:
            input_ids = input_ids[:, -next_sequence_length:]
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "past_key_values": past_key_values,
            "logits_to_keep": kwargs.get("logits_to_keep", 0),
            "use_cache": kwargs.get("use_cache", True),
        }
