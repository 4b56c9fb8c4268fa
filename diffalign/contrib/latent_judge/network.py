"""The latent reward model (LRM) of LPO: a UNet's down and middle blocks score a noisy latent x_t at its timestep t.

    h_1 … h_S   = mean over h, w of the last layer of each down block, before its downsampler
    h_mid       = the same of the middle block;  guided: h_mid(null) + g·(h_mid(prompt) − h_mid(null))
    image       = normalise(V · [h_1, …, h_S, h_mid])
    text        = normalise(the pooled text embedding; SD: times CLIP's text projection, SDXL: as encoder 2 gives it)
    score       = exp(logit_scale) · cos(image, text)

The guidance of h_mid is the paper's visual feature enhancement; as in its release, the other features are the prompt's
alone. No decoder, no x̂_0 and no up block takes part. For SD1.5 h has 320 + 640 + 1280 + 1280 + 1280 = 4800 numbers,
for SDXL 320 + 640 + 1280 + 1280 = 3520.

Source: LPO (Zhang et al., arXiv 2502.01051) and its release (Kwai-Kolors/LPO), `sd15_preference_model.py` and
`sdxl_base_preference_model.py`. Trained are UNet, text encoders, projections and logit_scale, as there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from diffalign.models.loading.modules import TextModel, UNet

LOGIT_SCALE = math.log(1 / 0.07)  # at the start, as CLIP's and the release's
INIT_STD = 0.02  # of the visual projection, the release's
LATER_HALF = ("up_blocks.", "conv_norm_out.", "conv_out.")  # names of the UNet's tensors that take no part


class LatentJudge(nn.Module):
    """The network, with the text encoders that it reads prompts by."""

    def __init__(self, unet: UNet, text_models: Sequence[TextModel], guidance: float, seed: int = 0) -> None:
        """Takes the modules over, and removes the UNet's later half. `seed` draws the visual projection.

        SD's text projection starts as the identity; `set_text_projection` replaces it.
        """
        super().__init__()
        self.unet = first_half(unet)
        self.text_encoders = nn.ModuleList(text_models)
        self.guidance = guidance
        width = int(text_models[-1].config.hidden_size)
        self.text_projection: nn.Linear | None = None
        if self.family == "sd":
            self.text_projection = nn.Linear(width, width, bias=False)
            nn.init.eye_(self.text_projection.weight)
        else:
            width = int(text_models[-1].config.projection_dim)
        self.visual_projection = nn.Linear(feature_width(unet), width, bias=False)
        nn.init.normal_(self.visual_projection.weight, std=INIT_STD, generator=torch.Generator().manual_seed(seed))
        self.logit_scale = nn.Parameter(torch.tensor(LOGIT_SCALE))

    @property
    def family(self) -> str:
        """sd or sdxl."""
        return "sd" if len(self.text_encoders) == 1 else "sdxl"

    def unused(self) -> list[nn.Parameter]:
        """Parameters that no score depends on: SDXL conditions on the last but one layer of its first text encoder."""
        if self.family == "sd":
            return []
        first: Any = self.text_encoders[0]
        late = (f"layers.{first.config.num_hidden_layers - 1}.", "final_layer_norm.")
        return [p for name, p in first.named_parameters() if any(part in name for part in late)]

    def forward(self, latents: Tensor, t: Tensor, ids: Sequence[Tensor], of: Tensor, time_ids: Tensor | None) -> Tensor:
        """Scores float32 [n] of latents "n c h w" at t [n]; one call, as DDP needs it.

        ids: of each text encoder the tokens "prompt tokens", the null prompt's last. of: int64 [n], the prompt of each
        latent. time_ids: SDXL's [6] numbers, None for SD.
        """
        return self.score(latents, t, self.text(ids), of, time_ids)

    def text(self, ids: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Of each prompt: states "prompt tokens d" and pooled "prompt d" for the UNet, and the vector that is compared.

        Vectors are "prompt d", of length one, float32.
        """
        if self.text_projection is not None:
            out = self.text_encoders[0](ids[0])
            states, pooled = out[0], out.pooler_output
            vectors = self.text_projection(pooled)
        else:
            both = zip(self.text_encoders, ids, strict=True)
            outs = [model(tokens, output_hidden_states=True) for model, tokens in both]
            states = torch.cat([out.hidden_states[-2] for out in outs], dim=-1)
            pooled = vectors = outs[-1][0]
        return states, pooled, _unit(vectors)

    def score(
        self, latents: Tensor, t: Tensor, text: tuple[Tensor, Tensor, Tensor], of: Tensor, time_ids: Tensor | None
    ) -> Tensor:
        """exp(logit_scale) · cos, float32 [n], with `text` from `text`."""
        states, pooled, vectors = text
        guided = self.guidance != 1.0
        rows = torch.cat([of, torch.full_like(of, len(states) - 1)]) if guided else of
        x, times = (torch.cat([value, value]) if guided else value for value in (latents, t))
        added = None if time_ids is None else {"text_embeds": pooled[rows], "time_ids": time_ids.expand(len(rows), -1)}
        stages = pooled_stages(self.unet, x.to(states.dtype), times, states[rows], added)
        if guided:
            n = len(latents)
            null = stages[-1][n:]
            stages = [stage[:n] for stage in stages]
            stages[-1] = null + self.guidance * (stages[-1] - null)
        vision = _unit(self.visual_projection(torch.cat(stages, dim=-1)))
        return self.logit_scale.exp() * (vision * vectors[of]).sum(-1)


def _unit(vectors: Tensor) -> Tensor:
    """Vectors of length one, at least float32 also under autocast: a cosine in bfloat16 is wrong by .004."""
    return nn.functional.normalize(vectors.to(torch.promote_types(vectors.dtype, torch.float32)), dim=-1)


def feature_width(unet: UNet) -> int:
    """Numbers in the features of one latent: the channels of every down block and of the middle block."""
    channels = [int(c) for c in unet.config.block_out_channels]
    return sum(channels) + channels[-1]


def first_half(unet: UNet) -> UNet:
    """The UNet without its up blocks and output layers, which are removed from it."""
    whole: Any = unet
    whole.up_blocks, whole.conv_norm_out, whole.conv_out = nn.ModuleList(), None, None
    return unet


def pooled_stages(unet: Any, x: Tensor, t: Tensor, states: Tensor, added: dict[str, Tensor] | None) -> list[Tensor]:
    """Features "n c" of each down block and, last, of the middle block: means over height and width.

    x "n c h w" at t [n] under the text states "n tokens d"; `added`: SDXL's pooled text and time ids.
    """
    emb = unet.time_embedding(unet.get_time_embed(sample=x, timestep=t))
    extra = unet.get_aug_embed(emb=emb, encoder_hidden_states=states, added_cond_kwargs=added)
    emb = emb if extra is None else emb + extra
    if unet.time_embed_act is not None:
        emb = unet.time_embed_act(emb)
    x = unet.conv_in(2 * x - 1 if unet.config.center_input_sample else x)
    found = []
    for block in unet.down_blocks:
        text = {"encoder_hidden_states": states} if getattr(block, "has_cross_attention", False) else {}
        x, layers = block(hidden_states=x, temb=emb, **text)
        found.append(layers[len(block.resnets) - 1])
    middle = {"encoder_hidden_states": states} if getattr(unet.mid_block, "has_cross_attention", False) else {}
    found.append(unet.mid_block(x, emb, **middle))
    return [features.mean(dim=(2, 3)) for features in found]
