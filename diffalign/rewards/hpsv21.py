"""HPSv2.1 (arXiv 2306.09341): an open_clip ViT-H-14 tuned on HPD votes; score = cos(image, prompt).

The checkpoint is published in open_clip's layout; here its tensors are renamed onto transformers' CLIPModel,
so open_clip is not needed. Images are resized by the longest side and padded with black, as in the release.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from PIL.Image import Image
from torch import Tensor

from diffalign.rewards.base import ScorerError, check_lengths
from diffalign.rewards.clip import Clip, hub_file, load_state, load_tokenizer
from diffalign.rewards.preprocess import pad

REPO, FILE = "xswu/HPSv2", "HPS_v2.1_compressed.pt"
TOKENIZER = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
HEADS = 16  # attention heads of both towers of ViT-H-14; the one number a state dict does not show

_TOP = {
    "logit_scale": "logit_scale",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
}
_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


class HPSv21:
    """About .20 to .33 on ordinary images, so scores closer than 1e-4 count as equal."""

    name = "hpsv2.1"
    span = (0.15, 0.4)
    tie = 1e-4  # a cosine: PickScore's .01 divided by its factor of about 100

    def __init__(self, path: str = REPO, *, tokenizer: str = TOKENIZER, device: str = "cpu") -> None:
        file = hub_file(path, FILE)
        self.clip = Clip(clip_from_open_clip(load_state(file), HEADS), load_tokenizer(path, tokenizer), device)

    def embed_images(self, images: Sequence[Image]) -> Tensor:
        """Unit vectors "n d"."""
        return self.clip.embed_images(images, pad)

    def score(self, images: Sequence[Image], prompts: Sequence[str]) -> Tensor:
        """cos, [n]."""
        check_lengths(self.name, images, prompts)
        return self.clip.cosine(images, prompts, pad)


def clip_from_open_clip(state: dict[str, Tensor], heads: int) -> Any:
    """A CLIPModel in float32 with the weights of an open_clip ViT (GELU, pre-norm, one text tower).

    All sizes but the number of heads are read from the tensors. Raises ScorerError naming tensors that have
    no place, or places that found no tensor.
    """
    from transformers import CLIPConfig, CLIPModel

    try:
        renamed = rename_open_clip(state)
        config = CLIPConfig(text_config=_text(state, heads), vision_config=_vision(state, heads))
    except KeyError as error:
        raise ScorerError(f"this is not an open_clip ViT checkpoint: tensor {error} is missing") from error
    config.projection_dim = renamed["visual_projection.weight"].shape[0]
    model = CLIPModel(config)
    missing, unexpected = model.load_state_dict(renamed, strict=False)
    missing = [name for name in missing if not name.endswith("position_ids")]
    if missing or unexpected:
        raise ScorerError(f"open_clip checkpoint does not fit: missing {missing[:4]}, unexpected {unexpected[:4]}")
    return model


def rename_open_clip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """open_clip's tensors under CLIPModel's names: fused q, k, v split, projections transposed, float32."""
    renamed = {
        "visual_projection.weight": state["visual.proj"].T,
        "text_projection.weight": state["text_projection"].T,
    }
    for key, value in state.items():
        if key in ("visual.proj", "text_projection"):
            continue
        prefix, _, block = key.partition("transformer.resblocks.")
        number, _, name = block.partition(".")
        part, _, kind = name.rpartition(".")
        layer = f"{'vision' if prefix else 'text'}_model.encoder.layers.{number}"
        if key in _TOP:
            renamed[_TOP[key]] = value
        elif part in _BLOCK:
            renamed[f"{layer}.{_BLOCK[part]}.{kind}"] = value
        elif kind in ("in_proj_weight", "in_proj_bias"):
            for letter, chunk in zip("qkv", value.chunk(3), strict=True):
                renamed[f"{layer}.self_attn.{letter}_proj.{kind.removeprefix('in_proj_')}"] = chunk
        else:
            raise ScorerError(f"open_clip checkpoint has a tensor '{key}' that CLIPModel has no place for")
    return {name: value.float().contiguous() for name, value in renamed.items()}


def _text(state: dict[str, Tensor], heads: int) -> dict[str, Any]:
    vocabulary, width = state["token_embedding.weight"].shape
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": state["transformer.resblocks.0.mlp.c_fc.weight"].shape[0],
        "num_hidden_layers": _depth(state, "transformer.resblocks."),
        "num_attention_heads": heads,
        "max_position_embeddings": state["positional_embedding"].shape[0],
        "projection_dim": state["text_projection"].shape[1],
        "hidden_act": "gelu",
        "eos_token_id": vocabulary - 1,  # CLIP's end-of-text is the last token; the text vector is read there
    }


def _vision(state: dict[str, Tensor], heads: int) -> dict[str, Any]:
    width, _, patch, _ = state["visual.conv1.weight"].shape
    side = round((state["visual.positional_embedding"].shape[0] - 1) ** 0.5)
    return {
        "hidden_size": width,
        "intermediate_size": state["visual.transformer.resblocks.0.mlp.c_fc.weight"].shape[0],
        "num_hidden_layers": _depth(state, "visual.transformer.resblocks."),
        "num_attention_heads": heads,
        "patch_size": patch,
        "image_size": patch * side,
        "projection_dim": state["visual.proj"].shape[1],
        "hidden_act": "gelu",
    }


def _depth(state: dict[str, Tensor], prefix: str) -> int:
    return 1 + max(int(key.removeprefix(prefix).split(".")[0]) for key in state if key.startswith(prefix))
