"""The base model of the world: SDXL's structure at 1.25 M parameters, trained from a seed on one CPU thread.

    python -m diffalign.world.base_model --out assets/world/base

Same parts as SDXL (two CLIP text encoders read at hidden_states[-2], pooled embedding, time ids, its noise schedule,
zeros as null prompt), so whatever trains or samples SDXL runs on it. The text encoders stay at their random start:
with one token per word every caption is already told apart, and its embeddings can be computed once.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from diffusers import DDIMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from diffalign.world import oracle
from diffalign.world.captions import TEMPLATES, caption, parse, prompts, splits, vocabulary
from diffalign.world.render import SIZE, render
from diffalign.world.sample import sample_pixels, with_seeds
from diffalign.world.vae import pixel_unshuffle_vae, to_latents

TOKENS = 16  # longest caption is 9 words and two ends
TEXT_DIM = 32  # of each text encoder, and of the pooled embedding
TIME_IDS = (SIZE, SIZE, 0, 0, SIZE, SIZE)  # original h w, crop top left, target h w
START, END = "<|startoftext|>", "<|endoftext|>"


@dataclass(frozen=True)
class Phase:
    """One cosine decay of the learning rate to 0, with a fresh optimizer; a later phase is a warm restart."""

    steps: int
    learning_rate: float


@dataclass(frozen=True)
class Recipe:
    """How the committed base was trained. Phase k starts from the averaged weights of the last and from seed + k."""

    seed: int = 0
    phases: tuple[Phase, ...] = (Phase(4000, 1e-3), Phase(2000, 4e-4))
    batch: int = 64
    warmup: int = 100  # steps of each phase
    ema_decay: float = 0.999
    null_prompt: float = 0.10  # half of it zeros, as SDXL's pipeline; half the encoded empty prompt


def scheduler() -> DDIMScheduler:
    """SDXL's noise schedule."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type="epsilon",
        timestep_spacing="leading",
        steps_offset=1,
        set_alpha_to_one=False,
        clip_sample=False,
    )


def tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer with one token per word of the world's captions, and letters for anything else."""
    return word_tokenizer(vocabulary(), TOKENS)


def word_tokenizer(vocabulary: Sequence[str], length: int) -> CLIPTokenizer:
    """A CLIP tokenizer for texts of `length` tokens: one for each word of `vocabulary`, letters for anything else.

    Raises RuntimeError when no order of the merges is found in which every word is one token.
    """
    words = sorted(vocabulary, key=lambda w: (-len(w), w))  # longest first: no merge of a short word breaks a long one
    for _ in range(len(words)):
        made = _tokenizer(words, length)
        broken = [w for w in words if len(made(w)["input_ids"]) != 3]
        if not broken:
            return made
        words = [*broken, *(w for w in words if w not in broken)]  # earlier merges win
    raise RuntimeError(f"these words are more than one token: {broken}; choose other words")


def _tokenizer(words: Sequence[str], length: int) -> CLIPTokenizer:
    """The tokenizer whose merges build the words from the left, those of earlier words first."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789.,!"
    merges = dict.fromkeys((w[:i], w[i] + ("</w>" if i == len(w) - 1 else "")) for w in words for i in range(1, len(w)))
    pieces = (*letters, *(c + "</w>" for c in letters), *(a + b for a, b in merges), START, END)
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "vocab.json").write_text(json.dumps(vocab))
        (Path(folder) / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
        return CLIPTokenizer.from_pretrained(folder, model_max_length=length, pad_token=END, unk_token=END)


def pipeline(seed: int) -> StableDiffusionXLPipeline:
    """An untrained pipeline of the world, random weights from `seed`."""
    torch.manual_seed(seed)
    words = tokenizer()
    encoders = text_encoders(words, TEXT_DIM)
    unet = sdxl_unet(TEXT_DIM, sample_size=SIZE // 2, channels=12, widths=(48, 64))
    return assembled(pixel_unshuffle_vae(), words, encoders, unet)


def text_encoders(words: CLIPTokenizer, dim: int) -> tuple[CLIPTextModel, CLIPTextModelWithProjection]:
    """SDXL's two text encoders, of two layers and width `dim`, with random weights that are not going to be trained."""
    config = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=dim,
        intermediate_size=2 * dim,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=words.model_max_length,
        projection_dim=dim,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )
    encoders = (CLIPTextModel(config), CLIPTextModelWithProjection(config))
    for name, weight in (item for e in encoders for item in e.named_parameters()):
        if "embedding" in name:  # CLIP's start (std 0.02) is for encoders that will be trained
            torch.nn.init.normal_(weight, std=1.0 if "token" in name else 0.5)
        if "text_projection" in name:
            torch.nn.init.orthogonal_(weight)
    return encoders


