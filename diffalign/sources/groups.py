"""Groups of K scored samples of a prompt, every one of which is trained on by how good it is in its group.

    every round     K images of each of its prompts; A = (score − mean of its prompt's) / (spread + 1e-4)
    graded_groups   DiffusionNFT (Zheng et al., arXiv 2509.16117): samples of the reference, which follows the policy,
                    each with the optimality r = 1/2 + 1/2 · clip(A / clip_advantage, −1, 1)
    weighted_groups its control: samples of the policy, each with the weight clip(A, 0, clip_advantage), for `sft`

The images of a round are visited for `steps_per_round` optimiser steps, each visit with another t and noise. The
statistics are those of all processes: they are computed from the scores in the round's files.

weighted_groups is advantage-weighted fine-tuning on the forward process. It leaves out what is worse than its group:
a negative weight on a denoising loss has no minimum, so that only a bound or few steps would keep it from diverging.

Differs from the release (NVlabs/DiffusionNFT 24af555): DDIM samples, there a DPM-Solver of order 2; a place of a round
is a group, there all images of one prompt in a round; t is drawn by the objective, there each image is visited once at
each of nine timesteps. The paper has clip(A, −1, 1) with a spread it leaves open: clip_advantage 1.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor

from diffalign.engine.measure import Network
from diffalign.errors import DiffalignError
from diffalign.objectives.base import Compared, positive
from diffalign.sources.base import Context, Settings, Source, SourceError, at_least, candidates_valid
from diffalign.types import Terms

FLOOR = 1e-4  # added to the spread, in the scorer's unit; the release's


@dataclass(frozen=True)
class GradedGroups:
    """Each round: K samples of the old policy for every prompt of the round, with an optimality each."""

    scorer: str  # `diffalign list scorers`, NAME=PATH or package.module:Class
    prompts_per_round: int = 48  # over all processes; the release
    samples_per_prompt: int = 24  # K; the release
    steps_per_round: int = 1  # optimiser steps on a round's images; the release, 2 for OCR
    spread: Literal["round", "prompt"] = "round"  # standard deviation of all scores of the round, as the release
    clip_advantage: float = 5.0  # in spreads, where r is 0 or 1; the release
    sampling_steps: int = 10  # DDIM; the release's number, 25 for several rewards
    guidance_scale: float = 1.0  # of sampling; at most 1: none, as the release
    generation_batch_size: int = 8  # images sampled, decoded and scored at a time, per process
    keep_rounds: bool = False  # keep every round's file instead of those that a checkpoint needs

    name: ClassVar[str] = "graded_groups"
    paper: ClassVar[str] = (
        "Zheng et al., DiffusionNFT: Online Diffusion Reinforcement with Forward Process, arXiv 2509.16117"
    )
    data: ClassVar[Literal["prompts", "winners"]] = "prompts"
    gives: ClassVar[Compared] = "graded images"
    own_reference: ClassVar[bool] = False
    same_in_training: ClassVar[dict[str, str]] = {"steps_per_round": "ref_model_sync_steps"}

    def __post_init__(self) -> None:
        candidates_valid(self)
        at_least("steps_per_round", self.steps_per_round, 1)
        positive("clip_advantage", self.clip_advantage)
        if self.spread not in ("round", "prompt"):
            raise DiffalignError(f"spread = {self.spread!r}; allowed: round, prompt")

    def build(self, context: Context) -> Source:
        """The source of a run, with its scorer loaded. Raises SourceError where a round has unused images."""
        from diffalign.sources.candidates import Candidates, from_candidates

        self._all_are_used(context)

        def every(found: Candidates) -> tuple[list[int], Tensor, dict[str, Tensor]]:
            n, k = found.scores.shape
            metrics = {"rollout/score": found.scores.flatten(), "rollout/group_std": found.scores.std(1, correction=0)}
            return [place for place in range(n) for _ in range(k)], torch.arange(k).repeat(n)[:, None], metrics

        return from_candidates(
            context,
            self,
            every,
            network=self._sampler(context),
            steps_per_round=self.steps_per_round,
            grade=partial(self.grade, each=self.spread),
        )

    def grade(self, places: Tensor, scores: Tensor, each: Literal["round", "prompt"]) -> Terms:
        """The optimality of every image of a round, from place int64 [n] and score [n]."""
        r = 0.5 + 0.5 * (advantages(places, scores, each) / self.clip_advantage).clamp(-1, 1)
        return Terms(optimality=r.float())

    def small(self) -> Settings:
        """Two samples of one prompt a round, in steps of one."""
        return replace(self, prompts_per_round=1, samples_per_prompt=2, steps_per_round=2, generation_batch_size=1)

    def _sampler(self, context: Context) -> Network:
        return context.networks.reference

    def _all_are_used(self, context: Context) -> None:
        spec, images = context.spec, self.prompts_per_round * self.samples_per_prompt
        step = spec.train_batch_size * spec.gradient_accumulation_steps * spec.processes.num_processes
        if self.steps_per_round * step < images:
            raise SourceError(
                f"source.steps_per_round = {self.steps_per_round} steps of {step} images visit fewer than the {images} "
                f"images of a round ({self.prompts_per_round} prompts × {self.samples_per_prompt}); give at least "
                f"{-(-images // step)}, a larger batch, or fewer images"
            )


@dataclass(frozen=True)
class WeightedGroups(GradedGroups):
    """Each round: K samples of the policy for every prompt of the round, weighted with their positive advantage."""

    name: ClassVar[str] = "weighted_groups"
    paper: ClassVar[str] = "a control of ours for DiffusionNFT, Zheng et al., arXiv 2509.16117"
    gives: ClassVar[Compared] = "chosen images"
    same_in_training: ClassVar[dict[str, str]] = {}

    def grade(self, places: Tensor, scores: Tensor, each: Literal["round", "prompt"]) -> Terms:
        """The weight of every image of a round, from place int64 [n] and score [n]."""
        return Terms(weight=advantages(places, scores, each).clamp(0, self.clip_advantage).float())

    def _sampler(self, context: Context) -> Network:
        return context.networks.policy


def advantages(places: Tensor, scores: Tensor, each: Literal["round", "prompt"]) -> Tensor:
    """(score − mean of its place) / (spread + 1e-4), float64 [n]; spread: of all scores, or of the place's."""
    _, group, counts = places.unique(return_inverse=True, return_counts=True)
    exact = scores.double()

    def mean(values: Tensor) -> Tensor:
        return torch.zeros(len(counts), dtype=values.dtype).index_add(0, group, values)[group] / counts[group]

    centred = exact - mean(exact)
    spread = exact.std(correction=0) if each == "round" else mean(centred.square()).sqrt()
    return centred / (spread + FLOOR)
