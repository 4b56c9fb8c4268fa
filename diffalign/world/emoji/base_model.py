"""The base model of the emoji world: SDXL's structure at about 5 M parameters, trained from a seed on one CPU thread.

    python -m diffalign.world.emoji.base_model --out assets/emoji/base

As in SDXL: two CLIP text encoders read at hidden_states[-2], pooled embedding, time ids, noise schedule, zeros as null
prompt. The text encoders stay at their random start: with one token per word every caption is already told apart, and
its embeddings can be computed once.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import diffusers
import numpy as np
import torch
import transformers
from diffusers import StableDiffusionXLPipeline
from torch import Tensor
from transformers import CLIPTokenizer

from diffalign.world.base_model import assembled, embed, sdxl_unet, text_encoders, word_tokenizer
from diffalign.world.emoji import reward
from diffalign.world.emoji.captions import (
    BACKGROUNDS,
    STYLES,
    TEMPLATES,
    THINGS,
    Combination,
    caption,
    combinations,
    parse,
    prompts,
    vocabulary,
)
from diffalign.world.emoji.render import SIZE, draw_looks, paint
from diffalign.world.emoji.vae import CHANNELS, fitted_vae, to_latents, to_pixels
from diffalign.world.sample import sample_pixels, with_seeds

TOKENS = 12  # longest caption is 9 words and two ends
TEXT_DIM = 64  # of each text encoder, and of the pooled embedding
TIME_IDS = (SIZE, SIZE, 0, 0, SIZE, SIZE)  # original h w, crop top left, target h w
WIDTHS = (48, 96, 128)
NOISIEST = 900  # timestep


@dataclass(frozen=True)
class Phase:
    """A part of the training, with a fresh optimizer."""

    steps: int
    rate: tuple[tuple[int, float], ...]  # (step, share of the learning rate), straight lines between
    noise_alone: float = 0.0  # share of inputs at t >= NOISIEST that are noise alone
    x0_weight: float = 0.0  # of the error of the image that a prediction implies, beside that of the noise


PHASES = (
    Phase(6000, ((0, 1.0),)),
    # Lowered twice by hand, as the machine was slower than planned: those two steps are known to within 20.
    Phase(
        1200,
        ((0, 1.0), (260, 1.0), (261, 0.5), (420, 0.43), (421, 0.31), (1200, 0.0)),
        noise_alone=0.5,
        x0_weight=0.1,
    ),
)


@dataclass(frozen=True)
class Recipe:
    """How the committed base was trained. Phase k starts from the averaged weights of the last and from seed + k.

    SDXL's schedule leaves some of the image in the noisiest latents, and a model learns to read the mean colour there
    (arXiv 2305.08891). Sampling starts from noise alone, so backgrounds and things turn grey. The second phase corrects
    that: half of its noisiest inputs are noise alone, and errors of the image count at high noise too.
    """

    seed: int = 0
    phases: tuple[Phase, ...] = PHASES
    batch: int = 16
    learning_rate: float = 1e-3
    warmup: int = 100  # steps of each phase
    ema_decay: float = 0.998
    null_prompt: float = 0.10  # half of it zeros, as SDXL's pipeline; half the encoded empty prompt
    named_style: float = 0.6  # share of captions that name the style
    min_snr: float = 5.0  # the noise error's weight is min(SNR, this) / SNR (Min-SNR, arXiv 2303.09556)


def tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer with one token per word of this world's captions, and letters for anything else."""
    return word_tokenizer(vocabulary(), TOKENS)


