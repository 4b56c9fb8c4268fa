"""A CLIP whose image tower takes the sampler's timestep as an input: DiT's adaLN in every block.

    c              = MLP(sinusoid(t))                                              t in 0 … T−1
    s, k, g        = linear(SiLU(c))         shift, scale and gate, for attention and for the MLP of a block
    x             <- x + g · attention((1 + k) · norm(x) + s),      and the same with the block's MLP
    pooled        <- (1 + k) · pooled + s                                          after the last norm

Source: SPO (arXiv 2406.04314) on DiT (arXiv 2212.09748). Every linear starts at zero except for the biases of the
gates, which start at one, so that at the start the network is the CLIP it was made from, whatever t is.
Parameters have the release's names, so a saved state dict is the release's without its leading "model.".
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from diffalign.rewards.base import ScorerError
from diffalign.rewards.preprocess import CLIP_MEAN, CLIP_STD

FREQUENCIES = 256  # width of the sinusoid (the release's)
MAX_PERIOD = 10_000.0  # timesteps: the sinusoid's longest period is 2π times this
INIT_STD = 0.02  # of the timestep MLP's weights, as in DiT
HEADS = 16  # attention heads of both towers of ViT-H/14: the one size a state dict does not show


def timestep_embedding(t: Tensor, dim: int = FREQUENCIES, max_period: float = MAX_PERIOD) -> Tensor:
    """Sinusoids "n dim" of timesteps [n], float32: cosines first, frequencies max_period^(−k / (dim / 2))."""
    half = dim // 2
    k = torch.arange(half, dtype=torch.float32, device=t.device)
    angle = t.float()[:, None] * torch.exp(-math.log(max_period) * k / half)
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


class TimestepEmbedder(nn.Module):
    """The timestep as a vector of the image tower's width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        """Vectors "n width"."""
        first: Any = self.mlp[0]
        return self.mlp(timestep_embedding(t).to(first.weight.dtype))


