"""Training a latent judge (LPO's latent reward model, arXiv 2502.01051) with `preference_model.kind: latent`.

    t ~ U{0 … T−1} for a pair, one noise ε of its own for each image         both belong to the pair
    x_t = a_t x_0 + s_t ε,   score = the network's at x_t, t and the prompt
    loss: that of the step-aware preference model (`step_aware/loss.py`), which is the release's `loss_type: pair`

The network starts as the base's down and middle blocks and text encoders, and all of it is trained.

Differs from the release: t is any timestep (there, one of 1, 51, …, 951); draws belong to the pair; latents are the
means that the VAE gives plus its noise as in every run; pairs that share a prompt are counted in the data used. The
filter of pairs by other scorers (MPCF) is a matter of the data: see docs/lpo.md.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from diffalign.config.schema import PreferenceModelConfig
from diffalign.contrib.latent_judge.files import WEIGHTS_FOLDER, Facts, levels_of, load_weights, save_judge
from diffalign.contrib.latent_judge.network import LatentJudge
from diffalign.contrib.latent_judge.tokens import time_ids, tokens
from diffalign.contrib.step_aware.build import Parts, PreferenceRun, assembled, begun, relabelling
from diffalign.data.table.pairs import PairTable
from diffalign.engine.random import integers, normal, on_device
from diffalign.engine.schedule import NoiseSchedule
from diffalign.errors import DiffalignError
from diffalign.models.kernels.attention import set_attention
from diffalign.models.loading.base import vae_factor
from diffalign.rewards.clip import load_clip
from diffalign.training.build import load_run_base
from diffalign.training.checkpoints.identity import refuse_others, run_identity
from diffalign.training.processes import on_main
from diffalign.types import PairBatch


@dataclass(kw_only=True)
class LatentRun(PreferenceRun):
    """A run that trains a judge of noisy latents; `networks` only counts, and `tokenizer` is a tuple of them."""

    model: LatentJudge
    facts: Facts

    def scores(self, batch: PairBatch) -> tuple[Tensor, Tensor, Tensor]:
        """Scores "side pair" with grad; on the CPU their labels and timesteps [pair]."""
        xt, t = noisy_latents(batch, self.networks.schedule)
        device, dtype = xt.device, self.networks.autocast_dtype
        ids, of = tokens(self.tokenizer, self.labels.prompts(batch.ids), device)
        sides, flat = xt.shape[0], xt.flatten(0, 1)
        times, which = t.expand(sides, -1).flatten().to(device), of.expand(sides, -1).flatten()
        self.networks.image_forwards += len(flat) * (1 if self.model.guidance == 1.0 else 2)
        with nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype):
            scores = self.module(flat, times, ids, which, time_ids(self.facts, flat))
        return scores.unflatten(0, (sides, -1)), self.labels(batch.ids), t

    def save_weights(self, folder: Path) -> None:
        """A folder that the scorer `latent-judge` loads."""
        save_judge(self.model, self.tokenizer, self.facts, folder / WEIGHTS_FOLDER)

    def load_weights(self, folder: Path) -> None:
        """Loads what `save_weights` wrote. Raises ScorerError for a file that cannot be read."""
        load_weights(self.model, folder / WEIGHTS_FOLDER)

    def what(self) -> str:
        """What is trained, and from what, for the plan."""
        return f"judge of noisy latents, guidance {self.model.guidance:g} of its middle features"

    def base_is(self) -> str:
        """What the base is for, for the plan."""
        return "its down and middle blocks and text encoders are what training starts from"

    def usage(self) -> str:
        """The folder, and the scorer that takes it."""
        return (
            f"weights in {self.output_dir / WEIGHTS_FOLDER}: use them as source.scorer=latent-judge={self.output_dir}"
        )


def noisy_latents(batch: PairBatch, schedule: NoiseSchedule) -> tuple[Tensor, Tensor]:
    """x_t "side pair c h w" and t int64 [pair] on the CPU: one t for a pair, a noise for each of its images."""
    t = integers(batch.keys, "t", 0, schedule.num_train_timesteps)
    draws = normal(batch.keys, "noise of both sides", batch.latents.transpose(0, 1).shape[1:]).transpose(0, 1)
    noise = on_device(draws, batch.latents.device)
    return schedule.add_noise(batch.latents, noise, t.expand(batch.latents.shape[:2])), t


def build_latent_run(config: PreferenceModelConfig, accelerator: Accelerator, table: PairTable) -> LatentRun:
    """Builds every part of the run; afterwards only steps are left to take."""
    config = begun(config, accelerator, table)
    settings, device = config.preference_model, accelerator.device
    base = load_run_base(config.model)
    identity = run_identity(config, table, base)
    on_main(accelerator, lambda: refuse_others(config, identity))
    assert base.text is not None
    assert base.vae is not None
    if base.text.spec.recorded:
        raise DiffalignError(
            "model.clip_skip, model.max_token_length: a latent judge reads prompts as they are; remove them"
        )
    set_attention(base.unet, config.model.attention, device)
    model = LatentJudge(base.unet, base.text.models, settings.guidance_scale, config.seed)
    if settings.text_projection is not None:
        start_text_projection(model, settings.text_projection)
    model = model.requires_grad_(True).train().to(device)
    for parameter in model.unused():
        parameter.requires_grad_(False)
    facts = Facts(model.family, settings.guidance_scale, vae_factor(base.vae), levels_of(base.schedule))
    parts = Parts(base, table, relabelling(config, device), identity, model, base.text.tokenizers)
    return assembled(LatentRun, config, accelerator, parts, facts=facts)


def start_text_projection(model: LatentJudge, clip: str) -> None:
    """Copies the text projection of a CLIP (folder or Hub id) into an SD judge. Raises DiffalignError if none fits."""
    if model.text_projection is None:
        raise DiffalignError(
            "preference_model.text_projection: an SDXL judge compares with the text embedding of the second encoder, "
            "which has its own projection; set it to null"
        )
    weight = load_clip(clip, clip, "cpu").model.text_projection.weight
    if weight.shape != model.text_projection.weight.shape:
        raise DiffalignError(
            f"preference_model.text_projection: that of {clip} is {tuple(weight.shape)}, and this base's text encoder "
            f"needs {tuple(model.text_projection.weight.shape)}; name the CLIP that the encoder is from"
        )
    model.text_projection.weight.data.copy_(weight)
