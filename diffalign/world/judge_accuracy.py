"""How often a scorer of intermediate images prefers the image with the higher true reward, by timestep.

    python -m diffalign.world.judge_accuracy world-step-aware pickscore=assets/world/judge/clip world

Pairs of renders of held-out captions are noised to t with one noise for both sides, the base predicts x̂_0 with
guidance, and the judge sees the decoded images; a judge of noisy latents sees x_t. The truth is the oracle's reward of
the clean renders; the oracle itself may be asked about the decoded images too (`world`): what a judge that ignores t
can get out of them.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffalign.engine.measure import guided
from diffalign.models.loading.base import Base, load_base
from diffalign.models.loading.decoder import decode_latents
from diffalign.models.loading.encoder import Encoder
from diffalign.models.policy.networks import Networks
from diffalign.rewards import DEFAULT_TIE, LatentScorer, StepAwareScorer, as_step_aware, load_judge
from diffalign.types import Conditioning
from diffalign.world import base_path, oracle
from diffalign.world.captions import TEMPLATES, caption, splits
from diffalign.world.render import SIZE, render
from diffalign.world.sample import GUIDANCE

TIMESTEPS = (0, 125, 250, 375, 500, 625, 750, 875, 999)
BATCH = 128  # pairs in one forward of the base


@dataclass(frozen=True)
class HeldOut:
    """Pairs of clean renders of held-out captions with a clear difference in true reward."""

    captions: list[str]
    pixels: Tensor  # "side pair 3 16 16" in [-1, 1]
    first_is_better: Tensor  # bool [pair]


def held_out_pairs(n: int, seed: int = 0) -> HeldOut:
    """`n` pairs, less those whose rewards differ by less than the scorers' tie."""
    rng = np.random.default_rng([seed, n])
    combinations = splits()["heldout"]
    wanted = [combinations[i % len(combinations)] for i in range(n)]
    pictures = np.stack([render(wanted, rng) for _ in range(2)])  # side pair 16 16 3
    rewards = torch.stack([oracle.reward(oracle.read(torch.from_numpy(side)), wanted) for side in pictures])
    clear = (rewards[0] - rewards[1]).abs() >= DEFAULT_TIE
    pixels = torch.from_numpy(pictures).permute(0, 1, 4, 2, 3).float() / 127.5 - 1
    captions = [caption(combination, i // len(combinations) % len(TEMPLATES)) for i, combination in enumerate(wanted)]
    kept = [text for text, keep in zip(captions, clear.tolist(), strict=True) if keep]
    return HeldOut(kept, pixels[:, clear], (rewards[0] > rewards[1])[clear])


@torch.no_grad()
def noisy_latents(base: Base, pairs: HeldOut, t: int, seed: int = 0) -> Tensor:
    """x_t "side pair c h w", one noise for both sides; it depends on seed and t."""
    encoder = Encoder(base)
    generator = torch.Generator().manual_seed(1000 * seed + t)
    made = []
    for start in range(0, len(pairs.captions), BATCH):
        pixels = pairs.pixels[:, start : start + BATCH]
        latents = encoder.moments(pixels.flatten(0, 1)).chunk(2, dim=1)[0].unflatten(0, (2, -1))
        noise = torch.randn(latents.shape[1:], generator=generator).expand_as(latents)
        made.append(base.schedule.add_noise(latents, noise, torch.full(latents.shape[:2], t)))
    return torch.cat(made, dim=1)


@torch.no_grad()
def intermediate_images(base: Base, pairs: HeldOut, t: int, seed: int = 0) -> list[Image.Image]:
    """Decoded x̂_0 at timestep t, first sides and then second sides; the noise depends on seed and t."""
    encoder = Encoder(base)
    networks = Networks(base.unet, family=base.family, schedule=base.schedule)
    made: list[list[Tensor]] = [[], []]
    everything = noisy_latents(base, pairs, t, seed)
    for start in range(0, len(pairs.captions), BATCH):
        part = slice(start, start + BATCH)
        xt = everything[:, part].flatten(0, 1)
        times = torch.full((len(xt),), t)
        cond = _conditioning(encoder, pairs.captions[part] * 2)
        null = _conditioning(encoder, [""] * len(xt))
        x0 = base.schedule.to_x0(guided(networks.policy, xt, times, cond, GUIDANCE, null), xt, times)
        assert base.vae is not None, "the encoder has encoded with it"
        for side, pictures in zip(made, decode_latents(base.vae, x0).chunk(2), strict=True):
            side.append(pictures)
    values = torch.cat(made[0] + made[1]).clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)
    return [Image.fromarray(picture) for picture in values.permute(0, 2, 3, 1).numpy()]


def _conditioning(encoder: Encoder, prompts: Sequence[str]) -> Conditioning:
    text = encoder.prompts(prompts)
    geometry = torch.tensor([[SIZE, SIZE, 0, 0, SIZE, SIZE]]).expand(len(prompts), -1)
    return Conditioning(text.prompt_embeds, text.pooled, encoder.time_ids(geometry))


def accuracy_at(judge: StepAwareScorer, pairs: HeldOut, pictures: Sequence[Image.Image], t: int) -> float:
    """Share of pairs whose truly better side gets the higher score at timestep t."""
    scores = judge.score(pictures, pairs.captions * 2, torch.full((len(pictures),), t)).unflatten(0, (2, -1))
    return ((scores[0] > scores[1]) == pairs.first_is_better).float().mean().item()


def latent_accuracy_at(judge: LatentScorer, pairs: HeldOut, xt: Tensor, t: int) -> float:
    """The same of a judge of noisy latents, which sees x_t "side pair c h w"."""
    times = torch.full((len(pairs.captions),), t)
    scores = torch.stack([judge.score_latents(side, pairs.captions, times) for side in xt])
    return ((scores[0] > scores[1]) == pairs.first_is_better).float().mean().item()


def main() -> None:
    """Command line of this module."""
    parser = argparse.ArgumentParser(
        prog="python -m diffalign.world.judge_accuracy", description="accuracy by timestep"
    )
    parser.add_argument("scorer", nargs="+", help="`diffalign list scorers`")
    parser.add_argument("--timesteps", nargs="+", type=int, default=TIMESTEPS)
    parser.add_argument("--pairs", type=int, default=1024)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    judges = [load_judge(name) for name in arguments.scorer]
    base, pairs = load_base(str(base_path())), held_out_pairs(arguments.pairs, arguments.seed)
    print(f"{len(pairs.captions)} pairs of held-out captions")
    print("   t  " + "  ".join(arguments.scorer))
    for t in arguments.timesteps:
        xt = noisy_latents(base, pairs, t, arguments.seed)
        pictures = intermediate_images(base, pairs, t, arguments.seed)
        row = [
            latent_accuracy_at(judge, pairs, xt, t)
            if isinstance(judge, LatentScorer)
            else accuracy_at(as_step_aware(judge), pairs, pictures, t)
            for judge in judges
        ]
        print(
            f"{t:4d}  " + "  ".join(f"{a:{max(len(name), 4)}.3f}" for a, name in zip(row, arguments.scorer)), flush=True
        )


if __name__ == "__main__":
    main()
