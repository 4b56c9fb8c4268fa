"""The step-aware preference model of SPO (arXiv 2406.04314) as a scorer: score = exp(logit_scale) · cos(image, prompt).

The image is the decoded x̂_0 of some timestep, which is an input of the network. Weights come from a folder that
`diffalign train` wrote (config.json, model.safetensors, tokenizer), or from one file with the released state dict:

    load_scorer("step-aware=runs/sd15/step_aware")
    load_scorer("step-aware=sd-v1-5_step-aware_preference_model.bin")

A released file shows no image size but ViT-H/14's and brings no tokenizer; both are LAION's CLIP-H, as published.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor, nn

from diffalign.contrib.step_aware.clip import StepAwareClip, from_state_dict, step_aware_pixels
from diffalign.rewards.base import ScorerError, check_finite, check_lengths
from diffalign.rewards.clip import BATCH, Clip, load_or_explain, load_state, load_tokenizer

WEIGHTS_FOLDER = "preference_model"  # in the output folder of a training run
WEIGHTS_FILE = "model.safetensors"
TOKENIZER = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"


class StepAware:
    """Higher is better, in PickScore's unit where the model started from PickScore."""

    name = "step-aware"
    span = (11.543526500463486, 28.201571106910706)  # PickScore's

    def __init__(self, path: str = "", *, tokenizer: str = TOKENIZER, device: str = "cpu") -> None:
        """`path`: a folder written by `diffalign train`, its weights folder, or a file with the released state dict."""
        model, words = load_step_aware(path, tokenizer)
        self.clip = Clip(model, words, device)

    @torch.no_grad()
    def score(self, images: Sequence[Image], prompts: Sequence[str], t: Tensor | None = None) -> Tensor:
        """exp(logit_scale) · cos, [n], of images decoded at timesteps t [n]; without t as clean images, t = 0.

        Prompts are cut to the model's context. Raises ScorerError naming the prompt of a score that is not finite.
        """
        check_lengths(self.name, images, prompts)
        t = torch.zeros(len(images), dtype=torch.int64) if t is None else t
        vectors = [
            self._embed(images[i : i + BATCH], t[i : i + BATCH].to(self.clip.device))
            for i in range(0, len(images), BATCH)
        ]
        if not vectors:
            return torch.empty(0)
        cosine = (torch.cat(vectors) * self.clip.embed_prompts(prompts)).sum(-1)
        return check_finite(self.name, self.clip.logit_scale.cpu() * cosine, prompts)

    def _embed(self, images: Sequence[Image], t: Tensor) -> Tensor:
        """Unit vectors on the CPU; images may differ in size."""
        pixels = [step_aware_pixels(pixels_of(image), self.clip.image_size) for image in images]
        features = self.clip.model.image_features(torch.cat(pixels).to(self.clip.device), t)
        return nn.functional.normalize(features, dim=-1).cpu()


def world_step_aware(device: str = "cpu") -> StepAware:
    """The embedded world's committed model; it takes images of the world decoded at any timestep."""
    from diffalign.world import judge_path

    judge = StepAware(str(judge_path()), device=device)
    judge.name = "world-step-aware"
    return judge


def pixels_of(image: Image) -> Tensor:
    """Pixels "1 3 h w" in [−1, 1]."""
    values = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    return values[None].float() / 127.5 - 1


def load_step_aware(path: str, tokenizer: str = TOKENIZER) -> tuple[StepAwareClip, Any]:
    """The network in float32 and its tokenizer. Raises ScorerError saying which file is missing and how to get it."""
    place = Path(path)
    folder = place / WEIGHTS_FOLDER if (place / WEIGHTS_FOLDER).is_dir() else place
    if not path or not place.exists():
        raise ScorerError(
            f"step-aware preference model: {f'there is no {path}' if path else 'no weights are named'}. Write "
            "step-aware=PATH: the output folder of `diffalign train` with a preference_model section, or a released "
            "file, e.g. after\n    hf download SPO-Diffusion-Models/Step-Aware_Preference_Models "
            "sd-v1-5_step-aware_preference_model.bin --local-dir ."
        )
    if place.is_file():
        return from_state_dict(load_state(place)), load_tokenizer(path, tokenizer)
    from transformers import CLIPConfig

    missing = [name for name in ("config.json", WEIGHTS_FILE) if not (folder / name).is_file()]
    if missing:
        raise ScorerError(f"{folder} has no {' and no '.join(missing)}: not a step-aware preference model's folder")
    config = load_or_explain(str(folder), lambda: CLIPConfig.from_pretrained(folder))
    return from_state_dict(load_state(folder / WEIGHTS_FILE), config), load_tokenizer(str(folder), tokenizer)


def save_step_aware(model: StepAwareClip, tokenizer: Any, folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """Writes config, tokenizer and weights (the release's names, safetensors) into `folder`."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    model.config.save_pretrained(folder)
    if (backend := getattr(tokenizer, "backend_tokenizer", None)) is not None:  # its last call's settings are no part
        backend.no_padding()
        backend.no_truncation()
    tokenizer.save_pretrained(folder)
    state = {name: value.detach().cpu().to(dtype).contiguous() for name, value in model.state_dict().items()}
    save_file(state, folder / WEIGHTS_FILE, metadata={"format": "pt"})
