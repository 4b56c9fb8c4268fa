"""The diversity of a run's images: how much images of one prompt differ, relative to the start of the run.

Pairs show which image a model prefers and not how different its images of one prompt are. Preference tuning costs
diversity step by step, long before a held-out metric falls. So images of some held-out prompts are sampled wherever the
held-out pairs are measured, always from the same noise:

    heldout/diversity   mean distance of two images of one prompt, over that at the start; 1 at the start
    …/low, …/high       ends of its 95 % interval, which counts prompts

The distance is that of `evaluate`: the RMS difference of the pixels. The images are not stored.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffalign.config.sections import ValidationSection
from diffalign.data.heldout import prompt_key
from diffalign.errors import DiffalignError
from diffalign.evaluation.stats import ratio
from diffalign.training.callbacks.base import Callback, TrainingState
from diffalign.training.callbacks.validation import policy_images
from diffalign.training.checkpoints.checkpoint import CheckpointError
from diffalign.training.distributed.vital_signs import long_work
from diffalign.training.heldout.callback import HeldOut
from diffalign.training.heldout.estimates import PREFIX
from diffalign.training.processes import on_main

DIVERSITY = f"{PREFIX}/diversity"


class Diversity(Callback):
    """Measures at the steps at which held-out pairs are measured, with the EMA weights if there are any."""

    def __init__(self, heldout: HeldOut, settings: ValidationSection) -> None:
        self.heldout, self.settings = heldout, settings
        table = heldout.points.source.table
        self.prompts = some_prompts(table.prompts, settings.diversity_prompts, settings.pairs_seed)
        self.images = [settings.diversity_images, settings.num_inference_steps, settings.guidance_scale, settings.seed]
        self.at_start: list[float] = []  # of each prompt, the mean distance of two images
        self.value = 1.0  # of the last measurement

    @property
    def enough(self) -> bool:
        """Whether the last measurement is not below the least diversity."""
        return self.value >= (self.settings.least_diversity or 0.0)

    def on_train_begin(self, state: TrainingState) -> None:
        """Measures the start. Raises CheckpointError for a run that is resumed and did not measure it."""
        if self.at_start:
            return
        if state.step:
            raise CheckpointError(
                "validation.least_diversity: the run is resumed and did not measure the diversity of its start with "
                "the same validation.num_inference_steps, guidance_scale and seed; set it to null, or start anew"
            )
        self.at_start = self.measure()
        if not any(self.at_start):
            raise DiffalignError(
                "validation.least_diversity: the base's images of one prompt are all equal, so there is no diversity "
                "to lose; set it to null"
            )

    def on_log(self, state: TrainingState) -> None:
        """Adds `heldout/diversity` to the metrics of a step at which a measurement is due."""
        if not self.heldout.due(state):
            return
        found = ratio(self.measure(), self.at_start)
        state.metrics |= {DIVERSITY: found.value, f"{DIVERSITY}/low": found.low, f"{DIVERSITY}/high": found.high}
        self.value = found.value

    @long_work("measuring the diversity of images")
    def measure(self) -> list[float]:
        """Of each prompt the mean distance of two images of the policy as it is now; the same in all processes."""
        run = self.heldout.run
        with run.averaged_weights(), run.networks.gathered():
            return on_main(run.accelerator, self._distances)

    def save_state(self, folder: Path) -> dict[str, Any]:
        """The start's distances, and of which images they are."""
        return {"at_start": self.at_start, "images": self.images}

    def load_state(self, state: dict[str, Any], folder: Path) -> None:
        """Takes the start's distances, if they are of such images as this run measures."""
        if state.get("images") == self.images:
            self.at_start = state["at_start"]

    def _distances(self) -> list[float]:
        from diffalign.evaluation.guards import mean_distance, pixel_features

        settings, each = self.settings, self.settings.diversity_images
        prompts = [prompt for prompt in self.prompts for _ in range(each)]
        seeds = [settings.seed + i for _ in self.prompts for i in range(each)]
        images = policy_images(self.heldout.run, settings, prompts, seeds)
        return [mean_distance(pixel_features(images[i : i + each])) for i in range(0, len(images), each)]


def some_prompts(prompts: Sequence[str], count: int, seed: int) -> list[str]:
    """At most `count` different ones, in the order of a hash of seed and text: no order of the rows changes them.

    Of prompts that differ in case or white space alone, the first in alphabetical order stands for all.
    """
    texts = {prompt_key(prompt): prompt for prompt in sorted(prompts, reverse=True)}
    order = sorted(texts, key=lambda key: hashlib.blake2b(f"{seed}\x1f{key}".encode()).digest())
    return [texts[key] for key in order[:count]]
