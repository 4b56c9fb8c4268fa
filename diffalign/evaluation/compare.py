"""Statistics and guards for existing images: base against any number of tuned models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from diffalign.data.prompt_sets.fetch import which_set
from diffalign.data.table.prompts import unique
from diffalign.errors import DiffalignError
from diffalign.evaluation.guards import Look, look, mean_distance, pixel_features
from diffalign.evaluation.manifest import GeneratedImage
from diffalign.evaluation.report import BASE, ModelResult, Result, check_name, run_title, versions
from diffalign.evaluation.scoring import Judges, Scoring, load_judges, score_images
from diffalign.evaluation.stats import Paired, paired, ratio
from diffalign.rewards import Scorer, tie_of
from diffalign.rewards.base import group_of


@dataclass(frozen=True)
class _Measured:
    """The images of one run, each opened once."""

    images: Sequence[GeneratedImage]
    scores: dict[str, np.ndarray]  # by scorer: [image]
    look: np.ndarray  # saturation, sharpness, brightness
    distances: np.ndarray  # [prompt]: mean distance between seeds

    def rows(self, name: str, run: int) -> list[dict[str, object]]:
        """One row for each image."""
        return [
            {"model": name, "run": run, "prompt": image.prompt, "seed": image.seed}
            | {scorer: float(values[i]) for scorer, values in self.scores.items()}
            for i, image in enumerate(self.images)
        ]


def compare(
    base: Sequence[GeneratedImage],
    tuned: Mapping[str, Sequence[Sequence[GeneratedImage]]],
    scorers: Sequence[str | Scorer] | Scoring | Judges,
    *,
    settings: Mapping[str, Any] | None = None,
) -> tuple[Result, list[dict[str, object]]]:
    """The statistics of existing images: those of the base, and by name those of each training run.

    Every run needs the base's (prompt, seed) pairs; extra images are an error too, because leaving them out
    would be a choice. Also returns one row of scores per image. Diversity is measured in the feature space of
    the first scorer that has `embed_images`, else in pixels. `settings`: how each model's images were made.
    """
    for name in tuned:
        check_name(name)
    judges = scorers if isinstance(scorers, Judges) else load_judges(scorers)
    of_base = _measure(base, judges.every, BASE)
    rows, models = of_base.rows(BASE, 0), []
    for name, runs in tuned.items():
        measured = [
            _measure(in_order(name, run, base), judges.every, run_title(name, number, len(runs)))
            for number, run in enumerate(runs, 1)
        ]
        rows += [row for number, run in enumerate(measured) for row in run.rows(name, number)]
        models.append(_against_base(name, measured, of_base, judges))
    prompts = unique(image.prompt for image in base)
    result = Result(
        models=models,
        base_look=Look(*of_base.look.tolist()),
        prompts=prompts,
        prompt_set=which_set(prompts),
        seeds=list(dict.fromkeys(image.seed for image in base)),
        faithfulness=judges.faithfulness.name if judges.faithfulness else None,
        settings=dict(settings or {}),
        versions=versions(),
    )
    return result, rows


def _against_base(name: str, runs: Sequence[_Measured], base: _Measured, judges: Judges) -> ModelResult:
    """A model's training runs against the base."""
    prompts = [image.prompt for image in base.images] * len(runs)
    number = np.repeat(np.arange(len(runs)), len(base.images)).tolist()

    def gain(judge: Scorer, group: str | None = None) -> Paired:
        scores = np.concatenate([run.scores[judge.name] for run in runs])
        of_base = np.tile(base.scores[judge.name], len(runs))
        tie = tie_of(judge) if judges.tie is None else judges.tie
        chosen = [i for i, prompt in enumerate(prompts) if group in (None, group_of(judge, prompt))]
        some, own_runs = [prompts[i] for i in chosen], [number[i] for i in chosen]
        return paired(of_base[chosen], scores[chosen], some, runs=own_runs, tie=tie)

    return ModelResult(
        name=name,
        scores={judge.name: gain(judge) for judge in judges.scorers},
        run_gains={
            judge.name: [float((run.scores[judge.name] - base.scores[judge.name]).mean()) for run in runs]
            for judge in judges.scorers
        },
        faithfulness=gain(judges.faithfulness) if judges.faithfulness else None,
        groups={
            judge.name: {group: gain(judge, group) for group in found}
            for judge in judges.every
            if (found := unique(group_of(judge, prompt) for prompt in prompts)) != [""]
        },
        diversity=ratio([run.distances for run in runs], base.distances) if base.distances.any() else None,
        look=Look(*np.mean([run.look for run in runs], 0).tolist()),
    )


def in_order(name: str, run: Sequence[GeneratedImage], base: Sequence[GeneratedImage]) -> list[GeneratedImage]:
    """The run's images in the base's order."""
    keys = [(image.prompt, image.seed) for image in base]
    found = {(image.prompt, image.seed): image for image in run}
    odd = set(found) ^ set(keys)
    if odd:
        prompt, seed = min(odd)
        has, lacks = (name, BASE) if (prompt, seed) in found else (BASE, name)
        raise DiffalignError(
            f"{len(odd)} images have no partner: '{has}' has prompt {prompt!r}, seed {seed}, '{lacks}' has not; "
            "generate both with the same prompts and seeds"
        )
    return [found[key] for key in keys]


def _measure(images: Sequence[GeneratedImage], judges: Sequence[Scorer], name: str) -> _Measured:
    """name: of the model, for the progress."""
    embed = next((judge.embed_images for judge in judges if hasattr(judge, "embed_images")), pixel_features)
    looks, features = [], []

    def also(opened: Sequence[Image.Image]) -> None:
        looks.append(look(opened))
        features.append(embed(opened))

    scores = score_images(images, judges, also=also, title=f"score {name}")
    places: dict[str, list[int]] = {}
    for i, image in enumerate(images):
        places.setdefault(image.prompt, []).append(i)
    vectors = torch.cat(features)
    distances = np.array([mean_distance(vectors[rows]) for rows in places.values()])
    return _Measured(images, scores, torch.cat(looks).mean(0).numpy(), distances)
