"""Pictures made during training: a grid on disk for each validation, and the list for the tracker."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image

from diffalign.evaluation.grid import comparison_grid
from diffalign.evaluation.sampling import sample_images


def validation_pictures(
    pipe: Any,
    prompts: tuple[str, ...],
    *,
    step: int,
    folder: Path,
    steps: int,
    guidance: float,
    seed: int,
    resolution: int | None,
) -> list[Image.Image]:
    """One picture of each prompt from the pipeline as it is, written as `folder`/step-000100.png and returned.

    The seed is the same at every step, so that a row of grids shows what training changed.
    """
    images = sample_images(pipe, prompts, [seed] * len(prompts), steps=steps, guidance=guidance, resolution=resolution)
    folder.mkdir(parents=True, exist_ok=True)
    comparison_grid(prompts, {f"step {step}": images}).save(folder / f"step-{step:06d}.png")
    return images