def sdxl_unet(text_dim: int, *, sample_size: int, channels: int, widths: tuple[int, ...]) -> UNet2DConditionModel:
    """A UNet of SDXL's structure: no attention at the highest resolution, cross-attention below it."""
    attending = len(widths) - 1
    return UNet2DConditionModel(
        sample_size=sample_size,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=widths,
        layers_per_block=1,
        down_block_types=("DownBlock2D", *["CrossAttnDownBlock2D"] * attending),
        up_block_types=(*["CrossAttnUpBlock2D"] * attending, "UpBlock2D"),
        norm_num_groups=16,
        cross_attention_dim=2 * text_dim,
        attention_head_dim=4,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=8 * len(TIME_IDS) + text_dim,
    )


def assembled(
    vae: Any,
    words: CLIPTokenizer,
    encoders: tuple[CLIPTextModel, CLIPTextModelWithProjection],
    unet: UNet2DConditionModel,
) -> StableDiffusionXLPipeline:
    """The parts as an SDXL pipeline with SDXL's noise schedule and zeros as null prompt."""
    return StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=encoders[0].eval(),
        text_encoder_2=encoders[1].eval(),
        tokenizer=words,
        tokenizer_2=words,
        unet=unet.eval(),
        scheduler=scheduler(),
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )


@torch.no_grad()
def embed(pipe: StableDiffusionXLPipeline, texts: list[str]) -> tuple[Tensor, Tensor]:
    """Prompt embeddings [n tokens dim] and pooled embeddings [n dim] of the texts, the empty text included."""
    embeds, _, pooled, _ = pipe.encode_prompt(texts, device="cpu", do_classifier_free_guidance=False)
    return embeds, pooled


def train(pipe: StableDiffusionXLPipeline, recipe: Recipe) -> None:
    """Trains `pipe.unet` on renders of the training combinations and leaves its moving average in place."""
    for index, phase in enumerate(recipe.phases):
        _train_phase(pipe, recipe, phase, recipe.seed + index)


