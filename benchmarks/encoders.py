"""The zoo of encoder and vision models, tiny and random, for `coverage.py --encoders`."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from families import NoSuchSpelling, randomize
from stand_in import import_without
from torch import Tensor, nn

__all__ = ["ENCODERS", "Encoder", "Unavailable", "build_encoder"]

Inputs = dict[str, Tensor]


class Unavailable(Exception):
    """A model needs a package that is not here; the message says which."""


@dataclass(frozen=True)
class Encoder:
    """One encoder or vision model.

    Attributes:
        model_class: name of its class in transformers; "" for another builder.
        fields: of its configuration.
        inputs: makes keyword arguments for a batch size and a length (images ignore the length).
        attention: whether it has any.
        builder: for models that are not of transformers.
        module: where the class is found.
    """

    name: str
    model_class: str
    inputs: Callable[[int, int], Inputs]
    fields: Mapping[str, Any] = field(default_factory=dict)
    attention: bool = True
    builder: Callable[[], nn.Module] | None = None
    module: str = "transformers"

    @property
    def spellings(self) -> tuple[str, ...]:
        """The attention implementations to try."""
        return ("sdpa", "eager") if self.builder is None and self.attention else ("",)


def build_encoder(encoder: Encoder, attention: str) -> nn.Module:
    """A random model in eval mode. Raises Unavailable."""
    if encoder.builder is not None:
        model = encoder.builder()
    else:
        model_class = getattr(importlib.import_module(encoder.module), encoder.model_class)
        config = model_class.config_class(**encoder.fields)
        if attention:
            config._attn_implementation = attention
        model = _from_config(model_class, config, attention)
    randomize(model)
    return model.eval()


def _from_config(model_class: Any, config: Any, attention: str) -> nn.Module:
    try:
        return model_class(config)
    except ValueError as error:
        if "does not support an attention implementation" in str(error):
            raise NoSuchSpelling(f"the model has no {attention} attention") from None
        raise


def _text(batch_size: int, length: int) -> Inputs:
    """Token ids and a mask with padding at the end of the last row."""
    mask = torch.ones(batch_size, length, dtype=torch.int64)
    mask[-1, length - 2 :] = 0
    return {"input_ids": torch.randint(3, 250, (batch_size, length)), "attention_mask": mask}


def _ids(batch_size: int, length: int) -> Inputs:
    return {"input_ids": torch.randint(3, 250, (batch_size, length))}


def _images(side: int, name: str = "pixel_values") -> Callable[[int, int], Inputs]:
    return partial(_image, side, name)


def _image(side: int, name: str, batch_size: int, _: int) -> Inputs:
    return {name: torch.randn(batch_size, 3, side, side)}


def _mel(batch_size: int, _: int) -> Inputs:
    return {"input_features": torch.randn(batch_size, 16, 40)}


def _waves(batch_size: int, length: int) -> Inputs:
    return {"input_values": torch.randn(batch_size, 400 + 40 * length)}


_BERT = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 256,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
_VIT = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
_SWIN = {
    "image_size": 32,
    "patch_size": 2,
    "embed_dim": 16,
    "depths": [2, 2],
    "num_heads": [2, 4],
    "window_size": 4,
}
_T5 = {
    "d_model": 64,
    "d_kv": 16,
    "d_ff": 128,
    "num_layers": 2,
    "num_heads": 4,
    "vocab_size": 256,
}
_WHISPER = {
    "d_model": 64,
    "encoder_layers": 2,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 128,
    "decoder_layers": 2,
    "decoder_attention_heads": 4,
    "num_mel_bins": 16,
    "max_source_positions": 20,
    "vocab_size": 256,
    "pad_token_id": 0,
}
_WAV2VEC2 = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "conv_dim": [16, 16],
    "conv_stride": [5, 4],
    "conv_kernel": [10, 4],
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
}


def _gcvit() -> nn.Module:
    """timm's GC ViT with two blocks a stage (one with local, one with global queries), at 64 pixels."""
    return _import_timm().models.gcvit.GlobalContextVit(
        img_size=64,
        window_ratio=(16, 16, 16, 32),
        embed_dim=16,
        depths=(2, 2, 2, 2),
        num_classes=10,
    )


def _import_timm() -> Any:
    """timm without its image loading, which wants torchvision and PIL and is not used here."""
    if importlib.util.find_spec("timm") is None:
        raise Unavailable("timm is not installed: pip install --no-deps timm")
    return import_without("timm", ("torchvision", "PIL", "timm.data"))


ENCODERS: tuple[Encoder, ...] = (
    Encoder("bert", "BertModel", _text, _BERT),
    Encoder("roberta", "RobertaModel", _text, _BERT),
    Encoder(
        "distilbert",
        "DistilBertModel",
        _text,
        {
            "dim": 64,
            "hidden_dim": 128,
            "n_layers": 2,
            "n_heads": 4,
            "vocab_size": 256,
            "max_position_embeddings": 64,
        },
    ),
    Encoder("electra", "ElectraModel", _text, {**_BERT, "embedding_size": 32}),
    Encoder("albert", "AlbertModel", _text, {**_BERT, "embedding_size": 32}),
    Encoder("mpnet", "MPNetModel", _text, _BERT),
    Encoder(
        "modernbert",
        "ModernBertModel",
        _text,
        {
            **_BERT,
            "local_attention": 8,
            "global_attn_every_n_layers": 2,
        },
    ),
    Encoder("bert without mask", "BertModel", _ids, _BERT),
    Encoder("vit", "ViTModel", _images(32), _VIT),
    Encoder("deit", "DeiTModel", _images(32), _VIT),
    Encoder("dinov2", "Dinov2Model", _images(32), {**_VIT, "mlp_ratio": 2}),
    Encoder("beit", "BeitModel", _images(32), {**_VIT, "use_relative_position_bias": True}),
    Encoder("clip text", "CLIPTextModel", _text, {**_BERT, "eos_token_id": 2}),
    Encoder("clip vision", "CLIPVisionModel", _images(32), _VIT),
    Encoder("siglip vision", "SiglipVisionModel", _images(32), _VIT),
    Encoder("swin", "SwinModel", _images(32), _SWIN),
    Encoder("swinv2", "Swinv2Model", _images(32), _SWIN),
    Encoder("t5 encoder", "T5EncoderModel", _text, _T5),
    Encoder(
        "whisper encoder",
        "WhisperEncoder",
        _mel,
        _WHISPER,
        module="transformers.models.whisper.modeling_whisper",
    ),
    Encoder("wav2vec2", "Wav2Vec2Model", _waves, _WAV2VEC2),
    Encoder("gc vit (timm)", "", _images(64, "x"), builder=_gcvit),
    Encoder(
        "resnet (CNN)",
        "ResNetModel",
        _images(32),
        {
            "embedding_size": 16,
            "hidden_sizes": [16, 32],
            "depths": [1, 1],
        },
        attention=False,
    ),
    Encoder(
        "convnext (CNN)",
        "ConvNextModel",
        _images(32),
        {
            "hidden_sizes": [16, 32],
            "depths": [1, 1],
            "num_stages": 2,
        },
        attention=False,
    ),
)
