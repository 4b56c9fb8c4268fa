"""Preference pairs from images and a scorer: of each prompt the best image over the worst.

The result is a parquet file with preference columns and the images' own bytes, which `open_pairs` reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from diffalign.data.formats.preference import write_preferences
from diffalign.errors import DiffalignError, ExistingFileError
from diffalign.evaluation.manifest import GeneratedImage, read_image_manifest
from diffalign.evaluation.scoring import score_images
from diffalign.rewards import Scorer, tie_of
from diffalign.rewards.base import check_prompts


@dataclass(frozen=True)
class Labelled:
    """What became of the prompts."""

    pairs: int
    ties: int  # prompts whose best and worst image differ by less than the tie threshold
    single: int  # prompts with one image


def label_images(
    folders: Sequence[str | Path],
    scorer: Scorer,
    out: str | Path,
    *,
    tie: float | None = None,
    overwrite: bool = False,
) -> Labelled:
    """Writes `out` (.parquet): prompt, chosen, rejected, chosen_score, rejected_score; one pair for each prompt.

    folders: of images with a manifest; images of one prompt in several folders are compared with each other, as
    those of a base and a tuned model. tie: replaces the scorer's own threshold. overwrite: replaces `out`.

    Raises DiffalignError for another suffix or where no pair is left, ExistingFileError for a file that exists, and
    what the scorer raises.
    """
    file = Path(out)
    if file.suffix != ".parquet":
        raise DiffalignError(f"{out}: pairs are written to a .parquet file")
    if file.exists() and not overwrite:
        raise ExistingFileError(f"{out} exists; name another file, or overwrite it (--overwrite)")
    images = [image for folder in folders for image in read_image_manifest(folder, complete=True)]
    check_prompts([scorer], list(dict.fromkeys(image.prompt for image in images)))
    scores = score_images(images, [scorer])[scorer.name]
    by_prompt: dict[str, list[tuple[float, GeneratedImage]]] = {}
    for score, image in zip(scores.tolist(), images, strict=True):
        by_prompt.setdefault(image.prompt, []).append((score, image))
    threshold = tie_of(scorer) if tie is None else tie
    pairs: list[tuple[str, tuple[float, GeneratedImage], tuple[float, GeneratedImage]]] = []
    ties = single = 0
    for prompt, some in by_prompt.items():
        best, worst = max(some, key=lambda x: x[0]), min(some, key=lambda x: x[0])
        if len(some) == 1:
            single += 1
        elif best[0] - worst[0] < threshold or best[0] == worst[0]:
            ties += 1
        else:
            pairs.append((prompt, best, worst))
    if not pairs:
        raise DiffalignError(
            f"no pair is left of {len(by_prompt)} prompts: {single} have one image, and of {ties} all scores lie "
            f"within {threshold:g}; generate several images of each prompt (`diffalign generate --seeds 0-3`)"
        )
    write_preferences(
        file,
        (
            {
                "prompt": prompt,
                "chosen": best.file.read_bytes(),
                "rejected": worst.file.read_bytes(),
                "chosen_score": high,
                "rejected_score": low,
            }
            for prompt, (high, best), (low, worst) in pairs
        ),
    )
    return Labelled(len(pairs), ties, single)