def _train_phase(pipe: StableDiffusionXLPipeline, recipe: Recipe, phase: Phase, seed: int) -> None:
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    combinations = splits()["train"]
    embeds, pooled = embed(pipe, [caption(c, k) for c in combinations for k in range(len(TEMPLATES))] + [""])
    embeds, pooled = (
        torch.cat([embeds, torch.zeros_like(embeds[:1])]),
        torch.cat([pooled, torch.zeros_like(pooled[:1])]),
    )
    empty = len(embeds) - 2  # and the zeros after it

    unet, average = pipe.unet.train(), copy.deepcopy(pipe.unet)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=phase.learning_rate, weight_decay=0.01)
    alphas = pipe.scheduler.alphas_cumprod
    time_ids = torch.tensor([TIME_IDS], dtype=torch.float32).expand(recipe.batch, -1)
    began, losses = time.monotonic(), []
    for step in range(phase.steps):
        for group in optimizer.param_groups:
            rise = min(1.0, (step + 1) / recipe.warmup)
            group["lr"] = phase.learning_rate * rise * 0.5 * (1 + math.cos(math.pi * step / phase.steps))

        chosen = rng.integers(0, len(combinations), recipe.batch)
        pictures = torch.from_numpy(render([combinations[i] for i in chosen], rng))
        x0 = to_latents(pipe.vae, pictures.permute(0, 3, 1, 2) / 127.5 - 1)
        number = chosen * len(TEMPLATES) + rng.integers(0, len(TEMPLATES), recipe.batch)
        null = rng.random(recipe.batch) < recipe.null_prompt
        prompt = torch.from_numpy(np.where(null, empty + rng.integers(0, 2, recipe.batch), number))
        # One t in each of `batch` equal strata: the same average loss with less noise.
        t = ((torch.randperm(recipe.batch) + torch.rand(recipe.batch)) * (len(alphas) / recipe.batch)).long()
        noise = torch.randn_like(x0)
        a = alphas[t, None, None, None]
        xt = a.sqrt() * x0 + (1 - a).sqrt() * noise
        conditions = {"text_embeds": pooled[prompt], "time_ids": time_ids}
        prediction = unet(xt, t, embeds[prompt], added_cond_kwargs=conditions).sample
        loss = (prediction - noise).pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()

        decay = min(recipe.ema_decay, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(unet.parameters()), 1 - decay)
        losses.append(loss.item())
        if (step + 1) % 250 == 0:
            recent = float(np.mean(losses[-250:]))
            print(f"step {step + 1}/{phase.steps}  loss {recent:.4f}  {time.monotonic() - began:.0f} s", flush=True)
    unet.load_state_dict(average.state_dict())
    unet.eval()


def save(pipe: StableDiffusionXLPipeline, folder: Path) -> None:
    """Write the pipeline; the UNet in float16 (half the size, no loss measured), the small parts in float32."""
    pipe.unet.half()
    pipe.save_pretrained(folder)
    pipe.unet.float()


def measure(pipe: StableDiffusionXLPipeline, split: str = "heldout", seeds: int = 12) -> dict[str, float]:
    """Accuracy and reward of samples for the combinations of a split, `seeds` images each."""
    texts, numbers = with_seeds(prompts(split), seeds)
    wanted = [parse(text) for text in texts]
    figures: dict[str, float] = {}
    for guidance in (1.0, 2.5, 5.0):
        reading = oracle.read(sample_pixels(pipe, texts, numbers, guidance=guidance))
        figures |= {
            f"accuracy at guidance {guidance}": round(oracle.accuracy(reading, wanted).mean().item(), 4),
            f"reward at guidance {guidance}": round(oracle.reward(reading, wanted).mean().item(), 4),
        }
    return figures


def build(folder: Path, recipe: Recipe) -> dict[str, float]:
    """Train by the recipe, write the pipeline and RECIPE.json into `folder`, and return the figures measured."""
    pipe = pipeline(recipe.seed)
    train(pipe, recipe)
    save(pipe, folder)
    figures = measure(StableDiffusionXLPipeline.from_pretrained(folder))
    made = {
        "command": f"python -m diffalign.world.base_model --out {folder.as_posix()} --seed {recipe.seed}",
        "recipe": asdict(recipe),
        "unet parameters": sum(p.numel() for p in pipe.unet.parameters()),
        "heldout, 24 combinations x 12 seeds, 20 DDIM steps": figures,
        "versions": {m.__name__: m.__version__ for m in (torch, diffusers, transformers, np)},
    }
    (folder / "RECIPE.json").write_text(json.dumps(made, indent=2) + "\n")
    return figures


def main() -> None:
    """Command line of this module."""
    parser = argparse.ArgumentParser(
        prog="python -m diffalign.world.base_model", description="train the embedded world's base"
    )
    parser.add_argument("--out", required=True, type=Path, help="folder of the pipeline")
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # one thread: the same sums everywhere, and no fight over a shared machine
    figures = build(arguments.out, Recipe(seed=arguments.seed))
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
