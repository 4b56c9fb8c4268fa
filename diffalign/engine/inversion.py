"""DDIM inversion: from clean latents to noise, each latent on its own grid of noise levels.

    x_high = √ᾱ_high x̂_0 + √(1−ᾱ_high) ε,   x̂_0 = (x_low − √(1−ᾱ_low) ε) / √ᾱ_low,   ε = ε(x_low, high)

The network receives t of the level that a step leads to, as in diffusers' DDIMInverseScheduler and in the released
inversion methods. This is an explicit Euler step of the probability-flow ODE, of order one; `FixedPoint` makes it the
implicit step that a DDIM sampling step exactly reverses. For networks that predict noise, the step equals
DDIMInverseScheduler's. Predictions of velocities or clean images are converted to noise at the level whose t the
network received; that scheduler converts them at the level of the latent, and the difference shrinks with more steps.

Rows that have reached their last level leave the batch. A `Predict` receives the indices of the rows that remain. A
plain `eps_fn(x, t)` may depend on the whole batch, so it is always called with all of it.

Left out: steps of higher order, because the methods here are defined with this one; gradients through inversion.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from diffalign.engine.schedule import NoiseSchedule, spread
from diffalign.errors import DiffalignError

EpsFn = Callable[[Tensor, Tensor], Tensor]  # (x "n c h w", t int64 [n]) -> noise "n c h w"
# (x "m c h w", t int64 [m], rows int64 [m] of the batch, all on one device)
#     -> raw prediction of the schedule's type, "m c h w"
Predict = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Ascent:
    """The levels of every row: step k leads row i from t = low[i, k] to t = high[i, k]; row i takes steps[i] steps."""

    low: Tensor  # int64 [n, k], CPU; below 0: the clean image
    high: Tensor  # int64 [n, k], CPU
    steps: Tensor  # int64 [n], CPU
    clean: float  # ᾱ of the clean image


def exact_ascent(t: Tensor, steps: Tensor) -> Ascent:
    """From the clean image (ᾱ = 1) to exactly t, in `steps` [n] nearly equal steps of at least one timestep.

    It starts at ᾱ = 1, not at the final ᾱ of the config. The latter is often ᾱ_0 < 1, which fits the end of sampling.
    Raises DiffalignError for a negative t, and for a number of steps outside 1 … t + 1.
    """
    t, steps = t.cpu(), steps.cpu()
    if bool(((t < 0) | (steps < 1) | (steps > t + 1)).any()):
        raise DiffalignError(
            f"inversion needs t >= 0 and between 1 and t + 1 steps for every row, got t = {t.tolist()} with "
            f"{steps.tolist()} steps; change the numbers of steps"
        )
    k = torch.arange(int(steps.max()) + 1).clamp(max=steps[:, None])
    levels = (t[:, None] + 1) * k // steps[:, None] - 1
    return Ascent(low=levels[:, :-1], high=levels[:, 1:], steps=steps, clean=1.0)


def strided_ascent(t: Tensor, stride: int) -> Ascent:
    """`exact_ascent` in ⌈(t+1)/stride⌉ steps for each row. Raises DiffalignError for stride < 1 or a negative t."""
    if stride < 1 or bool((t < 0).any()):
        raise DiffalignError(f"inversion needs stride >= 1 and t >= 0, got stride = {stride} and t = {t.tolist()}")
    return exact_ascent(t, -(-(t + 1) // stride))


def released_ascent(s: NoiseSchedule, t: Tensor, steps: int) -> Ascent:
    """The grid of the released InPO, SmPO and Inversion-DPO: the sampler's timesteps below t, from ᾱ_0 on.

    It ends at the last of them below t, so the latent has less noise than t implies; where t is at most the first of
    them, no step is taken. t = T gives the whole grid. Use it to compare with the authors' numbers, else
    `exact_ascent`.
    """
    t = t.cpu()
    high = s.timesteps(steps).flip(0).expand(len(t), -1)
    return Ascent(
        low=high - s.num_train_timesteps // steps,
        high=high,
        steps=(high < t[:, None]).sum(1),
        clean=float(s.alphas_cumprod[0]),
    )


@dataclass(frozen=True)
class ReNoise:
    """A step uses the mean of the noise predicted at its start and at its provisional ends (arXiv 2403.14602).

    With one refinement, as in the released SmPO: ε1 at the start, ε2 where ε1 leads to, then the step with their mean.
    """

    refinements: int = 1  # provisional ends


@dataclass(frozen=True)
class FixedPoint:
    """A step uses the noise predicted at its own end, found by iteration: the inverse of a DDIM sampling step.

    Each row stops when the prediction changes by at most `tolerance` (root mean square), or after `limit` iterations.
    The iteration converges where the network is smooth on the scale of a step. Each iteration waits for the device.
    """

    tolerance: float = 1e-4
    limit: int = 50  # iterations


Refinement = ReNoise | FixedPoint


@dataclass(frozen=True)
class Rise:
    """One step of the rows that have not reached their last level."""

    index: int  # k
    rows: Tensor  # int64 [m], CPU: their indices in the batch
    high: Tensor  # int64 [m], CPU: t of the level it leads to, which the network received
    alpha_bar: tuple[Tensor, Tensor]  # ᾱ float64 [m], CPU: before and after
    before: Tensor  # "m c h w"
    after: Tensor  # "m c h w"
    eps: Tensor  # "m c h w", the noise of the step
    prediction: Tensor  # "m c h w", the raw prediction at `before`
    residual: Tensor | None  # [m], the last change of the prediction in FixedPoint


@torch.no_grad()
def ascend(
    s: NoiseSchedule,
    predict: Predict,
    x0: Tensor,
    ascent: Ascent,
    refine: Refinement | None = None,
    added: Tensor | None = None,
) -> Iterator[Rise]:
    """Inverts x_0 "n c h w" along an ascent and yields each step of the rows that remain.

    `added`, "step n c h w", is added to the latents after each step; for InPO's η it is `ddim.inversion_std` times a
    normal draw. Memory is that of one step. Store what is yielded if you need the trajectory.
    """
    x = x0.to(torch.promote_types(x0.dtype, torch.float32), copy=True)
    for k in range(int(ascent.steps.max())):
        rows = (ascent.steps > k).nonzero().flatten()
        low, high = ascent.low[rows, k], ascent.high[rows, k]
        below, above = torch.where(low < 0, ascent.clean, s.alpha_bar(low)), s.alpha_bar(high)
        here = beside(rows, x)
        start = _Start(s, predict, x[here], here, high, below, above)
        prediction = predict(start.x, beside(high, x), here)
        eps = s.to_eps(prediction, start.x, high)
        residual = None
        if isinstance(refine, ReNoise):
            eps = _averaged(start, eps, refine)
        elif isinstance(refine, FixedPoint):
            eps, residual = _fixed_point(start, eps, refine)
        after = start.end(eps)
        if added is not None:
            after = after + added[k][here]
        x[here] = after
        yield Rise(k, rows, high, (below, above), start.x, after, eps, prediction, residual)


def arrive(
    s: NoiseSchedule,
    predict: Predict,
    x0: Tensor,
    ascent: Ascent,
    refine: Refinement | None = None,
    added: Tensor | None = None,
) -> Tensor:
    """The last latent of every row in `ascend`, "n c h w", float32 or better."""
    x = x0.to(torch.promote_types(x0.dtype, torch.float32), copy=True)
    for rise in ascend(s, predict, x0, ascent, refine, added):
        x[beside(rise.rows, x)] = rise.after
    return x


def beside(index: Tensor, x: Tensor) -> Tensor:
    """A CPU index on the device of x; does not wait for the device."""
    return index.to(x.device, non_blocking=True)


def invert(
    s: NoiseSchedule, eps_fn: EpsFn, x0: Tensor, t: Tensor, stride: int = 100, refine: Refinement | None = None
) -> Tensor:
    """DDIM inversion of clean latents "n c h w" to exactly t [n], each in ⌈(t+1)/stride⌉ nearly equal steps.

    `eps_fn` returns noise for any prediction type of the schedule. It is called with the whole batch: rows that have
    reached their t are passed again with the x and t they reached, and their result is not used.

    Raises DiffalignError for a stride below 1 or a negative t.
    """
    in_noise = replace(s, prediction_type="epsilon")
    return arrive(in_noise, _whole_batch(eps_fn, x0), x0, strided_ascent(t, stride), refine)


def merged(rises: Iterable[Rise], substeps: int) -> Iterator[Rise]:
    """Every `substeps` steps as one, with the noise that leads from the end of the last back to the start of the first.

    That noise is a mean of the predictions along the steps. `prediction` is that of the first step. Each row must take
    a multiple of `substeps` steps.
    """
    if substeps == 1:
        yield from rises
        return
    for rise in rises:
        if rise.index % substeps == 0:
            first = rise
        if rise.index % substeps == substeps - 1:
            alpha_bar = (first.alpha_bar[0], rise.alpha_bar[1])
            eps = noise_between(first.before, rise.after, *alpha_bar)
            index, before = rise.index // substeps, first.before
            yield replace(rise, index=index, alpha_bar=alpha_bar, before=before, eps=eps, prediction=first.prediction)


def noise_between(x_low: Tensor, x_high: Tensor, below: Tensor, above: Tensor) -> Tensor:
    """The noise prediction with which a deterministic step leads exactly from x_high, at ᾱ `above`, to x_low.

    Between neighbouring levels it is a small difference of latents over a small difference of coefficients: precise in
    float64, a few digits in float32. Defined at ᾱ = 0 as well.
    """
    apart = (above * (1 - below)).sqrt() - (below * (1 - above)).sqrt()
    return spread(above.sqrt() / apart, x_low) * x_low - spread(below.sqrt() / apart, x_high) * x_high


def transition_target(
    s: NoiseSchedule, clean: Tensor, noisy: Tensor, below: Tensor, above: Tensor, t: Tensor
) -> Tensor:
    """The raw prediction at `noisy` with which a DDIM step leads exactly to `clean`, in the network's prediction type.

    ᾱ is `below` at the clean end and `above` at the noisy end, where the network receives t. Defined at ᾱ = 0 as well.
    """
    eps = noise_between(clean, noisy, below, above)
    if s.prediction_type == "epsilon":
        return eps
    x0 = (clean - spread((1 - below).sqrt(), eps) * eps) / spread(below.sqrt(), eps)
    return s.target(x0, eps, t)


@dataclass(frozen=True)
class _Start:
    """The start of a step, and all that its end depends on besides the noise."""

    s: NoiseSchedule
    predict: Predict
    x: Tensor
    rows: Tensor
    high: Tensor
    below: Tensor
    above: Tensor

    def end(self, eps: Tensor) -> Tensor:
        """The end of the step with the noise `eps`."""
        scale = (self.above / self.below).sqrt()
        shift = (1 - self.above).sqrt() - scale * (1 - self.below).sqrt()
        return spread(scale, self.x) * self.x + spread(shift, self.x) * eps

    def ask(self, x: Tensor) -> Tensor:
        """The noise predicted at x, with t of the step's upper level."""
        return self.s.to_eps(self.predict(x, beside(self.high, x), self.rows), x, self.high)

    def some(self, keep: Tensor) -> _Start:
        """The start of some of the rows."""
        part = (self.x[keep], self.rows[keep], self.high[keep], self.below[keep], self.above[keep])
        return _Start(self.s, self.predict, *part)


