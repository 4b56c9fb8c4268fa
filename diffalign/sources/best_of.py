"""RAFT (Dong et al., arXiv 2304.06767): the best of K own samples by a scorer, to be fine-tuned on with `sft`.

    every round     for each of its prompts, K images by the policy as it is; the best goes into the round, chosen
                    side only; each is used once

Differs from the authors' code, which is for language models and ranks over the whole batch by default: the best of each
prompt (their `local` ranking), which keeps every prompt in the data.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from torch import Tensor

from diffalign.objectives.base import Compared
from diffalign.sources.base import Context, Settings, Source, candidates_valid


@dataclass(frozen=True)
class BestOf:
    """Each round: the best of K samples of the policy, for every prompt of the round."""

    scorer: str  # `diffalign list scorers`, NAME=PATH or package.module:Class
    prompts_per_round: int = 128  # over all processes; our choice
    samples_per_prompt: int = 8  # K; the paper's diffusion experiments rank small batches, size not given: our choice
    sampling_steps: int = 20  # DDIM
    guidance_scale: float = 5.0  # of sampling; at most 1: none
    generation_batch_size: int = 8  # images sampled, decoded and scored at a time, per process
    keep_rounds: bool = False  # keep every round's file instead of those that a checkpoint needs

    name: ClassVar[str] = "best_of"
    paper: ClassVar[str] = "Dong et al., RAFT: Reward rAnked FineTuning, arXiv 2304.06767"
    data: ClassVar[Literal["prompts", "winners"]] = "prompts"
    gives: ClassVar[Compared] = "chosen images"
    own_reference: ClassVar[bool] = False

    def __post_init__(self) -> None:
        candidates_valid(self)

    def build(self, context: Context) -> Source:
        """The source of a run, with its scorer loaded."""
        from diffalign.sources.candidates import Candidates, from_candidates

        def best(found: Candidates) -> tuple[list[int], Tensor, dict[str, Tensor]]:
            metrics = {"rollout/score": found.scores.flatten(), "rollout/score_best": found.scores.amax(1)}
            return list(range(len(found.places))), found.scores.argmax(1, keepdim=True), metrics

        return from_candidates(context, self, best)

    def small(self) -> Settings:
        """Two samples of one prompt a round."""
        return replace(self, prompts_per_round=1, samples_per_prompt=2, generation_batch_size=1)
