"""MPS, overall preference (Zhang et al., CVPR 2024, arXiv 2405.14705): CLIP-H, whose image tokens read the prompt.

A fixed list of words, the condition, says what counts. A token of the prompt is read if its largest product with a
token of the condition is above `threshold` of the largest in the prompt. The image's first token after four layers
that read (`mps_layers.py`) is compared with the prompt's embedding:

    score = exp(logit_scale) * cos(image, prompt)

Published accuracies were measured with threshold .3 (the authors' evaluation script); their example has .01. The
release normalises by the largest product of a batch, always of one prompt in their script; here it is that of each
prompt, so that a score does not depend on the batch. It computes in float16, here in float32.

Weights: the authors' `MPS_overall_checkpoint.pth` is a whole pickled module. Convert it once with `diffalign
convert`, or use its conversion RE-N-Y/mpsv1 on the Hub.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor, nn

from diffalign.rewards.base import ScorerError, check_finite, check_lengths
from diffalign.rewards.clip import hub_file, load_state, load_tokenizer
from diffalign.rewards.preprocess import clip_pixels, crop
from diffalign.rewards.released.build import build, depth
from diffalign.rewards.released.mps_layers import MpsLayers, expected

REPO, FILE = "RE-N-Y/mpsv1", "model.safetensors"
TOKENIZER = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
CONDITION = (
    *("light", "color", "clarity", "tone", "style", "ambiance", "artistry", "shape", "face", "hair", "hands"),
    *("limbs", "structure", "instance", "texture", "quantity", "attributes", "position", "number", "location"),
    *("word", "things"),
)
HEADS = 16  # of both of CLIP's towers, the one number that tensors do not show
BATCH = 32
LAYERS = "cross_model.layers."
COMPUTED = ("position_ids", "rotary_emb.inv_freq")  # buffers of the release that are computed here


class MPS:
    """In logits: of two images, sigmoid(difference) is the model's probability that people prefer the first."""

    name = "mps"

    def __init__(
        self, path: str = REPO, *, tokenizer: str = TOKENIZER, threshold: float = 0.3, device: str = "cpu"
    ) -> None:
        """`path`: a .safetensors file, a folder with `model.safetensors`, or a Hub id."""
        file = hub_file(path, FILE)
        self.network = mps_network(load_state(file), str(file), threshold).to(device)
        self.tokenizer, self.device = load_tokenizer(path, tokenizer), device

    @torch.no_grad()
    def score(self, images: Sequence[Image], prompts: Sequence[str]) -> Tensor:
        """exp(logit_scale) * cos, [n]. Raises ScorerError naming the prompt of a score that is not finite."""
        check_lengths(self.name, images, prompts)
        condition = self._tokens([", ".join(CONDITION) + "."])
        parts = []
        for start in range(0, len(images), BATCH):
            pixels = clip_pixels(images[start : start + BATCH], self.network.image_size, crop)
            words = self._tokens(prompts[start : start + BATCH])
            parts.append(self.network(pixels.to(self.device), words, condition).cpu())
        return check_finite(self.name, torch.cat(parts) if parts else torch.empty(0), prompts)

    def _tokens(self, prompts: Sequence[str]) -> Tensor:
        """Tokens "n length", padded: the release has no mask for padding, so its tokens count as any other."""
        found = self.tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=self.network.context, return_tensors="pt"
        )
        return found.input_ids.to(self.device)


class MpsNetwork(nn.Module):
    """Pixels and tokens to scores."""

    def __init__(self, clip: Any, layers: MpsLayers, threshold: float) -> None:
        super().__init__()
        self.clip, self.layers, self.threshold = clip, layers, threshold
        self.image_size: int = clip.config.vision_config.image_size
        self.context: int = clip.config.text_config.max_position_embeddings

    def forward(self, pixels: Tensor, prompts: Tensor, condition: Tensor) -> Tensor:
        """Scores [n] of pixels "n 3 size size", tokens of prompts "n length" and of the condition "1 length"."""
        image = self.clip.visual_projection(self.clip.vision_model(pixel_values=pixels).last_hidden_state)
        words, prompt = self._text(prompts)
        wanted, _ = self._text(condition)
        near = (words @ wanted[0].mT).amax(-1)
        allowed = near / near.amax(-1, keepdim=True) > self.threshold
        read = self.layers(image, words, allowed)[:, 0]
        return self.clip.logit_scale.exp() * nn.functional.cosine_similarity(read, prompt, dim=-1)

    def _text(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Every token "n length d" and the end of text "n d", both projected."""
        read = self.clip.text_model(input_ids=tokens)
        return self.clip.text_projection(read.last_hidden_state), self.clip.text_projection(read.pooler_output)


def mps_network(state: dict[str, Tensor], where: str, threshold: float, heads: int = HEADS) -> MpsNetwork:
    """The network from the released tensors. Raises ScorerError or ModelError naming what does not fit."""
    from transformers import CLIPModel

    clip, layers = split_mps(state)
    try:
        config = clip_config(clip, heads)
        network = MpsLayers(layers)
    except KeyError as error:
        raise ScorerError(f"{where} is not MPS's weights: tensor {error} is missing") from error
    return MpsNetwork(build("the CLIP model of mps", CLIPModel, config, clip), network, threshold)


def split_mps(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """CLIP's tensors by transformers' names, and the layers'. Raises ScorerError for a tensor that has no place."""
    clip: dict[str, Tensor] = {}
    layers: dict[str, Tensor] = {}
    for key, value in state.items():
        name = key.removeprefix("mps.")
        if name.endswith(COMPUTED):
            continue
        if name.startswith(LAYERS):
            layers[name.removeprefix(LAYERS)] = value.float()
        elif name.startswith("model."):
            clip[name.removeprefix("model.")] = value.float()
        else:
            raise ScorerError(f"the weights of mps have a tensor '{key}' that has no place")
    unknown = set(layers) - set(expected(1 + max((int(name.split(".")[0]) for name in layers), default=-1)))
    if unknown:
        raise ScorerError(f"the weights of mps have a tensor '{LAYERS}{min(unknown)}' that has no place")
    return clip, layers


def clip_config(state: dict[str, Tensor], heads: int) -> Any:
    """The sizes of a CLIPModel, read off its tensors. Raises KeyError for one that is missing."""
    from transformers import CLIPConfig

    words, text = state["text_model.embeddings.token_embedding.weight"].shape
    width, _, patch, _ = state["vision_model.embeddings.patch_embedding.weight"].shape
    side = round((state["vision_model.embeddings.position_embedding.weight"].shape[0] - 1) ** 0.5)

    def tower(name: str, width: int) -> dict[str, Any]:
        return {
            "hidden_size": width,
            "intermediate_size": state[f"{name}.encoder.layers.0.mlp.fc1.weight"].shape[0],
            "num_hidden_layers": depth(state, f"{name}.encoder.layers."),
            "num_attention_heads": heads,
            "hidden_act": "gelu",
        }

    return CLIPConfig(
        text_config={
            **tower("text_model", text),
            "vocab_size": words,
            "max_position_embeddings": state["text_model.embeddings.position_embedding.weight"].shape[0],
            "eos_token_id": words - 1,  # the last token; the prompt's vector is read there
        },
        vision_config={**tower("vision_model", width), "patch_size": patch, "image_size": patch * side},
        projection_dim=state["visual_projection.weight"].shape[0],
    )
