"""DDIM inversion: clean latents on their way up to noise, each on its own grid of levels.

    x_high = √ᾱ_high x̂_0 + √(1−ᾱ_high) ε,   x̂_0 = (x_low − √(1−ᾱ_low) ε) / √ᾱ_low,   ε = ε(x_low, high)

Every step asks at the level it goes to, as diffusers' DDIMInverseScheduler and the released inversion methods do: an
explicit Euler step of the probability-flow ODE, of order one. `FixedPoint` makes it the implicit step that DDIM
sampling undoes exactly. For networks that predict noise the step is DDIMInverseScheduler's. A velocity or a clean
image is turned into noise at the level that the network was asked at; that scheduler does it at the level the latent
is at, so its steps differ there, by less with more of them.

Rows that have arrived drop out of the batch. A function that is to follow takes the surviving rows' indices
(`Predict`); a plain `eps_fn(x, t)` may close over something of the whole batch and is always asked for all of it.

Left out: steps of higher order (the methods here are defined by this one), and keeping graphs through inversion.
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
    """The levels of every row: step k takes row i from low[i, k] to high[i, k], and steps[i] of them are taken."""

    low: Tensor  # int64 [n, k], CPU; below 0: the clean image
    high: Tensor  # int64 [n, k], CPU
    steps: Tensor  # int64 [n], CPU
    clean: float  # ᾱ of the clean image


def exact_ascent(t: Tensor, steps: Tensor) -> Ascent:
    """From the clean image (ᾱ = 1) to exactly t, in `steps` [n] nearly equal integer steps, all at least one wide.

    The final ᾱ of many configs is ᾱ_0 < 1: right for the end of sampling, wrong for a clean start.
    Raises ValueError for a negative t or a number of steps outside 1 … t + 1.
    """
    t, steps = t.cpu(), steps.cpu()
    if bool(((t < 0) | (steps < 1) | (steps > t + 1)).any()):
        raise DiffalignError(
            f"inversion needs t >= 0 and between 1 and t + 1 steps for every row, got t = {t.tolist()} with "
            f"{steps.tolist()} steps"
        )
    k = torch.arange(int(steps.max()) + 1).clamp(max=steps[:, None])
    levels = (t[:, None] + 1) * k // steps[:, None] - 1
    return Ascent(low=levels[:, :-1], high=levels[:, 1:], steps=steps, clean=1.0)


def strided_ascent(t: Tensor, stride: int) -> Ascent:
    """The exact ascent with ⌈(t+1)/stride⌉ steps for each row. Raises ValueError for stride < 1 or a negative t."""
    if stride < 1 or bool((t < 0).any()):
        raise DiffalignError(f"inversion needs stride >= 1 and t >= 0, got stride = {stride}, t = {t.tolist()}")
    return exact_ascent(t, -(-(t + 1) // stride))


def released_ascent(s: NoiseSchedule, t: Tensor, steps: int) -> Ascent:
    """The grid of the released InPO, SmPO and Inversion-DPO: the sampler's own timesteps below t, from ᾱ_0 on.

    It stops at the last grid level below t, so the latent is cleaner than t says; with t ≤ the first level no step
    is taken at all. Pass t = T for the whole grid. For comparison with the authors' numbers; use `exact_ascent`.
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
    """Moves by the mean of the predictions at a step's start and at its provisional ends (arXiv 2403.14602).

    With one refinement, as in the released SmPO: ε1 at the start, ε2 where ε1 leads, step with their mean.
    """

    refinements: int = 1


@dataclass(frozen=True)
class FixedPoint:
    """Moves by the prediction at the step's own end, found by iteration: the inverse of a DDIM sampling step.

    Rows stop iterating, one by one, when the prediction changes by no more than `tolerance` (root mean square) or
    after `limit` iterations; the iteration converges where the network is smooth on the scale of a step. Reads a
    number back from the device at every iteration.
    """

    tolerance: float = 1e-4
    limit: int = 50


Refinement = ReNoise | FixedPoint


@dataclass(frozen=True)
class Rise:
    """One step of the rows that are still on their way."""

    index: int  # k
    rows: Tensor  # int64 [m], CPU: which rows of the batch
    high: Tensor  # int64 [m], CPU: where it leads, and the t that the network was told
    alpha_bar: tuple[Tensor, Tensor]  # ᾱ float64 [m], CPU: before and after
    before: Tensor  # "m c h w"
    after: Tensor  # "m c h w"
    eps: Tensor  # "m c h w", the noise it moved by
    prediction: Tensor  # "m c h w", the raw prediction at `before`
    residual: Tensor | None  # [m], FixedPoint's last change of the prediction


