"""Scores of pictures on disk."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm.auto import tqdm

from diffalign.evaluation.manifest import Picture, read_manifest
from diffalign.rewards import Scorer, ScorerError

SCORES = "scores.jsonl"  # of a folder of pictures
BATCH = 64  # pictures opened at a time


def score_pictures(
    pictures: Sequence[Picture],
    scorers: Sequence[Scorer],
    *,
    also: Callable[[Sequence[Image.Image]], None] | None = None,
    progress: bool = False,
) -> dict[str, NDArray[np.float64]]:
    """Scores [picture] by scorer name. Raises ScorerError naming the picture whose score is not finite.

    `also` is called with each batch of opened pictures, so that other measures need not open them again.
    """
    scores: dict[str, list[float]] = {scorer.name: [] for scorer in scorers}
    if len(scores) < len(scorers):
        raise ScorerError(f"two scorers have the same name: {[scorer.name for scorer in scorers]}")
    with tqdm(total=len(pictures), desc="score", unit="img", disable=not progress) as bar:
        for start in range(0, len(pictures), BATCH):
            some = pictures[start : start + BATCH]
            images, prompts = [picture.open() for picture in some], [picture.prompt for picture in some]
            for scorer in scorers:
                values = [float(value) for value in scorer.score(images, prompts)]
                _check(scorer.name, some, values)
                scores[scorer.name] += values
            if also is not None:
                also(images)
            bar.update(len(some))
    return {name: np.array(values) for name, values in scores.items()}


def score_folder(folder: str | Path, scorers: Sequence[Scorer], *, progress: bool = False) -> list[dict[str, object]]:
    """One row per picture of the folder's manifest: file, prompt, seed and each scorer's value.

    The rows are also written to `scores.jsonl` in the folder.
    """
    pictures = read_manifest(folder, whole=True)
    scores = score_pictures(pictures, scorers, progress=progress)
    rows = [
        {
            "file": picture.file.name,
            "prompt": picture.prompt,
            "seed": picture.seed,
            **{name: values[i] for name, values in scores.items()},
        }
        for i, picture in enumerate(pictures)
    ]
    write_rows(Path(folder) / SCORES, rows)
    return rows


def write_rows(file: Path, rows: Sequence[dict[str, object]]) -> None:
    """One JSON object per line."""
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def _check(name: str, pictures: Sequence[Picture], values: Sequence[float]) -> None:
    if len(values) != len(pictures):
        raise ScorerError(f"scorer '{name}' returned {len(values)} scores for {len(pictures)} pictures")
    for picture, value in zip(pictures, values, strict=True):
        if not np.isfinite(value):
            raise ScorerError(
                f"scorer '{name}' gave {value} to {picture.file} (prompt {picture.prompt!r}, seed {picture.seed})"
            )
