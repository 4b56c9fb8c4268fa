"""InPO / DDIM-InPO (Lu et al., arXiv 2503.18454): Diffusion-DPO at the noise that inversion finds for each image.

    x_t = DDIM inversion of x_0 to t,   τ = (x_t − a_t x_0) / s_t
    L   = −log σ( −(β/2) · (D^c − D^r) ),   D = E_policy − E_reference at x_t with target τ

No noise is drawn for the target: τ is what explains the inverted x_t, so x_t = a_t x_0 + s_t τ exactly, and the sides
of a pair share t but not τ. After every inversion step η·σ times a normal draw is added, independently for the sides.
The loss, its log 2 at the start and its metrics are Diffusion-DPO's.

Differs from the released code (JaydenLyh/InPO, train.py), with `grid: exact`:
- the latent ends exactly AT t, in nearly equal integer steps from the clean image; there it stops at the last grid
  level below t (or above it, under older diffusers) while network and τ are told t;
- t belongs to the pair; there, the first pair's t inverts the whole batch;
- every t works; there, an index error ends the run for t > 901 on current diffusers;
- ᾱ is float64; there, float16 (15 % off at small t).
`grid: released` keeps the first difference as released, and nothing else: it is for comparing numbers. `steps` is 40
here and 10 there: 10 lower the reward where it can be measured (docs/inversion.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from diffalign.engine.ddim import inversion_std
from diffalign.engine.inversion import (
    Ascent,
    Refinement,
    arrive,
    exact_ascent,
    released_ascent,
)
from diffalign.engine.measure import Models
from diffalign.engine.predictor import predictor
from diffalign.engine.random import integers, normal
from diffalign.engine.schedule import NoiseSchedule, spread
from diffalign.errors import DiffalignError
from diffalign.objectives.base import Objective, dpo_logit, less_margin, positive
from diffalign.types import Evidence, PairBatch, Probe, Score

Grid = Literal["exact", "released"]
Inverter = Literal["policy", "reference"]


@dataclass(frozen=True)
class InPO(Objective):
    """Direct preference optimisation at DDIM-inverted points."""

    beta: float = 5000.0  # as DiffusionDPO; the release uses 5000 for SDXL, 2000 for SD1.5
    steps: int = 40  # inversion steps from a clean image to t = T − 1; fewer to a smaller t. The release: 10
    eta: float = 0.1  # share of DDPM's noise added after each inversion step; 0: deterministic
    grid: Grid = "exact"  # released: the authors' grid, which ends below t
    inverter: Inverter = "policy"  # whose noise predictions invert; the released code uses the current policy

    name: ClassVar[str] = "inpo"
    paper: ClassVar[str] = (
        "Lu et al., InPO: Inversion Preference Optimization with Reparametrized DDIM, arXiv 2503.18454"
    )
    scale_field: ClassVar[str | None] = "beta"
    takes_margin: ClassVar[bool] = True
    takes_signs: ClassVar[bool] = True

    def __post_init__(self) -> None:
        positive("beta", self.beta)
        inversion_valid(self.steps, self.grid, self.inverter)
        if not 0 <= self.eta <= 1:
            raise DiffalignError(
                f"eta = {self.eta}: must be in [0, 1]; 0 is deterministic inversion, the paper has 0.1"
            )

    def check_schedule(self, schedule: NoiseSchedule) -> None:
        """See `Objective.check_schedule`."""
        steps_fit(schedule, self.steps)

    @torch.no_grad()
    def probe(self, batch: PairBatch, models: Models) -> Probe:
        """Both images inverted to the pair's t."""
        t = integers(batch.keys, "t", 0, models.schedule.num_train_timesteps)
        ascent = ascent_to(models.schedule, t, self.steps, self.grid)
        added = self._added(batch, models.schedule, ascent) if self.eta else None
        return inverted(batch, models, t, ascent, self.inverter, added=added)

    def score(self, evidence: Evidence) -> Score:
        """−log σ of Diffusion-DPO's logit."""
        logit, metrics = dpo_logit(evidence, self.beta)
        return Score(loss=-logsigmoid(less_margin(logit, evidence)), logit=logit, metrics=metrics)

    def _added(self, batch: PairBatch, s: NoiseSchedule, ascent: Ascent) -> Tensor:
        """What is added after each step, "step (side pair) c h w"; a draw for each step, so that t changes none."""
        steps, shape = int(ascent.steps.max()), batch.latents.shape
        if not steps:
            return batch.latents.new_empty((0, *batch.latents.flatten(0, 1).shape))
        draws = [normal(batch.keys, f"inversion {k}", (2, *shape[2:])).transpose(0, 1) for k in range(steps)]
        noise = torch.stack(draws).flatten(1, 2).to(batch.latents.device, non_blocking=True)
        return spread(inversion_std(s, ascent, self.eta).T[:steps], noise) * noise


def ascent_to(s: NoiseSchedule, t: Tensor, steps: int, grid: Grid) -> Ascent:
    """The way of both sides ("side pair" flattened) to the pair's t, on a grid of `steps` over all of the schedule.

    The exact one takes `steps` to T − 1 whether or not they divide T, and to a smaller t its share, rounded up; the
    released one is diffusers' grid, with its strides of ⌊T / steps⌋. Raises ValueError for more steps than timesteps.
    """
    steps_fit(s, steps)
    t = t.repeat(2)
    if grid == "released":
        return released_ascent(s, t, steps)
    return exact_ascent(t, -(-(t + 1) * steps // s.num_train_timesteps))


def inverted(
    batch: PairBatch,
    models: Models,
    t: Tensor,
    ascent: Ascent,
    inverter: Inverter,
    *,
    refine: Refinement | None = None,
    added: Tensor | None = None,
) -> Probe:
    """Each image inverted under its own prompt to the pair's t; the target is the noise that explains it there.

    Costs one forward without grad for each image and step of its ascent (and each refinement).
    """
    s, x0 = models.schedule, batch.latents.flatten(0, 1)
    network = models.policy if inverter == "policy" else models.reference
    xt = arrive(s, predictor(network, batch.cond.flatten()), x0, ascent, refine, added)
    sides = t.repeat(2)
    target = s.target(x0, s.implied_noise(x0, xt, sides), sides)
    return Probe(xt=xt.unflatten(0, (2, -1)), t=t, target=target.unflatten(0, (2, -1)), cond=batch.cond)


def steps_fit(s: NoiseSchedule, steps: int, what: str = "steps") -> None:
    """Raises ValueError for more inversion steps than the schedule has timesteps."""
    if steps > s.num_train_timesteps:
        raise DiffalignError(
            f"{what} = {steps}: the model's schedule has {s.num_train_timesteps} timesteps, and each inversion step is "
            f"at least one of them; set at most {s.num_train_timesteps}"
        )


def inversion_valid(steps: int, grid: str, inverter: str) -> None:
    """Raises ValueError for settings that no inversion has."""
    if steps < 1:
        raise DiffalignError(f"steps = {steps}: inversion takes at least one step")
    if grid not in get_args(Grid):
        raise DiffalignError(f"grid = {grid!r}: allowed are {', '.join(get_args(Grid))}")
    if inverter not in get_args(Inverter):
        raise DiffalignError(f"{inverter!r} is no network to invert with: allowed are policy and reference")
