"""The branching DDIM chain of SPO (arXiv 2406.04314): pools of siblings, judged, and one of them continued at random.

A chain runs down the levels. At a branching step one mean serves n draws of noise, and the pool goes on as n members;
at the next branching step (or at the end) all are judged by the image each aims at, best and worst become chosen and
rejected of every step since the branching, and one member, drawn at random, is continued.

    every_step    branches at every step from the first on: each judgement is about one step from a shared x_t  (SD1.5)
    inner_steps   m further steps between branchings: each judgement is about m + 1 steps; only the first of them starts
                  from a shared x_t. As in the release, the last step never branches: with m = 0 it joins the step
                  before it                                                                                      (SDXL)

A judge of noisy latents (LPO, arXiv 2502.01051) compares the pool as it is, x_t at the level that it has reached: the
network is then asked for the one member that goes on, and for no other.

Plain control flow on functions: no network, no decoder and no random number is made here, so that recorded draws replay
exactly. A chain takes a batch of prompts at once; prompts never mix.

Differs from the released code (RockeyCoss/SPO): none in the values. The network's answer for the member that is
continued is used again, as there: no step is computed twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from diffalign.engine import ddim
from diffalign.engine.inversion import Predict
from diffalign.engine.schedule import NoiseSchedule, spread

Rule = Literal["every_step", "inner_steps"]
Judge = Callable[[Tensor, int], Tensor]  # ("member prompt c h w" x̂_0, or x_t; t of the step) -> "member prompt"
Noise = Callable[[int, int], Tensor]  # (index of the step, members) -> "member prompt c h w"
Pick = Callable[[int, int], Tensor]  # (index of the step, members) -> int64 [prompt]: who is continued


@dataclass(frozen=True)
class Verdict:
    """One branching of every prompt: the steps of chosen and rejected until they were judged."""

    levels: Tensor  # int64 [level], CPU: t before the branching step, and after each step since
    path: Tensor  # "side prompt level c h w"; at the first level the sides are equal
    judged: Tensor  # "side prompt c h w", the latents that the judge saw: x̂_0, or x_t where it sees noisy ones
    scores: Tensor  # "side prompt", CPU: of the chosen and of the rejected
    valid: Tensor  # bool [prompt], CPU: whether they differ by enough
    index: int  # of the branching step
    t: int  # the noise level of the judged latents; 0: finished images


def chain_levels(s: NoiseSchedule, steps: int) -> Tensor:
    """The sampling grid with t = 0 at its end: every step ends at a level that has noise, and so has a density."""
    grid = s.timesteps(steps)
    return grid if int(grid[-1]) == 0 else torch.cat([grid, grid.new_zeros(1)])


def branchings(rule: Rule, first: int, steps: int, inner_steps: int) -> tuple[int, ...]:
    """The indices of the branching steps among `steps`; `first` is the number of plain steps before."""
    if rule == "every_step":
        return tuple(range(first, steps))
    return tuple(range(first, max(steps - 1, first + 1), inner_steps + 1))


def thresholds_by_noise(s: NoiseSchedule, levels: Tensor, eta: float, low: float, high: float) -> tuple[float, ...]:
    """A threshold for each step of a chain, linear in the standard deviation σ of the step: `low` to `high`.

    low is that of the step with the least noise, high that of the step with the most. Source: LPO (arXiv 2502.01051);
    the release has a table of the σ of 20 steps, which these are for its schedule.
    """
    sigma = ddim.variance(s, levels[:-1], levels[1:], eta).sqrt()
    share = (sigma - sigma.min()) / (sigma.max() - sigma.min())
    return tuple((low + share * (high - low)).tolist())


class Comparison(NamedTuple):
    """Best and worst member of each pool, int64 [prompt], and whether the two differ by enough, bool [prompt]."""

    best: Tensor
    worst: Tensor
    valid: Tensor
    scores: Tensor  # float64 "member prompt", CPU: what was compared


def compare_candidates(scores: Tensor, threshold: float) -> Comparison:
    """Best and worst member of each pool of scores "member prompt", on the CPU.

    Enough: the probabilities that a Bradley-Terry model gives the two differ by more than the threshold, which is
    tanh((best − worst)/2).
    """
    scores = scores.cpu().double()
    best, worst = scores.max(0), scores.min(0)
    valid = torch.tanh((best.values - worst.values) / 2) > threshold
    return Comparison(best.indices, worst.indices, valid, scores)


@dataclass(frozen=True)
class Branching:
    """The steps at which a chain branches, and the differences of scores that count."""

    levels: Tensor  # int64 [level]: t before each step, and after the last
    at: tuple[int, ...]  # indices of the branching steps
    num_candidates: int  # members of a pool
    eta: float  # share of DDPM's noise in every step
    threshold: float  # see `compare_candidates`
    thresholds: tuple[float, ...] = ()  # of every step, where they differ: that of the branching step is in force
    noisy: bool = False  # the judge sees x_t, not x̂_0

    def threshold_at(self, index: int) -> float:
        """The least difference that counts for a pool that branched at the step of this index."""
        return self.thresholds[index] if self.thresholds else self.threshold


@dataclass(frozen=True)
class Calls:
    """The functions that a chain calls: the network, the judge, and the draws."""

    predict: Predict  # asked for the members of a step in one batch, member-major, with the prompt of each row
    judge: Judge  # asked once for a pool
    noise: Noise
    pick: Pick


@torch.no_grad()
def branching_chain(s: NoiseSchedule, x: Tensor, calls: Calls, branching: Branching) -> Iterator[Verdict]:
    """Samples one chain for each row of x "prompt c h w", pure noise at the first level, and yields its verdicts.

    The last pool is judged as it is, at t = 0.
    """
    levels, prompts = branching.levels, torch.arange(len(x), device=x.device)
    path: list[Tensor] = []
    here, start = x[None], 0

    def verdict(end: int, judged: Tensor, t: int) -> Verdict:
        found = compare_candidates(calls.judge(judged, t), branching.threshold_at(start))
        return _verdict(path, levels[start:end], start, judged, found, t)

    for i, (t, t_next) in enumerate(zip(levels[:-1].tolist(), levels[1:].tolist(), strict=True)):
        ends = i in branching.at and bool(path)
        if ends and branching.noisy:
            yield verdict(i + 1, here, t)
            here = _member(here, calls.pick(i, len(here)), prompts)
        answer = _answer(s, calls.predict, here, t, prompts)
        if ends and not branching.noisy:
            yield verdict(i + 1, answer.x0, t)
            answer = answer.member(calls.pick(i, len(here)), prompts)
        if i in branching.at:
            path, start = [answer.x], i
        members = branching.num_candidates if i in branching.at else len(here)
        here = _moved(s, answer, t, t_next, branching.eta, calls.noise(i, members))
        if path:
            path.append(here)
    if path:
        yield verdict(len(levels), here, 0)


@dataclass(frozen=True)
class _Answer:
    """The network's answer for the members of a step; each "member prompt c h w"."""

    x: Tensor
    eps: Tensor
    x0: Tensor

    def member(self, index: Tensor, prompts: Tensor) -> _Answer:
        """One member of each prompt's, as a pool of one."""
        return _Answer(*(_member(part, index, prompts) for part in (self.x, self.eps, self.x0)))


