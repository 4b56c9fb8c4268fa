"""Self-play: winners are given; a snapshot of the policy makes the images they are compared with (SePPO, SPIN).

    history H = [start]
    iteration k    reference ~ H: the start, the latest, or one at random
                   a pool of winners, and for each an image that this reference makes of its prompt
                   U optimiser steps on the pool, with fresh timesteps and noise at every visit
                   H gets the policy as it is now

The reference makes the images and gives the errors that the policy is compared with. The number of iterations is
`training.max_train_steps` / U. Paper: SePPO (Zhang et al., arXiv 2410.05255), algorithm 1; with `reference: latest` and
the objective's `flip: none`, SPIN-Diffusion (Yuan et al., arXiv 2402.10210).

Differs from the paper, whose code was not released: it does not say how images are sampled, here as `evaluation`
samples them (DDIM with guidance); images are reused within an iteration, because one for every visit would cost
several times the training; a winner's latent is drawn once an iteration.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

from diffalign.engine.random import generator, pair_key
from diffalign.errors import DiffalignError
from diffalign.objectives.base import Compared, positive
from diffalign.sources.base import Context, Settings, Source, SourceError, at_least

if TYPE_CHECKING:
    from pathlib import Path

HISTORY = "history"  # folder of the snapshots, inside the source's
CHOICES = ("initial", "latest", "random")


@dataclass(frozen=True)
class SelfPlay:
    """Each iteration: winners against images of a snapshot of the policy."""

    reference: Literal["initial", "latest", "random"] = "random"  # the paper's best; latest is SPIN's
    updates_per_iteration: int = 30  # optimiser steps, U; the paper: 30, and 7 iterations
    images_per_iteration: int = 1024  # winners in an iteration's pool, over all processes; our choice
    sampling_steps: int = 25  # DDIM; our choice
    guidance_scale: float = 5.0  # of sampling; at most 1: none. SD1.5 is usually sampled with 7.5
    generation_batch_size: int = 8  # images sampled at a time, per process
    keep_rounds: bool = False  # keep every iteration's pool instead of those that a checkpoint needs

    name: ClassVar[str] = "selfplay"
    paper: ClassVar[str] = "Zhang et al., SePPO: Semi-Policy Preference Optimization, arXiv 2410.05255"
    data: ClassVar[Literal["prompts", "winners"]] = "winners"
    gives: ClassVar[Compared] = "images"
    own_reference: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.reference not in CHOICES:
            raise DiffalignError(f"reference = {self.reference!r}; allowed: {', '.join(CHOICES)}")
        at_least("updates_per_iteration", self.updates_per_iteration, 1)
        at_least("images_per_iteration", self.images_per_iteration, 1)
        at_least("sampling_steps", self.sampling_steps, 1)
        at_least("generation_batch_size", self.generation_batch_size, 1)
        positive("guidance_scale", self.guidance_scale)

    def build(self, context: Context) -> Source:
        """The source of a run."""
        from diffalign.sources.rounds import Place, Rollout, fingerprint
        from diffalign.sources.sampling import LatentSampling
        from diffalign.sources.stream import RoundPairs, RoundSpec
        from diffalign.sources.winners import against_winners

        former = context.former
        if former is None:
            raise SourceError("selfplay needs a reference that can be any snapshot of the policy; this run has none")

        def enter(iteration: int, fresh: bool) -> None:
            if fresh and iteration and self.reference != "initial":
                former.save(_policy(context.folder, iteration), context.main)
                context.wait()
            entry = self.entry(context.spec.run_seed, iteration)
            former.load(_policy(context.folder, entry) if entry else None)

        def roll(iteration: int, places: list[Place]) -> Rollout:
            title = f"iteration {iteration}"
            sampling = LatentSampling(self.sampling_steps, self.guidance_scale, self.generation_batch_size, title)
            return against_winners(context, source.text, places, sampling)

        spec = RoundSpec(
            key=fingerprint(self, context.table.identity, context.spec.run_seed, context.resolution),
            prompts_per_round=self.images_per_iteration,
            steps_per_round=self.updates_per_iteration,
            keep_rounds=self.keep_rounds,
            remedy="none of their images could be read; are they still there?",
        )
        source = RoundPairs(context, spec, roll, enter)
        return source

    def entry(self, seed: int, iteration: int) -> int:
        """The policy that is the reference: 0 is the start, k the one after k iterations."""
        if self.reference == "random":
            import torch

            chance = generator(pair_key(seed, "reference", iteration), "history")
            return int(torch.randint(0, iteration + 1, (), generator=chance))
        return 0 if self.reference == "initial" else iteration

    def small(self) -> Settings:
        """One winner."""
        return replace(self, images_per_iteration=1, updates_per_iteration=1, generation_batch_size=1)


def _policy(folder: Path, entry: int) -> Path:
    return folder / HISTORY / f"policy-{entry:05d}"
