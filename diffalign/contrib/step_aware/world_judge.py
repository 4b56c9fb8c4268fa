"""The world's preference models: a small CLIP trained on labelled pairs, and the step-aware model that started from it.

    python -m diffalign.contrib.step_aware.world_judge clip --out assets/world/judge/clip
    diffalign data world runs/world/judge_pairs.parquet --pairs 32768 --seed 1
    diffalign train training_configs/world/step_aware.yaml output_dir=runs/world/judge
        data.path=runs/world/judge_pairs.parquet training.max_train_steps=1500
    python -m diffalign.contrib.step_aware.world_judge pack --run runs/world/judge --out assets/world/judge/step_aware

The CLIP is to the world what PickScore is to photographs: it learns from nothing but which of two
images was preferred. Captions are of training combinations; every step sees new pairs.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from diffalign.contrib.step_aware.clip import step_aware_pixels
from diffalign.contrib.step_aware.loss import preference_loss
from diffalign.contrib.step_aware.scorer import load_step_aware, save_step_aware
from diffalign.world import base_path
from diffalign.world.base_model import TOKENS
from diffalign.world.pairs import Pair, PairRecipe, make_pairs
from diffalign.world.render import SIZE

WIDTH = 64  # of both towers and of the common space
PATCH = 4  # pixels


@dataclass(frozen=True)
class ClipRecipe:
    """How the committed CLIP was trained."""

    seed: int = 0
    steps: int = 3000
    batch: int = 128  # pairs, new ones at every step
    learning_rate: float = 1e-3  # at its height; cosine to 0
    warmup: int = 100  # steps
    weight_decay: float = 0.05
    max_grad_norm: float = 1.0


def words() -> Any:
    """The world's tokenizer: one token per word."""
    return CLIPTokenizer.from_pretrained(base_path() / "tokenizer")


def untrained(seed: int) -> CLIPModel:
    """A CLIP of the world's size, random weights from `seed`."""
    vocabulary = words()
    tower = {"hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_attention_heads": 4, "projection_dim": WIDTH}
    ends = {name: getattr(vocabulary, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    torch.manual_seed(seed)
    return CLIPModel(
        CLIPConfig(
            text_config={
                **tower,
                **ends,
                "num_hidden_layers": 2,
                "vocab_size": len(vocabulary),
                "max_position_embeddings": TOKENS,
            },
            vision_config={**tower, "num_hidden_layers": 4, "image_size": SIZE, "patch_size": PATCH},
            projection_dim=WIDTH,
        )
    )


def train_clip(recipe: ClipRecipe) -> CLIPModel:
    """A CLIP that scores the preferred image of training pairs higher."""
    clip, vocabulary = untrained(recipe.seed).train(), words()
    decayed = [p for p in clip.parameters() if p.ndim > 1]
    optimizer = torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": recipe.weight_decay},
            {"params": [p for p in clip.parameters() if p.ndim <= 1], "weight_decay": 0.0},
        ],
        lr=recipe.learning_rate,
    )
    began, right = time.monotonic(), []
    for step in range(recipe.steps):
        for group in optimizer.param_groups:
            rise = min(1.0, (step + 1) / recipe.warmup)
            group["lr"] = recipe.learning_rate * rise * 0.5 * (1 + math.cos(math.pi * step / recipe.steps))
        pairs = make_pairs(PairRecipe(n=recipe.batch, seed=_pair_seed(recipe.seed, step)))
        scores = _scores(clip, vocabulary, pairs)
        first = torch.tensor([float(pair.first_is_better) for pair in pairs])
        loss = preference_loss(scores, torch.stack([first, 1 - first])).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(clip.parameters(), recipe.max_grad_norm)
        optimizer.step()
        right.append(((scores[0] > scores[1]) == (first > 0.5)).float().mean().item())
        if (step + 1) % 250 == 0:
            recent = float(np.mean(right[-250:]))
            print(
                f"step {step + 1}/{recipe.steps}  accuracy {recent:.3f}  {time.monotonic() - began:.0f} s", flush=True
            )
    return clip.eval()


def _pair_seed(seed: int, step: int) -> int:
    """Seeds of training pairs, from 10^9 on: the committed pairs and the tests have small ones."""
    return 10**9 + 10**6 * seed + step


def _scores(clip: CLIPModel, vocabulary: Any, pairs: list[Pair]) -> Tensor:
    """Scaled cosines "side pair"."""
    pictures = np.stack([pair.pictures[side] for side in (0, 1) for pair in pairs])
    pixels = step_aware_pixels(torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1, SIZE)
    tokens = vocabulary(
        [pair.caption for pair in pairs], padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt"
    )
    out = clip(pixel_values=pixels, **tokens)
    return clip.logit_scale.exp() * (out.image_embeds.unflatten(0, (2, -1)) * out.text_embeds).sum(-1)


def build_clip(folder: Path, recipe: ClipRecipe) -> None:
    """Trains by the recipe and writes model (float16), tokenizer and RECIPE.json into `folder`."""
    clip = train_clip(recipe)
    clip.half().save_pretrained(folder)
    words().save_pretrained(folder)
    module = "diffalign.contrib.step_aware.world_judge"
    made = {
        "command": f"python -m {module} clip --out {folder.as_posix()} --seed {recipe.seed}",
        "recipe": asdict(recipe),
        "parameters": sum(p.numel() for p in clip.parameters()),
        "versions": {m.__name__: m.__version__ for m in (torch, transformers, np)},
    }
    (folder / "RECIPE.json").write_text(json.dumps(made, indent=2) + "\n")


def pack(run: Path, folder: Path) -> None:
    """Writes the preference model of a finished run into `folder`, in float16: half the size."""
    model, vocabulary = load_step_aware(str(run))
    save_step_aware(model, vocabulary, folder, torch.float16)


def main() -> None:
    """Command line of this module."""
    parser = argparse.ArgumentParser(
        prog="python -m diffalign.contrib.step_aware.world_judge", description="the world's preference models"
    )
    actions = parser.add_subparsers(dest="action", required=True)
    sub = actions.add_parser("clip", help="train the CLIP")
    sub.add_argument("--out", required=True, type=Path, help="folder of the model")
    sub.add_argument("--seed", type=int, default=ClipRecipe.seed)
    sub = actions.add_parser("pack", help="write a run's preference model in float16")
    sub.add_argument("--run", required=True, type=Path, help="output folder of the run")
    sub.add_argument("--out", required=True, type=Path, help="folder of the model")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # one thread: the same sums everywhere, and no fight over a shared machine
    if arguments.action == "clip":
        build_clip(arguments.out, ClipRecipe(seed=arguments.seed))
    else:
        pack(arguments.run, arguments.out)


if __name__ == "__main__":
    main()
