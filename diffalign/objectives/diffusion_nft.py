"""DiffusionNFT (Zheng et al., arXiv 2509.16117): own samples with a grade, good ones attract and bad ones repel.

    L = (1/β) · [ r · w₊ · |v₊ − v|² + (1 − r) · w₋ · |v₋ − v|² ]
    v₊ = (1 − β) v_old + β v_θ,   v₋ = (1 + β) v_old − β v_θ

v is the target of the forward process, v_θ the policy's prediction, v_old that of the policy that made the samples, and
r in [0, 1] the optimality of the sample (`Terms.optimality`). `sources/groups.py` makes samples and optimality;
v_old is the reference, which must follow the policy (`training.ref_model_sync_steps`).

Nothing in it needs a velocity. v, ε and x̂_0 are affine in each other at a given x_t and t, so v₊ and v₋ are the same
policies in each space, and the network's own is used. With E = |prediction − target|², D = |v_θ − v_old|² (all means
over c, h, w) and A = 2r − 1:

    |v₊ − v|² = (1 − β) E_old + β E_θ − β(1 − β) D,   |v₋ − v|² = (1 + β) E_old − β E_θ + β(1 + β) D

    L = (1/β) E_old + A (E_θ − E_old − D) + β D       where w₊ = w₋ = 1

so it is the denoising loss weighted with a signed A, made linear in v_θ − v_old, and a penalty on the distance to the
old policy. At equal weights D = 0 and the gradient is A ∇E_θ: 0 where r = 1/2.

weighting x0: w± = k² / max(√(k² E±), 1e-5), the root without gradient. k² E± is the squared error of x̂_0: k² is
(1 − ᾱ)/ᾱ for ε, 1 − ᾱ for v and 1 for samples. It is the release's self-normalised regression of x_0.
weighting none: w± = 1.

Differs from the paper: 1/β, as in the release; the paper has none, and it only scales the gradient.
Differs from the release (NVlabs/DiffusionNFT 24af555):
- it divides by the mean absolute error of x̂_0, this by the root of the mean squared one, which the errors give. For
  normal residuals the weights are smaller by the factor √(2/π), the same for both terms;
- it adds 1e-4 · |v_θ − v_base|², which needs a third network, and 5 times L; both are left out;
- t is uniform over all timesteps, as in the paper; there, nine of the ten of the sampler's grid, drawn
  anew for each image.

By hand: E_θ = .4, E_old = .5, D = .04, β = 1, r = .8, weighting none → E₊ = .4, E₋ = 1 − .4 + .08 = .68,
L = .8 · .4 + .2 · .68 = .456.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from diffalign.engine.measure import Models
from diffalign.engine.random import on_device
from diffalign.engine.schedule import NoiseSchedule
from diffalign.errors import DiffalignError
from diffalign.objectives.base import Compared, OnSharedNoise, SharedNoise, positive
from diffalign.types import CHOSEN, Evidence, PairBatch, Probe, Score

WEIGHTINGS = ("x0", "none")
LEAST_ERROR = 1e-5  # of x̂_0, in the units of latents; the release's


@dataclass(frozen=True)
class DiffusionNFT(OnSharedNoise):
    """An implicit positive and an implicit negative policy, each fitted to the sample by how good the sample is."""

    beta: float = 1.0  # guidance strength of the implicit policies; the release: 1, for OCR and several rewards .1
    weighting: Literal["x0", "none"] = "x0"  # self-normalised error of x̂_0, as the release; or 1

    name: ClassVar[str] = "diffusion_nft"
    paper: ClassVar[str] = (
        "Zheng et al., DiffusionNFT: Online Diffusion Reinforcement with Forward Process, arXiv 2509.16117"
    )
    compares: ClassVar[Compared] = "graded images"
    needs_distance: ClassVar[bool] = True

    def __post_init__(self) -> None:
        positive("beta", self.beta)
        if self.weighting not in WEIGHTINGS:
            raise DiffalignError(f"weighting = {self.weighting!r}; allowed: {', '.join(WEIGHTINGS)}")

    @property
    def points(self) -> SharedNoise:
        """A (t, ε) for each sample, which is the chosen side."""
        return SharedNoise(sides=1)

    @property
    def drawn(self) -> dict[str, Any] | None:
        """See `Objective.drawn`: `probe` adds a weight to the points, which changes none of them."""
        return self.points.drawn

    def check_schedule(self, schedule: NoiseSchedule) -> None:
        """Raises DiffalignError where x̂_0 does not follow from a predicted noise."""
        if self.weighting == "x0" and schedule.prediction_type == "epsilon" and not schedule.alphas_cumprod.min() > 0:
            raise DiffalignError(
                "weighting = 'x0': this schedule has a timestep without signal, where a predicted noise says nothing "
                "about the image; use weighting: none, or a base that predicts v or samples"
            )

    def probe(self, batch: PairBatch, models: Models) -> Probe:
        """One (t, ε) for each sample, with k² of its timestep as weight."""
        return self.weigh(self.points(batch, models.schedule), models.schedule)

    def weigh(self, probe: Probe, schedule: NoiseSchedule) -> Probe:
        """k² of each t: the squared error of x̂_0 for a squared error 1 of the prediction."""
        if self.weighting == "none" or schedule.prediction_type == "sample":
            return probe
        alpha_bar = schedule.alpha_bar(probe.t)
        square = 1 - alpha_bar if schedule.prediction_type == "v_prediction" else (1 - alpha_bar) / alpha_bar
        return replace(probe, weight=on_device(square.to(probe.xt.dtype), probe.xt.device))

    def score(self, evidence: Evidence) -> Score:
        """The loss of each sample. Without optimality in the terms every sample is a good one: r = 1."""
        if evidence.distance is None or evidence.reference is None:
            raise DiffalignError(
                "diffusion_nft: this evidence has no distance between policy and reference; measure it by `ask`"
            )
        policy, old = evidence.policy[CHOSEN], evidence.reference[CHOSEN]
        distance, b = evidence.distance[CHOSEN], self.beta
        good = (1 - b) * old + b * policy - b * (1 - b) * distance
        bad = (1 + b) * old - b * policy + b * (1 + b) * distance
        optimality = evidence.terms.optimality
        r = torch.ones_like(policy) if optimality is None else optimality.to(policy)
        loss = (r * self._weighted(good, evidence) + (1 - r) * self._weighted(bad, evidence)) / b
        return Score(loss=loss, logit=None, metrics={"optimality": r.detach(), "moved": distance.detach()})

    def _weighted(self, error: Tensor, evidence: Evidence) -> Tensor:
        """w± · error."""
        if self.weighting == "none":
            return error
        squared = error if evidence.weight is None else evidence.weight * error
        return squared / squared.detach().clamp(min=0).sqrt().clamp(min=LEAST_ERROR)
