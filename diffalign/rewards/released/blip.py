"""BLIP as ImageReward releases it (ViT-L and a BERT with cross-attention), renamed onto transformers' classes.

The released ViT has timm's names, the BERT has transformers' own. Left out: `vision_proj` and `text_proj`, the heads of
BLIP's contrastive loss, which the score does not use.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from diffalign.rewards.base import ScorerError
from diffalign.rewards.released.build import build, depth

VISION, TEXT = "blip.visual_encoder.", "blip.text_encoder."
UNUSED = ("blip.vision_proj.", "blip.text_proj.", "blip.text_encoder.embeddings.position_ids")
HEAD = "mlp."

_VISION_TOP = {
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding",
    "patch_embed.proj": "embeddings.patch_embedding",
    "norm": "post_layernorm",
}
_VISION_BLOCK = {
    "norm1": "layer_norm1",
    "attn.qkv": "self_attn.qkv",
    "attn.proj": "self_attn.projection",
    "norm2": "layer_norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}


@dataclass(frozen=True)
class Heads:
    """Numbers of attention heads, the only sizes that tensors do not show."""

    vision: int = 16
    text: int = 12


@dataclass(frozen=True)
class BlipParts:
    """The released state dict by network, under transformers' names; `head` as released, without its prefix."""

    vision: dict[str, Tensor]
    text: dict[str, Tensor]
    head: dict[str, Tensor]


def split_blip(state: dict[str, Tensor]) -> BlipParts:
    """The tensors by network. Raises ScorerError for one that has no place."""
    parts = BlipParts({}, {}, {})
    for key, value in state.items():
        if key.startswith(UNUSED):
            continue
        if key.startswith(VISION):
            parts.vision[_vision_name(key)] = value
        elif key.startswith(TEXT):
            parts.text[key.removeprefix(TEXT)] = value
        elif key.startswith(HEAD):
            parts.head[key.removeprefix(HEAD)] = value
        else:
            raise ScorerError(f"the weights of imagereward have a tensor '{key}' that has no place in BLIP")
    return parts


def vision_config(state: dict[str, Tensor], heads: int) -> Any:
    """The sizes of the image encoder, read off its renamed tensors. Raises KeyError for one that is missing."""
    from transformers import BlipVisionConfig

    width, _, patch, _ = state["embeddings.patch_embedding.weight"].shape
    return BlipVisionConfig(
        hidden_size=width,
        intermediate_size=state["encoder.layers.0.mlp.fc1.weight"].shape[0],
        num_hidden_layers=depth(state, "encoder.layers."),
        num_attention_heads=heads,
        patch_size=patch,
        image_size=patch * round((state["embeddings.position_embedding"].shape[1] - 1) ** 0.5),
        layer_norm_eps=1e-6,  # timm's; transformers' default is another
        hidden_act="gelu",
    )


def text_config(state: dict[str, Tensor], heads: int) -> Any:
    """The sizes of the text encoder with its cross-attention. Raises KeyError for a tensor that is missing."""
    from transformers import BlipTextConfig

    vocabulary, width = state["embeddings.word_embeddings.weight"].shape
    return BlipTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        encoder_hidden_size=state["encoder.layer.0.crossattention.self.key.weight"].shape[1],
        intermediate_size=state["encoder.layer.0.intermediate.dense.weight"].shape[0],
        num_hidden_layers=depth(state, "encoder.layer."),
        num_attention_heads=heads,
        max_position_embeddings=state["embeddings.position_embeddings.weight"].shape[0],
        layer_norm_eps=1e-12,
        hidden_act="gelu",
        is_decoder=True,  # what gives the layers their cross-attention; the mask is chosen at the call
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
        sep_token_id=None,
    )


def vision_model(state: dict[str, Tensor], heads: int) -> Any:
    """transformers' BlipVisionModel; its last_hidden_state is the released encoder's output, [n, patches + 1, d]."""
    from transformers.models.blip.modeling_blip import BlipVisionModel

    return build("imagereward's image encoder", BlipVisionModel, vision_config(state, heads), state)


def text_model(state: dict[str, Tensor], heads: int) -> Any:
    """transformers' BlipTextModel, as released without a pooler."""
    from transformers.models.blip.modeling_blip_text import BlipTextModel

    what = "imagereward's text encoder"
    return build(what, BlipTextModel, text_config(state, heads), state, add_pooling_layer=False)


def _vision_name(key: str) -> str:
    name = key.removeprefix(VISION)
    part, _, kind = name.rpartition(".")
    if name in _VISION_TOP:
        return _VISION_TOP[name]
    if part in _VISION_TOP:
        return f"{_VISION_TOP[part]}.{kind}"
    _, _, block = name.partition("blocks.")
    number, _, rest = block.partition(".")
    part, _, kind = rest.rpartition(".")
    if part not in _VISION_BLOCK:
        raise ScorerError(f"the weights of imagereward have a tensor '{key}' that has no place in BLIP's ViT")
    return f"encoder.layers.{number}.{_VISION_BLOCK[part]}.{kind}"
