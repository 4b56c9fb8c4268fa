"""Online DPO: the policy's own samples, ranked by a scorer, as pairs for any pairwise objective.

    every round     for each of its prompts, K images by the policy as it is; best against worst, if their scores
                    differ by more than `min_gap`; each pair is used once

The form is that of online AI feedback (Guo et al., arXiv 2402.04792), with a scorer in the judge's place and best
against worst of K instead of one pair of two. The reference stays the objective's: the model before the first step.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from diffalign.errors import DiffalignError
from diffalign.objectives.base import Compared
from diffalign.sources.base import Context, Settings, Source, candidates_valid


@dataclass(frozen=True)
class OnlinePairs:
    """Each round: best against worst of K samples of the policy, for every prompt of the round."""

    scorer: str  # `diffalign list scorers`, NAME=PATH or package.module:Class
    prompts_per_round: int = 128  # over all processes; our choice
    samples_per_prompt: int = 4  # K; two in the paper; more make the sides differ more for as many more samples
    min_gap: float = 0.0  # a pair is valid if its scores differ by more than this, in the scorer's own unit
    sampling_steps: int = 20  # DDIM
    guidance_scale: float = 5.0  # of sampling; at most 1: none
    generation_batch_size: int = 8  # images sampled, decoded and scored at a time, per process
    keep_rounds: bool = False  # keep every round's file instead of those that a checkpoint needs

    name: ClassVar[str] = "online_pairs"
    paper: ClassVar[str] = "Guo et al., Direct Language Model Alignment from Online AI Feedback, arXiv 2402.04792"
    data: ClassVar[Literal["prompts", "winners"]] = "prompts"
    gives: ClassVar[Compared] = "images"
    own_reference: ClassVar[bool] = False

    def __post_init__(self) -> None:
        candidates_valid(self)
        if not 0 <= self.min_gap < float("inf"):
            raise DiffalignError(f"min_gap = {self.min_gap}: must be a finite number, at least 0")

    def build(self, context: Context) -> Source:
        """The source of a run, with its scorer loaded."""
        from diffalign.sources.candidates import Candidates, from_candidates

        def best_and_worst(found: Candidates) -> tuple[list[int], Tensor, dict[str, Tensor]]:
            best, worst = found.scores.max(1), found.scores.min(1)
            gap = best.values - worst.values
            valid = gap > self.min_gap
            sides = torch.stack([best.indices, worst.indices], dim=1)
            metrics = {"rollout/score": found.scores.flatten(), "rollout/gap": gap, "rollout/valid": valid.float()}
            return valid.nonzero().flatten().tolist(), sides[valid], metrics

        return from_candidates(context, self, best_and_worst)

    def small(self) -> Settings:
        """Two samples of one prompt a round."""
        return replace(self, prompts_per_round=1, samples_per_prompt=2, min_gap=0.0, generation_batch_size=1)
