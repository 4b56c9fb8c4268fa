"""Scores of images on disk."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from diffalign.errors import DiffalignError
from diffalign.evaluation.manifest import GeneratedImage, read_image_manifest
from diffalign.evaluation.sampling import best_device
from diffalign.io.files import save_text
from diffalign.io.progress import Progress
from diffalign.rewards import Scorer, ScorerError, load_scorer

SCORES = "scores.jsonl"  # of a folder of images
BATCH = 64  # images opened at a time


@dataclass(frozen=True)
class Scoring:
    """What images are scored by; each scorer is a name for `load_scorer`, or a scorer."""

    scorers: Sequence[str | Scorer]
    faithfulness: str | Scorer | None = None  # measures faithfulness to the prompt, a guard beside the gains
    tie: float | None = None  # a smaller difference of two scores is a tie; None: each scorer's own threshold


@dataclass(frozen=True)
class Judges:
    """The loaded scorers of a `Scoring`."""

    scorers: list[Scorer]
    faithfulness: Scorer | None
    tie: float | None

    @property
    def every(self) -> list[Scorer]:
        """Each of them once."""
        known = {scorer.name for scorer in self.scorers}
        extra = [self.faithfulness] if self.faithfulness and self.faithfulness.name not in known else []
        return [*self.scorers, *extra]


def load_judges(scorers: Sequence[str | Scorer] | Scoring, device: str | None = None) -> Judges:
    """The scorers, loaded where they are names. Raises DiffalignError without one, and ScorerError."""
    scoring = scorers if isinstance(scorers, Scoring) else Scoring(scorers)
    if not scoring.scorers:
        raise DiffalignError("no scorer is named; give at least one, for example scorers=['pickscore']")

    def loaded(scorer: str | Scorer) -> Scorer:
        return load_scorer(scorer, device or best_device()) if isinstance(scorer, str) else scorer

    judges = [loaded(scorer) for scorer in scoring.scorers]
    return Judges(judges, None if scoring.faithfulness is None else loaded(scoring.faithfulness), scoring.tie)


def score_images(
    images: Sequence[GeneratedImage],
    scorers: Sequence[Scorer],
    *,
    also: Callable[[Sequence[Image.Image]], None] | None = None,
    title: str = "score",
) -> dict[str, NDArray[np.float64]]:
    """Scores [image] by scorer name. Raises ScorerError naming the image whose score is not finite.

    `also` is called with each batch of opened images, so that other measures need not open them again. title: of
    the progress.
    """
    scores: dict[str, list[float]] = {scorer.name: [] for scorer in scorers}
    if len(scores) < len(scorers):
        raise ScorerError(
            f"two scorers have the same name: {[scorer.name for scorer in scorers]}; name each scorer once"
        )
    with Progress(total=len(images), desc=title, unit="img", delay=1.0) as bar:
        for start in range(0, len(images), BATCH):
            some = images[start : start + BATCH]
            opened, prompts = [image.open() for image in some], [image.prompt for image in some]
            for scorer in scorers:
                values = [float(value) for value in scorer.score(opened, prompts)]
                _check(scorer.name, some, values)
                scores[scorer.name] += values
            if also is not None:
                also(opened)
            bar.update(len(some))
    return {name: np.array(values) for name, values in scores.items()}


def score_folder(folder: str | Path, scorers: Sequence[Scorer]) -> list[dict[str, object]]:
    """One row per image of the folder's manifest: file, prompt, seed and each scorer's value.

    The rows are also written to `scores.jsonl` in the folder.
    """
    images = read_image_manifest(folder, complete=True)
    scores = score_images(images, scorers)
    rows = [
        {
            "file": image.file.name,
            "prompt": image.prompt,
            "seed": image.seed,
            **{name: values[i] for name, values in scores.items()},
        }
        for i, image in enumerate(images)
    ]
    write_rows(Path(folder) / SCORES, rows)
    return rows


def write_rows(file: Path, rows: Sequence[dict[str, object]]) -> None:
    """One JSON object per line."""
    save_text(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _check(name: str, images: Sequence[GeneratedImage], values: Sequence[float]) -> None:
    if len(values) != len(images):
        raise ScorerError(
            f"scorer '{name}' returned {len(values)} scores for {len(images)} images; return one for each"
        )
    for image, value in zip(images, values, strict=True):
        if not np.isfinite(value):
            raise ScorerError(
                f"scorer '{name}' gave {value} to {image.file} (prompt {image.prompt!r}, seed {image.seed}); "
                "score with another scorer, or generate the image again"
            )
