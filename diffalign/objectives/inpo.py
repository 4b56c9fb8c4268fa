"""InPO / DDIM-InPO (Lu et al., arXiv 2503.18454): Diffusion-DPO at the noise that inversion finds for each image.

    x_t = DDIM inversion of x_0 to t,   τ = (x_t − a_t x_0) / s_t
    L   = −log σ( −(β/2) · (D^c − D^r) ),   D = E_policy − E_reference at x_t with target τ

The target is not a drawn noise: τ is the noise with x_t = a_t x_0 + s_t τ exactly. The sides of a pair share t but not
τ. After every inversion step, η·σ times a normal draw is added, independently for the sides. The loss, its log 2 at
the start and its metrics are Diffusion-DPO's.

Differs from the released code (JaydenLyh/InPO, train.py), with `grid: exact`:
- the latent ends exactly at t, in nearly equal integer steps from the clean image; there, it ends at the last grid
  level below t (or above it, with older diffusers), while network and τ use t;
- t belongs to the pair; there, the whole batch is inverted with the first pair's t;
- every t works; there, an index error ends the run for t > 901 on current diffusers;
- ᾱ is float64; there, float16, which is wrong by 15 % at small t.
`grid: released` takes over the first point alone, to compare numbers. `steps` is 40 here and 10 there: 10 steps lower
the reward in the one world where it can be measured (docs/inversion.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from diffalign.engine.ddim import inversion_std
from diffalign.engine.inversion import Ascent, arrive, exact_ascent, released_ascent
from diffalign.engine.measure import Models, Network
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
    steps: int = 40  # inversion steps to t = T − 1, proportionally fewer to a smaller t. The release: 10
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
    takes_safeguard: ClassVar[bool] = True

    def __post_init__(self) -> None:
        positive("beta", self.beta)
        inversion_valid(self.steps, self.grid, self.inverter)
        if not 0 <= self.eta <= 1:
            raise DiffalignError(
                f"eta = {self.eta}: must be in [0, 1]; 0 is deterministic inversion, the paper uses 0.1"
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
        predict = predictor(inverting(models, self.inverter), batch.cond.flatten())
        xt = arrive(models.schedule, predict, batch.latents.flatten(0, 1), ascent, added=added)
        return explained(batch, models.schedule, t, xt)

    def score(self, evidence: Evidence) -> Score:
        """−log σ of Diffusion-DPO's logit."""
        logit, metrics = dpo_logit(evidence, self.beta)
        return Score(loss=-logsigmoid(less_margin(logit, evidence)), logit=logit, metrics=metrics)

    def _added(self, batch: PairBatch, s: NoiseSchedule, ascent: Ascent) -> Tensor:
        """The noise to add after each step, "step (side pair) c h w"; step k has the same draw for any t."""
        steps, shape = int(ascent.steps.max()), batch.latents.shape
        if not steps:
            return batch.latents.new_empty((0, *batch.latents.flatten(0, 1).shape))
        draws = [normal(batch.keys, f"inversion {k}", (2, *shape[2:])).transpose(0, 1) for k in range(steps)]
        noise = torch.stack(draws).flatten(1, 2).to(batch.latents.device, non_blocking=True)
        return spread(inversion_std(s, ascent, self.eta).T[:steps], noise) * noise


def ascent_to(s: NoiseSchedule, t: Tensor, steps: int, grid: Grid) -> Ascent:
    """The ascent of both sides, flattened to "(side pair)", to the pair's t on a grid of `steps` over the schedule.

    The exact grid has `steps` steps to T − 1, also if they do not divide T, and proportionally fewer to a smaller t,
    rounded up. The released grid is diffusers', with strides of ⌊T / steps⌋.
    Raises DiffalignError for more steps than timesteps.
    """
    steps_fit(s, steps)
    t = t.repeat(2)
    if grid == "released":
        return released_ascent(s, t, steps)
    return exact_ascent(t, -(-(t + 1) * steps // s.num_train_timesteps))


def inverting(models: Models, inverter: Inverter) -> Network:
    """The network whose predictions invert."""
    return models.policy if inverter == "policy" else models.reference


def explained(batch: PairBatch, s: NoiseSchedule, t: Tensor, xt: Tensor) -> Probe:
    """The probe at inverted latents "(side pair) c h w"; its target is the noise that leads from x_0 to x_t."""
    xt, t_sides = xt.unflatten(0, (2, -1)), t.expand(2, -1)
    target = s.target(batch.latents, s.implied_noise(batch.latents, xt, t_sides), t_sides)
    return Probe(xt=xt, t=t, target=target, cond=batch.cond)


def steps_fit(s: NoiseSchedule, steps: int, what: str = "steps") -> None:
    """Raises DiffalignError for more inversion steps than the schedule has timesteps."""
    if steps > s.num_train_timesteps:
        raise DiffalignError(
            f"{what} = {steps}: the model's schedule has {s.num_train_timesteps} timesteps, and an inversion step "
            f"spans at least one of them; set at most {s.num_train_timesteps}"
        )


def inversion_valid(steps: int, grid: str, inverter: str) -> None:
    """Raises DiffalignError for less than one step, an unknown grid, or an unknown network to invert with."""
    if steps < 1:
        raise DiffalignError(f"steps = {steps}: inversion needs at least one step")
    if grid not in get_args(Grid):
        raise DiffalignError(f"grid = {grid!r}: allowed are {', '.join(get_args(Grid))}")
    if inverter not in get_args(Inverter):
        raise DiffalignError(f"{inverter!r} is not a network to invert with: allowed are policy and reference")
