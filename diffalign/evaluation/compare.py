"""Statistics and guards for pictures that exist: base against any number of tuned models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from diffalign.data.table.prompts import unique
from diffalign.errors import DiffalignError
from diffalign.evaluation.guards import Embed, Look, look, pixel_features, spread
from diffalign.evaluation.manifest import Picture
from diffalign.evaluation.report import BASE, ModelResult, Result, check_name, versions
from diffalign.evaluation.scoring import score_pictures
from diffalign.evaluation.stats import Paired, paired, ratio
from diffalign.rewards import Scorer, tie_of


@dataclass(frozen=True)
class _Measured:
    """One folder of pictures, each opened once."""

    scores: dict[str, np.ndarray]  # by scorer: [picture]
    look: np.ndarray  # saturation, sharpness, brightness
    spreads: np.ndarray  # [prompt]: mean distance between seeds


def compare(
    base: Sequence[Picture],
    tuned: Mapping[str, Sequence[Sequence[Picture]]],
    scorers: Sequence[Scorer],
    faithfulness: Scorer | None = None,
    *,
    tie: float | None = None,
    settings: Mapping[str, Any] | None = None,
    progress: bool = False,
) -> tuple[Result, list[dict[str, object]]]:
    """The statistics for pictures that exist: those of the base, and by name those of each training run.

    Every run needs the base's (prompt, seed) pairs; extra pictures are an error too, because leaving them out
    would be a choice. Also returns one row of scores per picture. Diversity is measured in the feature space of
    the first scorer that has `embed_images`, else in pixels.
    """
    for name in tuned:
        check_name(name)
    keys = [(picture.prompt, picture.seed) for picture in base]
    judges = list(scorers)
    if faithfulness and faithfulness.name not in [scorer.name for scorer in scorers]:
        judges.append(faithfulness)
    embed = next((judge.embed_images for judge in judges if hasattr(judge, "embed_images")), pixel_features)
    of_base = _measure(base, judges, embed, progress)
    rows = _score_rows(BASE, 0, base, of_base.scores)
    models = []
    for name, pictures in tuned.items():
        runs = [_in_order(name, run, keys) for run in pictures]
        of_runs = [_measure(run, judges, embed, progress) for run in runs]
        for number, (run, measured) in enumerate(zip(runs, of_runs, strict=True)):
            rows += _score_rows(name, number, run, measured.scores)

        def against_base(judge: Scorer, of_runs: list[_Measured] = of_runs) -> Paired:
            n = len(of_runs)
            return paired(
                np.tile(of_base.scores[judge.name], n),
                np.concatenate([measured.scores[judge.name] for measured in of_runs]),
                [prompt for prompt, _ in keys] * n,
                [seed for _, seed in keys] * n,
                runs=np.repeat(np.arange(n), len(keys)).tolist(),
                tie=tie_of(judge) if tie is None else tie,
            )

        def run_gains(judge: Scorer, of_runs: list[_Measured] = of_runs) -> list[float]:
            base_scores = of_base.scores[judge.name]
            return [float((measured.scores[judge.name] - base_scores).mean()) for measured in of_runs]

        spreads = np.stack([measured.spreads for measured in of_runs])
        models.append(
            ModelResult(
                name=name,
                scores={scorer.name: against_base(scorer) for scorer in scorers},
                run_gains={scorer.name: run_gains(scorer) for scorer in scorers},
                faithfulness=against_base(faithfulness) if faithfulness else None,
                diversity=ratio(spreads, of_base.spreads) if of_base.spreads.any() else None,
                look=Look(*np.mean([measured.look for measured in of_runs], 0).tolist()),
            )
        )
    result = Result(
        models=models,
        base_look=Look(*of_base.look.tolist()),
        prompts=unique(prompt for prompt, _ in keys),
        seeds=list(dict.fromkeys(seed for _, seed in keys)),
        faithfulness=faithfulness.name if faithfulness else None,
        settings=dict(settings or {}),
        versions=versions(),
    )
    return result, rows


def _in_order(name: str, run: Sequence[Picture], keys: Sequence[tuple[str, int]]) -> list[Picture]:
    """The run's pictures in the base's order."""
    found = {(picture.prompt, picture.seed): picture for picture in run}
    odd = set(found) ^ set(keys)
    if odd:
        prompt, seed = min(odd)
        has, lacks = (name, BASE) if (prompt, seed) in found else (BASE, name)
        raise DiffalignError(
            f"{len(odd)} pictures have no partner: '{has}' has prompt {prompt!r}, seed {seed}, '{lacks}' has not; "
            "generate both with the same prompts and seeds"
        )
    return [found[key] for key in keys]


def _measure(pictures: Sequence[Picture], judges: Sequence[Scorer], embed: Embed, progress: bool) -> _Measured:
    looks, features = [], []

    def also(images: Sequence[Image.Image]) -> None:
        looks.append(look(images))
        features.append(embed(images))

    scores = score_pictures(pictures, judges, also=also, progress=progress)
    places: dict[str, list[int]] = {}
    for i, picture in enumerate(pictures):
        places.setdefault(picture.prompt, []).append(i)
    vectors = torch.cat(features)
    spreads = np.array([spread(vectors[rows]) for rows in places.values()])
    return _Measured(scores, torch.cat(looks).mean(0).numpy(), spreads)


def _score_rows(
    name: str, run: int, pictures: Sequence[Picture], scores: Mapping[str, np.ndarray]
) -> list[dict[str, object]]:
    return [
        {
            "model": name,
            "run": run,
            "prompt": picture.prompt,
            "seed": picture.seed,
            **{scorer: float(values[i]) for scorer, values in scores.items()},
        }
        for i, picture in enumerate(pictures)
    ]