@torch.no_grad()
def ascend(
    s: NoiseSchedule,
    predict: Predict,
    x0: Tensor,
    ascent: Ascent,
    refine: Refinement | None = None,
    added: Tensor | None = None,
) -> Iterator[Rise]:
    """Takes x_0 up its ascent, one step of all surviving rows at a time.

    `added`, "step n c h w", is added to the latents after each step: `ddim.inversion_std` times a normal draw, for
    InPO's η. Memory is that of one step; who wants the trajectory keeps what is yielded.
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
    """Where `ascend` ends, for every row: "n c h w"."""
    x = x0.to(torch.promote_types(x0.dtype, torch.float32), copy=True)
    for rise in ascend(s, predict, x0, ascent, refine, added):
        x[beside(rise.rows, x)] = rise.after
    return x


def beside(index: Tensor, x: Tensor) -> Tensor:
    """An index from the CPU on the device of x, without waiting for that device."""
    return index.to(x.device, non_blocking=True)


def invert(
    s: NoiseSchedule, eps_fn: EpsFn, x0: Tensor, t: Tensor, stride: int = 100, refine: Refinement | None = None
) -> Tensor:
    """DDIM inversion of clean latents to exactly t, each sample in ⌈(t+1)/stride⌉ nearly equal integer steps.

    `eps_fn` answers with noise, whatever the schedule's prediction type, and is asked for the whole batch each time:
    samples that have arrived are asked again at the t and x they reached, and the answer is not used.

    Raises ValueError for a stride below 1 or a negative t.
    """
    in_noise = replace(s, prediction_type="epsilon")
    return arrive(in_noise, _whole_batch(eps_fn, x0), x0, strided_ascent(t, stride), refine)


def merged(rises: Iterable[Rise], substeps: int) -> Iterator[Rise]:
    """Every `substeps` steps as one, with the noise that leads from the end of the last to the start of the first.

    A transition of a finer path: its noise is the mean of the predictions along it, not the one at its start. Rows
    must take a multiple of `substeps` steps. `prediction` is that of the first.
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
    """The noise prediction with which a deterministic step leads from x_high, at ᾱ `above`, exactly to x_low.

    Between neighbouring levels it is a small difference of latents over a small difference of coefficients: exact in
    float64, a few digits in float32. Defined at ᾱ = 0, too.
    """
    apart = (above * (1 - below)).sqrt() - (below * (1 - above)).sqrt()
    return spread(above.sqrt() / apart, x_low) * x_low - spread(below.sqrt() / apart, x_high) * x_high


def transition_target(
    s: NoiseSchedule, clean: Tensor, noisy: Tensor, below: Tensor, above: Tensor, t: Tensor
) -> Tensor:
    """What the network would have to answer at `noisy` for a DDIM step to lead to `clean` exactly.

    ᾱ is `below` at the clean end and `above` at the noisy one, which the network is told is at t. In the network's
    own prediction space, and defined at ᾱ = 0 too.
    """
    eps = noise_between(clean, noisy, below, above)
    if s.prediction_type == "epsilon":
        return eps
    x0 = (clean - spread((1 - below).sqrt(), eps) * eps) / spread(below.sqrt(), eps)
    return s.target(x0, eps, t)


@dataclass(frozen=True)
class _Start:
    """Where a step starts, and all that its end depends on besides the noise."""

    s: NoiseSchedule
    predict: Predict
    x: Tensor
    rows: Tensor
    high: Tensor
    below: Tensor
    above: Tensor

    def end(self, eps: Tensor) -> Tensor:
        """The end of the step that moves by `eps`."""
        scale = (self.above / self.below).sqrt()
        shift = (1 - self.above).sqrt() - scale * (1 - self.below).sqrt()
        return spread(scale, self.x) * self.x + spread(shift, self.x) * eps

    def ask(self, x: Tensor) -> Tensor:
        """The noise predicted at x on the step's upper level."""
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
    """A plain function as a `Predict`; rows that are not asked for keep their last x and t."""
    x = x0.to(torch.promote_types(x0.dtype, torch.float32), copy=True)
    t = torch.zeros(len(x0), dtype=torch.int64, device=x0.device)

    def predict(some: Tensor, at: Tensor, rows: Tensor) -> Tensor:
        x[rows], t[rows] = some, at
        return eps_fn(x, t)[rows]

    return predict