def _member(pool: Tensor, index: Tensor, prompts: Tensor) -> Tensor:
    """One member of each prompt's pool "member prompt c h w", as a pool of one."""
    return pool[index.to(prompts.device, non_blocking=True), prompts][None]


def _answer(s: NoiseSchedule, predict: Predict, x: Tensor, t: int, prompts: Tensor) -> _Answer:
    rows, flat = prompts.repeat(len(x)), x.flatten(0, 1)
    times = torch.full((len(rows),), t, dtype=torch.int64)
    there = times.to(x.device, non_blocking=True)
    raw = predict(flat, there, rows)
    eps, x0 = s.to_eps(raw, flat, times), s.to_x0(raw, flat, times)
    return _Answer(x, *(part.unflatten(0, x.shape[:2]) for part in (eps, x0)))


def _moved(s: NoiseSchedule, answer: _Answer, t: int, t_next: int, eta: float, noise: Tensor) -> Tensor:
    """All members one step on, each with its own noise; a pool of one with several draws becomes their pool."""
    lead = answer.x.shape[:2]
    times, after = (torch.full(lead, level, dtype=torch.int64) for level in (t, t_next))
    step = ddim.step(s, answer.eps, answer.x, times, after, eta, x0=answer.x0)
    return step.mean + spread(step.std.expand(noise.shape[:2]), noise) * noise


def _verdict(path: list[Tensor], levels: Tensor, index: int, judged: Tensor, found: Comparison, t: int) -> Verdict:
    sides, prompts = torch.stack([found.best, found.worst]), torch.arange(len(found.best))
    where = sides.to(judged.device, non_blocking=True), prompts.to(judged.device, non_blocking=True)
    first = path[0].expand(2, *path[0].shape[1:])
    later = [members[where] for members in path[1:]]
    return Verdict(
        levels=levels,
        path=torch.stack([first, *later], dim=2),
        judged=judged[where],
        scores=found.scores[sides, prompts],
        valid=found.valid,
        index=index,
        t=t,
    )
