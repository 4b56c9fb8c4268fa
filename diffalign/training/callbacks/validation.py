"""Validation pictures of a run, to its folder and its trackers."""

from __future__ import annotations

import logging

import numpy as np
import torch

from diffalign.models.adapters.save_load import make_pipeline
from diffalign.training.build import Run

log = logging.getLogger(__name__)


def validate(run: Run, step: int) -> None:
    """Pictures of the policy as it stands, from the main process; what fails there does not end the training."""
    from diffalign.evaluation.sampling import Sampling
    from diffalign.evaluation.validation import validation_pictures

    if not run.accelerator.is_main_process:
        return
    settings = run.config.validation
    try:
        images = validation_pictures(
            make_pipeline(run.base),
            settings.prompts,
            step=step,
            folder=run.output_dir / "validation",
            seed=settings.seed,
            sampling=Sampling(settings.steps, settings.guidance_scale, resolution=run.config.data.resolution),
            autocast=run.networks.autocast_dtype,
        )
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        log.warning("no validation pictures at step %d, training goes on: %s", step, error)
        return
    for tracker in run.accelerator.trackers:
        layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
        tracker.log_images({"validation": np.stack([np.asarray(image) for image in images])}, step=step, **layout)