def pipeline(seed: int) -> StableDiffusionXLPipeline:
    """An untrained pipeline of this world, random weights from `seed`."""
    words = tokenizer()
    vae = fitted_vae()
    torch.manual_seed(seed)
    encoders = text_encoders(words, TEXT_DIM)
    return assembled(vae, words, encoders, sdxl_unet(TEXT_DIM, sample_size=SIZE // 4, channels=CHANNELS, widths=WIDTHS))


class _Batches:
    """Latents and the embeddings of their captions, drawn from renders of the training combinations."""

    def __init__(self, pipe: StableDiffusionXLPipeline, recipe: Recipe, seed: int) -> None:
        self.vae, self.recipe, self.rng = pipe.vae, recipe, np.random.default_rng(seed)
        self.known = combinations("train")
        texts = [
            caption(c._replace(style=style), k)
            for c in self.known
            for style in (*STYLES, None)
            for k in range(len(TEMPLATES))
        ]
        embeds, pooled = embed(pipe, [*texts, ""])
        self.embeds = torch.cat([embeds, torch.zeros_like(embeds[:1])])
        self.pooled = torch.cat([pooled, torch.zeros_like(pooled[:1])])
        self.empty = len(texts)  # the encoded empty text, and zeros after it

    def draw(self) -> tuple[Tensor, Tensor, Tensor]:
        """Latents "b 12 16 16", prompt embeddings "b tokens dim", pooled embeddings "b dim"."""
        rng, batch = self.rng, self.recipe.batch
        chosen = rng.integers(0, len(self.known), batch)
        wanted: list[Combination] = [self.known[i] for i in chosen]
        looks = draw_looks(wanted, rng)
        style = np.where(rng.random(batch) < self.recipe.named_style, looks.style, len(STYLES))
        number = (chosen * (len(STYLES) + 1) + style) * len(TEMPLATES) + rng.integers(0, len(TEMPLATES), batch)
        null = rng.random(batch) < self.recipe.null_prompt
        prompt = torch.from_numpy(np.where(null, self.empty + rng.integers(0, 2, batch), number))
        return to_latents(self.vae, to_pixels(paint(wanted, looks))), self.embeds[prompt], self.pooled[prompt]


def train(pipe: StableDiffusionXLPipeline, recipe: Recipe, checkpoints: Path | None = None) -> None:
    """Trains `pipe.unet` on renders of the training combinations and leaves its moving average in place.

    With `checkpoints` the average of every 500th step is written into that folder, as float16 weights.
    """
    for index, phase in enumerate(recipe.phases):
        folder = None if checkpoints is None else checkpoints / f"phase_{index}"
        _train_phase(pipe, recipe, phase, recipe.seed + index, folder)


def _train_phase(
    pipe: StableDiffusionXLPipeline, recipe: Recipe, phase: Phase, seed: int, checkpoints: Path | None
) -> None:
    batches = _Batches(pipe, recipe, seed)
    torch.manual_seed(seed)
    unet, average = pipe.unet.train(), copy.deepcopy(pipe.unet)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=recipe.learning_rate, weight_decay=0.01)
    alphas = pipe.scheduler.alphas_cumprod
    time_ids = torch.tensor([TIME_IDS], dtype=torch.float32).expand(recipe.batch, -1)
    began, losses = time.monotonic(), []
    for step in range(phase.steps):
        for group in optimizer.param_groups:
            share = float(np.interp(step, [at for at, _ in phase.rate], [share for _, share in phase.rate]))
            group["lr"] = recipe.learning_rate * min((step + 1) / recipe.warmup, share)
        x0, embeds, pooled = batches.draw()
        # One t in each of `batch` equal strata: the same average loss with less noise.
        t = ((torch.randperm(recipe.batch) + torch.rand(recipe.batch)) * (len(alphas) / recipe.batch)).long()
        noise = torch.randn_like(x0)
        a = alphas[t, None, None, None]
        xt = a.sqrt() * x0 + (1 - a).sqrt() * noise
        if phase.noise_alone:
            alone = (t >= NOISIEST) & (torch.rand(recipe.batch) < phase.noise_alone)
            xt[alone] = torch.randn_like(xt[alone])
            noise = (xt - a.sqrt() * x0) / (1 - a).sqrt()  # what makes x0 the image that xt and the noise imply
        conditions = {"text_embeds": pooled, "time_ids": time_ids}
        prediction = unet(xt, t, embeds, added_cond_kwargs=conditions).sample
        snr = alphas[t] / (1 - alphas[t])
        weight = (snr.clamp(max=recipe.min_snr) + phase.x0_weight) / snr
        loss = ((prediction - noise).pow(2).mean((1, 2, 3)) * weight).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()

        decay = min(recipe.ema_decay, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(unet.parameters()), 1 - decay)
        losses.append(loss.item())
        if (step + 1) % 100 == 0:
            recent = float(np.mean(losses[-100:]))
            print(f"step {step + 1}/{phase.steps}  loss {recent:.4f}  {time.monotonic() - began:.0f} s", flush=True)
        if checkpoints is not None and (step + 1) % 500 == 0:
            copy.deepcopy(average).half().save_pretrained(checkpoints / f"step_{step + 1}")
    unet.load_state_dict(average.half().state_dict())  # float16, as phases and the folder store it
    unet.eval()


def save(pipe: StableDiffusionXLPipeline, folder: Path) -> None:
    """Writes the pipeline; the UNet in float16 (half the size), the small parts in float32."""
    pipe.unet.half()
    pipe.save_pretrained(folder)
    pipe.unet.float()


def measure(pipe: StableDiffusionXLPipeline, split: str = "heldout", seeds: int = 8) -> dict[str, float]:
    """Shares and means over `seeds` samples of each combination of a split (20 DDIM steps, guidance 5)."""
    texts, numbers = with_seeds(prompts(split), seeds)
    wanted = [parse(text) for text in texts]
    reading = reward.read(sample_pixels(pipe, texts, numbers))
    thing = reading.thing.argmax(1) == torch.tensor([THINGS.index(c.thing) for c in wanted])
    background = reading.background.argmax(1) == torch.tensor([BACKGROUNDS.index(c.background) for c in wanted])
    figures = {
        "thing": thing.float(),
        "background": background.float(),
        "accuracy": reward.accuracy(reading, wanted),
        **{style: reading.style[:, k] for k, style in enumerate(STYLES)},
        "vividness": reading.vividness,
        "sharpness": reading.sharpness,
        "unevenness": reading.unevenness,
        "reward": reward.reward(reading, wanted),
    }
    return {name: round(values.mean().item(), 4) for name, values in figures.items()}


def build(folder: Path, recipe: Recipe, checkpoints: Path | None = None) -> dict[str, float]:
    """Trains by the recipe, writes the pipeline and RECIPE.json into `folder`, and returns the figures measured."""
    began = time.monotonic()
    pipe = pipeline(recipe.seed)
    train(pipe, recipe, checkpoints)
    minutes = (time.monotonic() - began) / 60
    save(pipe, folder)
    return describe(folder, recipe, minutes)


def describe(folder: Path, recipe: Recipe, minutes: float) -> dict[str, float]:
    """Measures the pipeline in `folder` and writes RECIPE.json beside it; returns the figures."""
    pipe = StableDiffusionXLPipeline.from_pretrained(folder)
    figures = measure(pipe)
    made = {
        "command": "python -m diffalign.world.emoji.base_model --out assets/emoji/base",
        "recipe": asdict(recipe),
        "unet parameters": sum(p.numel() for p in pipe.unet.parameters()),
        "minutes of training, one thread of a shared machine": round(minutes),
        "heldout, 24 combinations x 8 seeds": figures,
        "versions": {m.__name__: m.__version__ for m in (torch, diffusers, transformers, np)},
    }
    (folder / "RECIPE.json").write_text(json.dumps(made, indent=2) + "\n")
    return figures


def main() -> None:
    """Command line of this module."""
    parser = argparse.ArgumentParser(
        prog="python -m diffalign.world.emoji.base_model", description="train the emoji world's base"
    )
    parser.add_argument("--out", required=True, type=Path, help="folder of the pipeline")
    parser.add_argument("--checkpoints", type=Path, help="folder for the weights of every 500th step")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # one thread: the same sums everywhere, and no fight over a shared machine
    print(json.dumps(build(arguments.out, Recipe(), arguments.checkpoints), indent=2))


if __name__ == "__main__":
    main()
