"""Validation images of a run, to its folder and its trackers."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffalign.config.sections import ValidationSection
from diffalign.io.files import written_whole
from diffalign.models.adapters.save_load import make_pipeline
from diffalign.training.callbacks.base import Callback, TrainingState
from diffalign.training.distributed.vital_signs import long_work
from diffalign.training.processes import on_main
from diffalign.training.trainable import Trainable

log = logging.getLogger(__name__)


class Validation(Callback):
    """Images of `validation.prompts` every `validation.every` steps and at the end, with the EMA weights if any."""

    def __init__(self, settings: ValidationSection) -> None:
        self.settings = settings

    def on_train_begin(self, state: TrainingState) -> None:
        """Draws what a stop right after the checkpoint left out."""
        run, step = state.run, state.step
        due = 0 < step < run.config.training.max_train_steps and step % self.settings.every == 0
        if due and on_main(run.accelerator, lambda: not _file(run, step).exists()):
            self.draw(state)

    def on_step_end(self, state: TrainingState) -> None:
        """Draws where it is due; after the last step the final weights are written first."""
        if not state.should_stop and state.step % self.settings.every == 0:
            self.draw(state)

    def on_train_end(self, state: TrainingState) -> None:
        """Draws the result."""
        self.draw(state)

    @long_work("drawing validation images")
    def draw(self, state: TrainingState) -> None:
        """Images by the main process; the others wait."""
        with state.run.averaged_weights(), state.run.networks.gathered():
            if state.run.accelerator.is_main_process:
                validate(state.run, self.settings, state.step)
        state.run.accelerator.wait_for_everyone()


def _file(run: Trainable, step: int) -> Path:
    return run.output_dir / "validation" / f"step-{step:06d}.png"


def policy_images(
    run: Trainable, settings: ValidationSection, prompts: Sequence[str], seeds: Sequence[int]
) -> list[Any]:
    """A PIL image of the policy as it is now for each prompt and seed, sampled as `settings` say. Raises ValueError."""
    from diffalign.evaluation.sampling import Sampling, sample_images

    return sample_images(
        make_pipeline(run.base),
        prompts,
        seeds,
        Sampling(
            settings.num_inference_steps,
            settings.guidance_scale,
            resolution=run.config.data.resolution,
            **asdict(run.config.model.text),
        ),
        autocast=run.networks.autocast_dtype,
    )


def validate(run: Trainable, settings: ValidationSection, step: int) -> None:
    """Images of the policy as it is now. A failure to sample or to write them is logged and does not end the run."""
    from diffalign.evaluation.grid import comparison_grid

    try:
        same = [settings.seed] * len(settings.prompts)  # at every step: grids show what training changed
        images = policy_images(run, settings, settings.prompts, same)
        with written_whole(_file(run, step)) as partial:
            comparison_grid(settings.prompts, {f"step {step}": images}).save(partial, "PNG")
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        log.warning("no validation images at step %d, training continues: %s", step, error)
        return
    for tracker in run.accelerator.trackers:
        layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
        tracker.log_images({"validation": np.stack([np.asarray(image) for image in images])}, step=step, **layout)
