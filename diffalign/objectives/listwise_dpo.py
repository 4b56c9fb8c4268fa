"""Diffusion-LPO (Bai et al., arXiv 2510.01540): Diffusion-DPO on ranked lists, by the Plackett-Luce model.

    L = Σ_j −log σ( r_j − log Σ_{k>j} exp r_k ),   r_k = −(β/2) · D_k,   D = E_policy − E_reference

The images k = 1 … m of a list are in rank order, the best first, and share one t ~ U{0 … T−1} and one ε. The sum is the
paper's Σ_j [log Σ_{k≥j} exp r_k − r_j]: each image is preferred to all that rank below it together. Its last term is 0.
A list of two has Diffusion-DPO's loss, in every bit. A policy equal to its reference has the loss log m!.

The paper calls the method LPO; Latent Preference Optimization (arXiv 2502.01051) has that name as well, hence this one.

Differs from the paper: it writes β T ω(λ_t) ‖·‖² where this package has (β/2) times the mean over c·h·w, as in its
Diffusion-DPO. The equations are those of a summary of the published paper, which says nothing of how t and ε are drawn
within a list; they are shared here, as by the sides of a pair in Diffusion-DPO. No released code is known to us.

By hand: E_reference = .5 for three images, E_policy = (.4, .5, .5), β = 20 -> r = (1, 0, 0),
L = log(1 + 2 e^−1) + log 2 = .5514 + .6931 = 1.2446.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from diffalign.objectives.base import Compared, OnSharedNoise, SharedNoise, positive, reward_metrics, timesteps_valid
from diffalign.types import CHOSEN, LONGEST_LIST, Evidence, Score


@dataclass(frozen=True)
class ListwiseDPO(OnSharedNoise):
    """Plackett-Luce likelihood of a ranking of several images of one prompt, against a frozen reference."""

    beta: float = 5000.0  # scale of the implicit rewards; Diffusion-DPO's, with which it is the same at two images
    timesteps: tuple[int, ...] | None = None  # null: all, as in Diffusion-DPO

    name: ClassVar[str] = "listwise_dpo"
    paper: ClassVar[str] = (
        "Bai et al., Towards Better Optimization For Listwise Preference in Diffusion Models (Diffusion-LPO), "
        "arXiv 2510.01540"
    )
    compares: ClassVar[Compared] = "lists"
    scale_field: ClassVar[str | None] = "beta"

    def __post_init__(self) -> None:
        positive("beta", self.beta)
        timesteps_valid(self.timesteps)

    @property
    def points(self) -> SharedNoise:
        """One (t, ε) for each list, shared by all of its images."""
        return SharedNoise(self.timesteps, sides=LONGEST_LIST)

    def score(self, evidence: Evidence) -> Score:
        """−log of the likelihood of the order. The logit, for metrics alone, compares the best with the worst image."""
        reward = -(self.beta / 2) * evidence.margin
        best, worst = reward[CHOSEN], reward[-1]
        metrics = {**reward_metrics(best, worst), "list/accuracy": ordered_pairs(reward.detach())}
        return Score(loss=-logsigmoid(logits(reward)).sum(0), logit=best - worst, metrics=metrics)


def logits(reward: Tensor) -> Tensor:
    """r_j − log Σ_{k>j} exp r_k of all images but the last: "image pair" from rewards in rank order."""
    below = [reward[j + 1 :].logsumexp(0) for j in range(len(reward) - 1)]
    return reward[:-1] - torch.stack(below)


def ordered_pairs(reward: Tensor) -> Tensor:
    """The share of each list's pairs of images whose rewards have the order of the list, [pair]."""
    one, two = torch.triu_indices(len(reward), len(reward), offset=1, device=reward.device)
    return (reward[one] > reward[two]).float().mean(0)