def _averaged(start: _Start, eps: Tensor, refine: ReNoise) -> Tensor:
    total = eps
    for _ in range(refine.refinements):
        eps = start.ask(start.end(eps))
        total = total + eps
    return total / (refine.refinements + 1)


def _fixed_point(start: _Start, eps: Tensor, refine: FixedPoint) -> tuple[Tensor, Tensor]:
    eps = eps.clone()
    residual = torch.full((len(eps),), torch.inf, dtype=torch.float64)
    moving = torch.arange(len(eps))
    for _ in range(refine.limit):
        part = start.some(moving)
        found = part.ask(part.end(eps[moving]))
        residual[moving] = (found - eps[moving]).double().square().flatten(1).mean(1).sqrt().cpu()
        eps[moving] = found
        moving = moving[residual[moving] > refine.tolerance]
        if not len(moving):
            break
    return eps, residual


def _whole_batch(eps_fn: EpsFn, x0: Tensor) -> Predict:
    """A plain function as a `Predict`; the other rows are passed with their last x and t."""
    x = x0.to(torch.promote_types(x0.dtype, torch.float32), copy=True)
    t = torch.zeros(len(x0), dtype=torch.int64, device=x0.device)

    def predict(some: Tensor, at: Tensor, rows: Tensor) -> Tensor:
        x[rows], t[rows] = some, at
        return eps_fn(x, t)[rows]

    return predict
