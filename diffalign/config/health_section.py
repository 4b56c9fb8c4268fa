"""The section `health` of a config: rules that monitor a run, and their actions."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from diffalign.config.value_types import Count, Decay, Fraction, NotNegative, Positive, Section
from diffalign.errors import DiffalignError


class HealthSection(Section):
    """Rules that monitor the logged metrics (`training/callbacks/health.py`), and what happens when one fires."""

    action: Literal["none", "warn", "stop", "roll_back"] = "warn"
    window: Annotated[Count, Field(ge=2, le=100)] = 3  # logged lines in a row that must be bad
    displacement: Fraction = 0.8  # share of chosen images less likely than under the reference
    saturation: Fraction = 0.5  # share of logits beyond ±4
    drift: Positive = 0.5  # growth of the policy's errors over the reference's
    backwards: Fraction = 0.35  # share of pairs with chosen above rejected
    no_movement: Positive = 0.02  # mean size of a logit, and distance of the loss from log 2
    no_movement_after: Fraction = 0.2  # share of the run's steps before which a loss may stay at log 2
    dead_flips: Fraction = 0.02  # distance of flip_rate from 0 or 1
    valid_pairs: Fraction = 0.02  # share of valid pairs among those that a source makes
    clipped: Fraction = 0.95  # share of ratios outside the clip
    overfitting: NotNegative = 0.0  # the held-out loss's interval must be above its best value by more than this
    chance_after: Count = 5  # measurements of held-out pairs that may be no better than chance
    lr_factor: Decay = 0.5  # of the learning rate at each roll back
    max_roll_backs: Count = 2  # then the run stops


def can_roll_back(health: HealthSection, training: Any, source: Any) -> None:
    """Raises DiffalignError where a run could not return to a checkpoint that the rules have checked."""
    if health.action != "roll_back":
        return
    if training.checkpointing_steps is None or training.checkpointing_steps % training.logging_steps:
        raise DiffalignError(
            f"health.action: roll_back needs training.checkpointing_steps, a multiple of "
            f"training.logging_steps ({training.logging_steps}), so that the rules check every step before it is saved"
        )
    if source is not None:
        raise DiffalignError(
            f"health.action: source {source.name} would continue with pairs of the abandoned policy; use stop "
            "instead of roll_back"
        )
