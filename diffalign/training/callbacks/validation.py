"""Validation images of a run, to its folder and its trackers."""

from __future__ import annotations

import logging

import numpy as np
import torch

from diffalign.models.adapters.save_load import make_pipeline
from diffalign.training.build import Run

log = logging.getLogger(__name__)


def validate(run: Run, step: int) -> None:
    """Images of the policy as it stands, from the main process; an error there does not end the training."""
    from diffalign.evaluation.grid import comparison_grid
    from diffalign.evaluation.sampling import Sampling, sample_images

    if not run.accelerator.is_main_process:
        return
    settings = run.config.validation
    try:
        images = sample_images(
            make_pipeline(run.base),
            settings.prompts,
            [settings.seed] * len(settings.prompts),  # the same at every step: grids show what training changed
            Sampling(settings.steps, settings.guidance_scale, resolution=run.config.data.resolution),
            autocast=run.networks.autocast_dtype,
        )
        folder = run.output_dir / "validation"
        folder.mkdir(parents=True, exist_ok=True)
        comparison_grid(settings.prompts, {f"step {step}": images}).save(folder / f"step-{step:06d}.png")
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        log.warning("no validation images at step %d, training goes on: %s", step, error)
        return
    for tracker in run.accelerator.trackers:
        layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
        tracker.log_images({"validation": np.stack([np.asarray(image) for image in images])}, step=step, **layout)
