"""K images of each prompt by the current policy, and their scores."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from diffalign.data.transforms import to_images
from diffalign.models.loading.encoder import Encoder
from diffalign.rewards import Scorer, load_scorer
from diffalign.sources.base import CandidateSettings, Context, SourceError
from diffalign.sources.rounds import Place, Records, Rollout, fingerprint
from diffalign.sources.sampling import LatentSampling, Text, sample_latents, sampled_geometry
from diffalign.sources.stream import RoundPairs, RoundSpec


@dataclass(frozen=True)
class Candidates:
    """The images of some places; entry [i, k] is image k at place i."""

    places: list[Place]
    latents: Tensor  # "place k c h w"
    seeds: Tensor  # int64 "place k"
    scores: Tensor  # float32 "place k"


def sample_candidates(
    context: Context,
    text: Text,
    judge: Scorer,
    places: list[Place],
    samples_per_prompt: int,
    sampling: LatentSampling,
) -> Candidates:
    """Samples from the policy, decodes and scores; raises SourceError when a score is not finite."""
    prompts = [place.prompt for place in places for _ in range(samples_per_prompt)]
    seeds = [place.seed(context.spec.run_seed, k) for place in places for k in range(samples_per_prompt)]
    latents = sample_latents(context, text, context.networks.policy, prompts, seeds, sampling)
    scores = score_latents(context.encoder, judge, latents, prompts, seeds, sampling.batch_size)
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
        index=torch.zeros(len(rows), dtype=torch.int64),
        latents=found.latents[at, sides],
        geometry=sampled_geometry(resolution, len(rows)).expand(len(sides), -1, -1),
        seeds=found.seeds[at, sides],
        scores=found.scores[at, sides],
    )


Pick = Callable[[Candidates], tuple[list[int], Tensor, dict[str, Tensor]]]


def from_candidates(context: Context, settings: CandidateSettings, pick: Pick) -> RoundPairs:
    """A source whose rounds are K scored images of each prompt, of which some become pairs.

    pick: the candidates -> the rows that are used, the picks "row side" of each (chosen first), and metrics.
    """
    judge = load_scorer(settings.scorer, str(context.device))

    def roll(number: int, places: list[Place]) -> Rollout:
        sampling = LatentSampling(
            settings.sampling_steps, settings.guidance_scale, settings.generation_batch_size, f"round {number}"
        )
        found = sample_candidates(context, source.text, judge, places, settings.samples_per_prompt, sampling)
        rows, picks, metrics = pick(found)
        return Rollout(chosen_records(context.resolution, found, rows, picks), metrics)

    key = fingerprint(settings, context.table.identity, context.spec.run_seed, context.resolution)
    spec = RoundSpec(key, settings.prompts_per_round, keep_rounds=settings.keep_rounds)
    source = RoundPairs(context, spec, roll)
    return source
