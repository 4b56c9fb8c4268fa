"""K images of each prompt by the current policy, and their scores."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from diffalign.data.transforms import to_images
from diffalign.engine.measure import Network
from diffalign.models.loading.encoder import Encoder
from diffalign.rewards import Scorer, load_scorer
from diffalign.sources.base import CandidateSettings, Context, SourceError
from diffalign.sources.rounds import Place, Records, Rollout, fingerprint
from diffalign.sources.sampling import LatentSampling, sample_latents, sampled_geometry
from diffalign.sources.stream import Grade, RoundPairs, RoundSpec


@dataclass(frozen=True)
class Candidates:
    """The images of some places; entry [i, k] is image k at place i."""

    places: list[Place]
    latents: Tensor  # "place k c h w"
    seeds: Tensor  # int64 "place k"
    scores: Tensor  # float32 "place k"


def sample_candidates(
    context: Context,
    sample: Callable[[list[str], list[int]], Tensor],
    judge: Scorer,
    places: list[Place],
    samples_per_prompt: int,
    batch_size: int,
) -> Candidates:
    """Samples, decodes and scores; raises SourceError when a score is not finite.

    sample: prompts and seeds of the starting noise -> latents "n c h w". batch_size: of decoding and scoring.
    """
    prompts = [place.prompt for place in places for _ in range(samples_per_prompt)]
    seeds = [place.seed(context.spec.run_seed, k) for place in places for k in range(samples_per_prompt)]
    latents = sample(prompts, seeds)
    scores = score_latents(context.encoder, judge, latents, prompts, seeds, batch_size)
    shape = (len(places), samples_per_prompt)
    return Candidates(
        places=places,
        latents=latents.unflatten(0, shape),
        seeds=torch.tensor(seeds, dtype=torch.int64).view(shape),
        scores=scores.view(shape),
    )


def score_latents(
    encoder: Encoder, judge: Scorer, latents: Tensor, prompts: list[str], seeds: list[int], batch_size: int
) -> Tensor:
    """The scorer's value float32 [n] of each decoded latent. Raises SourceError when one is not finite."""
    scores = torch.empty(len(latents))
    for start in range(0, len(latents), batch_size):
        part = slice(start, start + batch_size)
        images = to_images(encoder.decode(latents[part]), prompts[part], seeds[part])
        scores[part] = judge.score(images, prompts[part]).float().cpu()
    broken = (~scores.isfinite()).nonzero().flatten().tolist()
    if broken:
        raise SourceError(
            f"scorer '{judge.name}' gave {float(scores[broken[0]])} to the image of prompt {prompts[broken[0]]!r}, "
            f"seed {seeds[broken[0]]}; a score must be a finite number"
        )
    return scores


def chosen_records(resolution: int, found: Candidates, rows: list[int], picks: Tensor) -> Records | None:
    """Records of the candidates `picks` int64 "row side" at the places `rows`, chosen first; None without rows."""
    if not rows:
        return None
    at, sides = torch.tensor(rows), picks.T
    return Records(
        prompt=torch.tensor([found.places[row].row for row in rows]),
        place=torch.tensor([found.places[row].number for row in rows]),
        index=_counted(rows),
        latents=found.latents[at, sides],
        geometry=sampled_geometry(resolution, len(rows)).expand(len(sides), -1, -1),
        seeds=found.seeds[at, sides],
        scores=found.scores[at, sides],
    )


def _counted(rows: list[int]) -> Tensor:
    """How often each entry was there before it, int64 [n]: the index of a pair among those of its place."""
    seen: Counter[int] = Counter()
    found = []
    for row in rows:
        found.append(seen[row])
        seen[row] += 1
    return torch.tensor(found, dtype=torch.int64)


Pick = Callable[[Candidates], tuple[list[int], Tensor, dict[str, Tensor]]]


def from_candidates(
    context: Context,
    settings: CandidateSettings,
    pick: Pick,
    *,
    network: Network | None = None,
    steps_per_round: int | None = None,
    grade: Grade | None = None,
) -> RoundPairs:
    """A source whose rounds are K scored images of each prompt, of which some become pairs.

    pick: the candidates -> the rows that are used, the picks "row side" of each (chosen first), and metrics.
    network: of the context, which samples; None: the policy. steps_per_round, grade: see `RoundSpec`.
    """
    judge = load_scorer(settings.scorer, str(context.device))

    def roll(number: int, places: list[Place]) -> Rollout:
        size = settings.generation_batch_size
        sampling = LatentSampling(settings.sampling_steps, settings.guidance_scale, size, f"round {number}")
        sample = partial(sample_latents, context, source.text, network or context.networks.policy, sampling=sampling)
        found = sample_candidates(context, sample, judge, places, settings.samples_per_prompt, size)
        rows, picks, metrics = pick(found)
        return Rollout(chosen_records(context.resolution, found, rows, picks), metrics)

    key = fingerprint(settings, context.table.identity, context.spec.run_seed, context.resolution)
    spec = RoundSpec(key, settings.prompts_per_round, steps_per_round, settings.keep_rounds, grade)
    source = RoundPairs(context, spec, roll)
    return source
