"""What a run's gain costs in its images: how much those of one prompt differ, and how well they follow their prompts.

Pairs show which image a model prefers and not what its own images have become. Preference tuning costs diversity step
by step, and faithfulness at times, long before a held-out metric falls. So images of some prompts are sampled at the
start and wherever the held-out pairs are measured, always from the same noise:

    heldout/diversity      mean distance of two images of one prompt, over that at the start; 1 at the start
    heldout/faithfulness   with `validation.faithfulness`: mean score of that scorer, less that at the start
    …/low, …/high          ends of their 95 % intervals, which count prompts

Both are measured as `evaluate` does it: the distance is the RMS difference of the pixels. The images are not stored.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffalign.config.sections import ValidationSection
from diffalign.data.heldout import prompt_key
from diffalign.data.prompt_sets.fetch import text_hash
from diffalign.data.table.prompts import open_prompts
from diffalign.errors import DiffalignError
from diffalign.evaluation.stats import clustered_mean, ratio
from diffalign.rewards import Scorer, ScorerError
from diffalign.training.callbacks.base import Callback, TrainingState
from diffalign.training.callbacks.validation import policy_images
from diffalign.training.checkpoints.checkpoint import CheckpointError
from diffalign.training.distributed.vital_signs import long_work
from diffalign.training.heldout.callback import HeldOut
from diffalign.training.heldout.estimates import PREFIX, named
from diffalign.training.processes import on_main

DIVERSITY, FAITHFULNESS = f"{PREFIX}/diversity", f"{PREFIX}/faithfulness"
SCORED = 64  # images that a scorer is given at a time

Measured = tuple[list[float], list[float]]  # of each prompt the mean distance, of each image the score


class Guards(Callback):
    """Measures at the steps at which held-out pairs are measured, with the EMA weights if there are any."""

    def __init__(
        self, heldout: HeldOut, settings: ValidationSection, prompts: Sequence[str], scorer: Scorer | None = None
    ) -> None:
        self.heldout, self.settings, self.prompts, self.scorer = heldout, settings, prompts, scorer
        sampling = [settings.num_inference_steps, settings.guidance_scale, settings.seed]
        self.images = [text_hash(prompts), settings.guard_images, *sampling]
        self.at_start: Measured | None = None
        self.diversity, self.faithfulness = 1.0, 0.0  # of the last measurement

    @property
    def broken(self) -> str:
        """What the last measurement has too little of, in words; empty where it is within both limits."""
        limits, said = self.settings, []
        if limits.least_diversity is not None and self.diversity < limits.least_diversity:
            least = f"validation.least_diversity is {limits.least_diversity:g}"
            said.append(f"the diversity of images is {self.diversity:.3g} of the start's, and {least}")
        if limits.least_faithfulness is not None and self.faithfulness < limits.least_faithfulness:
            least = f"validation.least_faithfulness is {limits.least_faithfulness:g}"
            said.append(f"{limits.faithfulness} has changed by {self.faithfulness:+.3g}, and {least}")
        return "; ".join(said)

    def on_train_begin(self, state: TrainingState) -> None:
        """Measures the start. Raises CheckpointError for a run that is resumed and did not measure it."""
        if self.at_start is not None:
            return
        if state.step:
            raise CheckpointError(
                "validation.least_diversity, faithfulness: the run is resumed and did not measure the images of its "
                "start with the same prompts and validation.num_inference_steps, guidance_scale and seed; set both to "
                "null, or start anew"
            )
        self.at_start = self.measure()
        if self.settings.least_diversity is not None and not any(self.at_start[0]):
            raise DiffalignError(
                "validation.least_diversity: the base's images of one prompt are all equal, so there is no diversity "
                "to lose; set it to null"
            )

    def on_log(self, state: TrainingState) -> None:
        """Adds `heldout/diversity` and `heldout/faithfulness` to the metrics of a step that is measured."""
        if not self.heldout.due(state) or self.at_start is None:
            return
        distances, scores = self.measure()
        if any(self.at_start[0]):
            found = ratio(distances, self.at_start[0])
            self.diversity = found.value
            state.metrics |= named(DIVERSITY, found)
        if scores:
            changes = [now - before for now, before in zip(scores, self.at_start[1], strict=True)]
            found = clustered_mean(changes, self._each_prompt())
            self.faithfulness = found.value
            state.metrics |= named(FAITHFULNESS, found)

    @long_work("sampling images for their diversity and faithfulness")
    def measure(self) -> Measured:
        """The policy as it is now; the same in all processes."""
        run = self.heldout.run
        with run.averaged_weights(), run.networks.gathered():
            return on_main(run.accelerator, self._measured)

    def save_state(self, folder: Path) -> dict[str, Any]:
        """What the start and the last measurement had, and of which images."""
        return {"at_start": self.at_start, "last": [self.diversity, self.faithfulness], "images": self.images}

    def load_state(self, state: dict[str, Any], folder: Path) -> None:
        """Takes what was measured, if it is of such images as this run measures; the limits may be others."""
        if state.get("images") == self.images and state["at_start"] is not None:
            distances, scores = state["at_start"]
            self.at_start = list(distances), list(scores)
            self.diversity, self.faithfulness = state["last"]

    def _each_prompt(self) -> list[str]:
        """The prompt of each image."""
        return [prompt for prompt in self.prompts for _ in range(self.settings.guard_images)]

    def _measured(self) -> Measured:
        from diffalign.evaluation.guards import mean_distance, pixel_features

        settings, each, prompts = self.settings, self.settings.guard_images, self._each_prompt()
        seeds = [settings.seed + i for _ in self.prompts for i in range(each)]
        images = policy_images(self.heldout.run, settings, prompts, seeds)
        distances = [mean_distance(pixel_features(images[i : i + each])) for i in range(0, len(images), each)]
        return distances, [] if self.scorer is None else _scores(self.scorer, images, prompts)


def _scores(scorer: Scorer, images: Sequence[Any], prompts: Sequence[str]) -> list[float]:
    """Raises ScorerError for a score that is not finite, and where there is not one for each image."""
    found: list[float] = []
    for i in range(0, len(images), SCORED):
        found += [float(score) for score in scorer.score(images[i : i + SCORED], prompts[i : i + SCORED])]
    bad = next((prompt for prompt, score in zip(prompts, found, strict=False) if not math.isfinite(score)), None)
    if bad is not None or len(found) != len(images):
        what = f"{len(found)} scores for {len(images)} images" if bad is None else f"no finite score to {bad!r}"
        raise ScorerError(f"validation.faithfulness: scorer {scorer.name} gave {what}; name another scorer")
    return found


def prompts_of_guards(settings: ValidationSection, heldout: Sequence[str]) -> list[str]:
    """The prompts whose images are measured: some of the held-out pairs', or those of a file or set; empty for none.

    Raises PromptError for a file that cannot be read, DiffalignError for one with a single prompt.
    """
    given = settings.guard_prompts
    if not settings.guards:
        return []
    if isinstance(given, int):
        return some_prompts(heldout, given, settings.pairs_seed)
    found = open_prompts(given).prompts
    if len(found) < 2:
        raise DiffalignError(f"validation.guard_prompts: {given} has one prompt, which gives no interval; name more")
    return found


def some_prompts(prompts: Sequence[str], count: int, seed: int) -> list[str]:
    """At most `count` different ones, in the order of a hash of seed and text: no order of the rows changes them.

    Of prompts that differ in case or white space alone, the first in alphabetical order stands for all.
    """
    texts = {prompt_key(prompt): prompt for prompt in sorted(prompts, reverse=True)}
    order = sorted(texts, key=lambda key: hashlib.blake2b(f"{seed}\x1f{key}".encode()).digest())
    return [texts[key] for key in order[:count]]
