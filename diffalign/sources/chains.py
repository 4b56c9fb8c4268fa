"""One process's part of a round of SPO: branching chains from its prompts, and records of the pairs the judge found.

Every draw of a chain belongs to the visit of its prompt: neither the batch nor the number of processes changes what is
sampled, up to the rounding of kernels. A few chains are sampled at a time, without grad; each pool is decoded and
scored in one call.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from diffalign.data.loader.text import TextMemo
from diffalign.data.transforms import to_images
from diffalign.engine.predictor import predictor
from diffalign.engine.random import initial_noise, integers, normal, pair_key
from diffalign.io.progress import Progress
from diffalign.rewards import LatentScorer, Scorer
from diffalign.rewards.base import takes_timestep
from diffalign.sources.base import Context, SourceError
from diffalign.sources.branching import (
    Branching,
    Calls,
    Rule,
    Verdict,
    branching_chain,
    branchings,
    chain_levels,
    thresholds_by_noise,
)
from diffalign.sources.rounds import Place, Records, Rollout, join
from diffalign.sources.sampling import guidance_conditioning, sampled_geometry
from diffalign.types import Transitions


class ChainSettings(Protocol):
    """The settings of `rollout` that chains use; see there."""

    @property
    def rule(self) -> Rule: ...
    @property
    def num_candidates(self) -> int: ...
    @property
    def inner_steps(self) -> int: ...
    @property
    def sampling_steps(self) -> int: ...
    @property
    def plain_steps(self) -> int: ...
    @property
    def eta(self) -> float: ...
    @property
    def guidance_scale(self) -> float: ...
    @property
    def threshold(self) -> float: ...
    @property
    def threshold_max(self) -> float | None: ...
    @property
    def generation_batch_size(self) -> int: ...


class Chains:
    """The chains of one process."""

    def __init__(self, settings: ChainSettings, context: Context, judge: Scorer | LatentScorer) -> None:
        """Raises SourceError for prompt dropout, and for a schedule whose chain ends before its first branching.

        Raises ScorerError for a judge of noisy latents of another kind of model.
        """
        self.settings, self.context, self.judge = settings, context, judge
        self.text = TextMemo(context.encoder)
        levels = chain_levels(context.networks.schedule, settings.sampling_steps)
        steps = len(levels) - 1
        if settings.plain_steps >= steps:
            raise SourceError(
                f"source.plain_steps = {settings.plain_steps}: a chain on this model's schedule has {steps} steps with "
                "noise, and at least one must branch"
            )
        if context.spec.prompt_dropout > 0:
            raise SourceError(
                f"data.proportion_empty_prompts = {context.spec.prompt_dropout}: the steps of rollout were sampled "
                "under their prompts, and another prompt would judge them wrongly; set it to 0"
            )
        at = branchings(settings.rule, settings.plain_steps, steps, settings.inner_steps)
        low, high, s = settings.threshold, settings.threshold_max, context.networks.schedule
        if high is not None and steps < 2:
            raise SourceError(
                f"source.threshold_max = {high}: with source.sampling_steps = {settings.sampling_steps} a chain has "
                "one step with noise, and so no least and largest σ; sample more steps, or set it to null"
            )
        rising = () if high is None else thresholds_by_noise(s, levels, settings.eta, low, high)
        noisy = isinstance(judge, LatentScorer)
        self.branching = Branching(levels, at, settings.num_candidates, settings.eta, low, rising, noisy)
        if isinstance(judge, LatentScorer):
            judge.check_latents(context.family.name, context.latent_shape[0], s)
        self.takes_t = not isinstance(judge, LatentScorer) and takes_timestep(judge)

    def roll(self, number: int, places: list[Place]) -> Rollout:
        """The valid pairs of a round at these places."""
        members = self.settings.num_candidates
        at_once = max(1, self.settings.generation_batch_size // members)
        records: list[Records] = []
        metrics: dict[str, list[Tensor]] = {}
        with Progress(
            total=len(places) * members * len(self.branching.at),
            desc=f"round {number}",
            unit="img",
            leave=False,
            disable=not self.context.main,
        ) as bar:
            for start in range(0, len(places), at_once):
                some = places[start : start + at_once]
                for verdict in self._verdicts(some):
                    records.append(self._records(verdict, some))
                    for name, values in _metrics(verdict).items():
                        metrics.setdefault(name, []).append(values)
                    bar.set_postfix(valid=f"{float(torch.cat(metrics['rollout/valid']).mean()):.0%}", refresh=False)
                    bar.update(len(some) * members)
        return Rollout(join(records), {name: torch.cat(values) for name, values in metrics.items()})

    def _verdicts(self, places: Sequence[Place]) -> Iterator[Verdict]:
        """Those of one chain at each place."""
        c, own = self.context, self.settings
        prompts = tuple(place.prompt for place in places)
        cond, null = guidance_conditioning(c.encoder, self.text, prompts, own.guidance_scale, c.resolution)
        keys = torch.tensor([pair_key(c.spec.run_seed, place.id, place.number) for place in places])

        def noise(i: int, members: int) -> Tensor:
            draws = normal(keys, f"step {i}", (members, *c.latent_shape))
            return draws.transpose(0, 1).to(c.device, non_blocking=True)

        calls = Calls(
            predict=predictor(c.networks.policy, cond, own.guidance_scale, null),
            judge=lambda latents, t: self._scores(latents, t, places),
            noise=noise,
            pick=lambda i, members: integers(keys, f"continued {i}", 0, members),
        )
        start = initial_noise(prompts, self._seeds(places), c.latent_shape).to(c.device)
        return branching_chain(c.networks.schedule, start, calls, self.branching)

    def _seeds(self, places: Sequence[Place]) -> list[int]:
        """Of the chains' starting noise."""
        return [place.seed(self.context.spec.run_seed, 0) for place in places]

    def _scores(self, latents: Tensor, t: int, places: Sequence[Place]) -> Tensor:
        """The judge's value "member prompt" of each latent of a pool: of the decoded x̂_0, or of x_t as it is.

        A judge of intermediate steps gets t.

        Raises SourceError for a score that is not finite.
        """
        members = len(latents)
        prompts, seeds = [place.prompt for place in places] * members, self._seeds(places) * members
        times = torch.full((len(prompts),), t)
        if isinstance(self.judge, LatentScorer):
            scores = self.judge.score_latents(latents.flatten(0, 1), prompts, times).double().cpu()
        else:
            images = to_images(self.context.encoder.decode(latents.flatten(0, 1)), prompts, seeds)
            scores = self.judge.score(images, prompts, *((times,) if self.takes_t else ())).double().cpu()
        broken = (~scores.isfinite()).nonzero().flatten().tolist()
        if broken:
            raise SourceError(
                f"scorer '{self.judge.name}' gave {float(scores[broken[0]])} to the image of prompt "
                f"{prompts[broken[0]]!r} at t = {t}, seed {seeds[broken[0]]}; a score must be a finite number"
            )
        return scores.view(members, -1)

    def _records(self, verdict: Verdict, places: Sequence[Place]) -> Records:
        """Every step of the valid pairs of a verdict, on the CPU."""
        who, steps = verdict.valid.nonzero().flatten(), len(verdict.levels) - 1
        there = who.to(verdict.path.device)
        found = [places[i] for i in who.tolist()]
        sides = 1 if self.settings.rule == "every_step" else 2  # how many x_t a pair has: siblings start from one

        def each(values: Tensor) -> Tensor:  # "... pair" or "side pair ..." -> as many for each of its steps
            return values.repeat_interleave(steps, min(1, values.ndim - 1))

        path = verdict.path[:, there].float().cpu()
        moves = Transitions(
            noisy=path[:sides, :, :-1].flatten(1, 2),
            clean=path[:, :, 1:].flatten(1, 2),
            t=verdict.levels[:-1].repeat(len(who)),
            t_prev=verdict.levels[1:].repeat(len(who)),
        )
        return Records(
            prompt=each(torch.tensor([place.row for place in found], dtype=torch.int64)),
            place=each(torch.tensor([place.number for place in found], dtype=torch.int64)),
            index=(verdict.index + torch.arange(steps)).repeat(len(who)),
            latents=each(verdict.judged[:, there].float().cpu()),
            geometry=sampled_geometry(self.context.resolution, len(who) * steps)[None],
            seeds=each(torch.tensor(self._seeds(found), dtype=torch.int64)).expand(2, -1),
            scores=each(verdict.scores[:, who].float()),
            transitions=moves,
        )


def _metrics(verdict: Verdict) -> dict[str, Tensor]:
    """Of all comparisons, valid or not; and the judge's scores of finished images."""
    found = {"rollout/valid": verdict.valid.double(), "rollout/gap": verdict.scores[0] - verdict.scores[1]}
    return found | ({"rollout/score": verdict.scores.flatten()} if verdict.t == 0 else {})