class StepAwareClip(nn.Module):
    """The parts of a CLIPModel, with adaLN in its image tower. Takes the CLIP's modules over, weights and all."""

    def __init__(self, clip: nn.Module, seed: int = 0) -> None:
        """`seed` draws the timestep MLP; all else starts as `clip`."""
        super().__init__()
        parts: Any = clip
        self.config: Any = parts.config
        self.logit_scale: nn.Parameter = parts.logit_scale
        self.text_model: Any = parts.text_model
        self.vision_model: Any = parts.vision_model
        self.text_projection: nn.Module = parts.text_projection
        self.visual_projection: nn.Module = parts.visual_projection
        width = self.config.vision_config.hidden_size
        self.t_embedder = TimestepEmbedder(width)
        generator = torch.Generator().manual_seed(seed)
        layer: Any
        for layer in (self.t_embedder.mlp[0], self.t_embedder.mlp[2]):
            nn.init.normal_(layer.weight, std=INIT_STD, generator=generator)
            nn.init.zeros_(layer.bias)
        for block in self.vision_model.encoder.layers:
            block.adaLN_modulation = _modulation(width, 6)
            shifts_scales_gates = block.adaLN_modulation[1].bias.data.view(6, width)
            shifts_scales_gates[2], shifts_scales_gates[5] = 1.0, 1.0
        self.vision_model.adaLN_modulation = _modulation(width, 2)

    def forward(self, pixels: Tensor, t: Tensor, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, ...]:
        """Unit vectors of images and of prompts and the factor on their cosine, float32; one call, as DDP needs it.

        Under autocast too: a cosine near .2 in bfloat16, times 100, would be wrong by .1.
        """
        images = nn.functional.normalize(self.image_features(pixels, t).float(), dim=-1)
        texts = nn.functional.normalize(self.text_features(input_ids, attention_mask).float(), dim=-1)
        return images, texts, self.logit_scale.exp()

    def image_features(self, pixels: Tensor, t: Tensor) -> Tensor:
        """Projections "n d" of normalised pixels "n 3 size size" seen at timesteps t [n]."""
        tower = self.vision_model
        c = self.t_embedder(t)
        x = tower.pre_layrnorm(tower.embeddings(pixels))  # the name is transformers' own
        for block in tower.encoder.layers:
            shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = block.adaLN_modulation(c)[:, None].chunk(6, dim=-1)
            inner = block.layer_norm1(x) * (1 + scale) + shift
            x = x + gate * block.self_attn(hidden_states=inner, attention_mask=None)[0]
            inner = block.layer_norm2(x) * (1 + mlp_scale) + mlp_shift
            x = x + mlp_gate * block.mlp(inner)
        shift, scale = tower.adaLN_modulation(c).chunk(2, dim=-1)
        pooled = tower.post_layernorm(x[:, 0]) * (1 + scale) + shift
        return self.visual_projection(pooled)

    def text_features(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Projections "n d" of tokenised prompts."""
        pooled = self.text_model(input_ids=input_ids, attention_mask=attention_mask).pooler_output
        return self.text_projection(pooled)


def _modulation(width: int, vectors: int) -> nn.Sequential:
    """SiLU and a linear that starts at zero."""
    linear = nn.Linear(width, vectors * width)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return nn.Sequential(nn.SiLU(), linear)


def step_aware_pixels(images: Tensor, size: int) -> Tensor:
    """CLIP pixels "n 3 size size" of images "n 3 h w" in [−1, 1], as the release prepares decoded x̂_0.

    Shorter side to `size` (bicubic, not antialiased), centre crop, clip, CLIP's mean and standard deviation.
    Differs from `preprocess.crop`, which is CLIP's own antialiased preparation, wherever images are resized.
    """
    height, width = images.shape[-2:]
    scale = size / min(height, width)
    height, width = int(height * scale + 0.5), int(width * scale + 0.5)
    resized = nn.functional.interpolate(images, (height, width), mode="bicubic", align_corners=False)
    top, left = round((height - size) / 2), round((width - size) / 2)
    pixels = (resized[..., top : top + size, left : left + size] / 2 + 0.5).clamp(0, 1)
    return (pixels - pixels.new_tensor(CLIP_MEAN).view(3, 1, 1)) / pixels.new_tensor(CLIP_STD).view(3, 1, 1)


def from_state_dict(state: dict[str, Tensor], config: Any | None = None, heads: int = HEADS) -> StepAwareClip:
    """The network behind a state dict in the release's layout, in float32.

    Without a CLIPConfig all sizes but the number of heads are read from the tensors. Raises ScorerError naming
    tensors that are missing or have no place.
    """
    from transformers import CLIPModel

    state = {name.removeprefix("model."): value.float() for name, value in state.items()}
    state = {name: value for name, value in state.items() if not name.endswith("position_ids")}  # a count, not a weight
    if config is None:
        try:
            config = _config(state, heads)
        except (KeyError, ValueError) as error:
            raise ScorerError(f"this is not a step-aware preference model's state dict: {error} is missing") from error
    model = StepAwareClip(CLIPModel(config))
    places = model.state_dict()
    missing, unexpected = sorted(places.keys() - state.keys()), sorted(state.keys() - places.keys())
    unlike = [f"{k} {tuple(v.shape)}" for k, v in state.items() if k in places and places[k].shape != v.shape]
    if missing or unexpected or unlike:
        raise ScorerError(
            f"this is not a step-aware preference model of this size: missing {missing[:4]}, "
            f"unexpected {unexpected[:4]}, of another shape {unlike[:4]}"
        )
    model.load_state_dict(state)
    return model


def _config(state: dict[str, Tensor], heads: int) -> Any:
    from transformers import CLIPConfig

    vision = "vision_model.embeddings.patch_embedding.weight"
    patch = state[vision].shape[-1]
    side = round((len(state["vision_model.embeddings.position_embedding.weight"]) - 1) ** 0.5)
    projection = len(state["visual_projection.weight"])
    text = {
        **_tower(state, "text_model", heads),
        "vocab_size": len(state["text_model.embeddings.token_embedding.weight"]),
        "max_position_embeddings": len(state["text_model.embeddings.position_embedding.weight"]),
        "projection_dim": projection,
        "eos_token_id": 2,  # as in the release's config: the text vector is read at the largest id, CLIP's end-of-text
    }
    picture = {
        **_tower(state, "vision_model", heads),
        "patch_size": patch,
        "image_size": patch * side,
        "projection_dim": projection,
    }
    return CLIPConfig(text_config=text, vision_config=picture, projection_dim=projection)


def _tower(state: dict[str, Tensor], name: str, heads: int) -> dict[str, Any]:
    layers = f"{name}.encoder.layers."
    inner, width = state[f"{layers}0.mlp.fc1.weight"].shape
    return {
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": 1 + max(int(k.removeprefix(layers).split(".")[0]) for k in state if k.startswith(layers)),
        "num_attention_heads": heads,
        "hidden_act": "gelu",
    }
