"""LPO's latent reward model (arXiv 2502.01051) as a scorer of noisy latents: no decoder, no x̂_0.

    load_judge("latent-judge=runs/sd15/latent_judge")
    load_judge("latent-judge=LRM/lrm_sd15")            a released folder, with the base's tokenizers

The source `rollout` asks it for x_t of its candidates at the level t that they have reached. The release tells its
model the level before the step that made them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from diffalign.contrib.latent_judge.files import levels_of, load_judge
from diffalign.contrib.latent_judge.tokens import time_ids, tokens
from diffalign.engine.schedule import NoiseSchedule
from diffalign.rewards.base import ScorerError, check_finite


class LatentScorer:
    """Higher is better; the unit is that of logits, so a difference of two scores is one of log-odds."""

    name = "latent-judge"

    def __init__(self, path: str = "", *, device: str = "cpu") -> None:
        """`path`: a run's output folder, its weights folder, or a released folder."""
        judge, self.tokenizers, self.facts = load_judge(path)
        self.judge = judge.requires_grad_(False).eval().to(device, torch.float32)
        self.device = torch.device(device)
        self._read: tuple[tuple[str, ...], Any] = ((), None)  # the last prompts and their text: a chain asks often

    def check_latents(self, family: str, channels: int, schedule: NoiseSchedule) -> None:
        """Raises ScorerError for latents of another family of models, number of channels or noise schedule."""
        own = self.judge.unet.config.in_channels
        if (family, channels) != (self.facts.family, own):
            raise ScorerError(
                f"scorer '{self.name}' judges latents of {own} channels of {self.facts.family} models, and these are "
                f"of {channels} channels of an {family} model; use a judge that was trained from this base"
            )
        theirs = levels_of(schedule)
        for (t, was), (now, is_) in zip(self.facts.noise_levels, theirs, strict=False):
            if t != now or abs(was - is_) > 1e-3:
                raise ScorerError(
                    f"scorer '{self.name}' was trained where ᾱ is {was:g} at t = {t}, and this base's schedule has "
                    f"{is_:g} at t = {now}: it would take the noise for another; use a judge of this schedule"
                )

    @torch.no_grad()
    def score_latents(self, latents: Tensor, prompts: Sequence[str], t: Tensor) -> Tensor:
        """exp(logit_scale) · cos, float32 [n] on the CPU, of latents "n c h w" at noise levels t, int64 [n].

        Raises ScorerError for lengths that differ, and for a score that is not finite, naming its prompt.
        """
        if not len(latents) == len(prompts) == len(t):
            raise ScorerError(
                f"scorer '{self.name}' got {len(latents)} latents, {len(prompts)} prompts and {len(t)} timesteps; "
                "pass one of each"
            )
        if self._read[0] != tuple(prompts):
            ids, of = tokens(self.tokenizers, prompts, self.device)
            self._read = tuple(prompts), (self.judge.text(ids), of)
        x = latents.to(self.device)
        text, of = self._read[1]
        scores = self.judge.score(x, t.to(self.device), text, of, time_ids(self.facts, x))
        return check_finite(self.name, scores.cpu(), prompts)


def world_latent_judge(device: str = "cpu") -> LatentScorer:
    """The embedded world's committed judge of noisy latents."""
    from diffalign.world import latent_judge_path

    judge = LatentScorer(str(latent_judge_path()), device=device)
    judge.name = "world-latent-judge"
    return judge
