"""Invert an image: find the noisy latent from which deterministic DDIM sampling generates it, then sample back.

    python examples/invert_an_image.py

The round trip is more precise with more steps, because a step of DDIM inversion is an Euler step of an ODE.
"""

from collections.abc import Sequence

import torch
from diffusers import StableDiffusionXLPipeline

from diffalign import NoiseSchedule
from diffalign.engine import ddim
from diffalign.world import base_path
from diffalign.world.base_model import TIME_IDS, embed
from diffalign.world.pairs import PairRecipe, make_pairs
from diffalign.world.vae import to_latents


@torch.no_grad()
def main(strides: Sequence[int] = (100, 25), t: int = 699) -> dict[int, float]:
    """Root-mean-square error of the latents after the round trip to timestep `t`, by the width of the steps in t."""
    pipe = StableDiffusionXLPipeline.from_pretrained(base_path())
    schedule = NoiseSchedule.from_diffusers(pipe.scheduler)
    pair = make_pairs(PairRecipe(n=1, seed=0))[0]
    pixels = torch.from_numpy(pair.pictures[0]).permute(2, 0, 1)[None] / 127.5 - 1  # "n c h w" in [-1, 1]
    embeds, pooled = embed(pipe, [pair.caption])
    added = {"text_embeds": pooled, "time_ids": torch.tensor([TIME_IDS], dtype=torch.float32)}

    def eps(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return pipe.unet(x, t, embeds, added_cond_kwargs=added).sample

    x0 = to_latents(pipe.vae, pixels)
    errors = {}
    for stride in strides:
        x = ddim.invert(schedule, eps, x0, torch.tensor([t]), stride=stride)
        for level in range(t, -1, -stride):
            now, below = torch.tensor([level]), torch.tensor([level - stride])
            x = ddim.step(schedule, eps(x, now), x, now, below).prev
        errors[stride] = float((x - x0).square().mean().sqrt())
    return errors


if __name__ == "__main__":
    for stride, error in main().items():
        print(f"steps of {stride:>3} in t: error {error:.4f}")
