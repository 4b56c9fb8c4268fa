"""The figures that `training/inspect/calibrate.py` measures, what follows from them, and the report in words."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

MOVEMENT = 0.05  # m at which the logit's standard deviation is to be 1
LARGEST_STEP = MOVEMENT  # m of one step at the highest learning rate
TOLERANCE = 3.0  # a configured scale within this factor of the proposed one is not changed


@dataclass(frozen=True)
class Point:
    """The policy's distance from the base after so many steps."""

    step: int
    movement: float  # m
    spread: float  # of the logit at a scale of 1
    weights: float  # norm of the change of the trained weights, divided by their norm


@dataclass(frozen=True)
class Calibration:
    """What was measured and what follows."""

    objective: str
    field: str
    configured: float
    proposed: float
    anchored: bool  # False: no reference, so the logits spread before any step and were taken there
    spread: float  # of the logit at a scale of 1, at 5 % of movement (not anchored: at the start)
    wanted: float
    movement_at_configured: float | None  # m at which the configured scale gives the wanted spread
    factor: tuple[float, float, float]  # σ(−h) at the proposed scale: mean, 10th and 90th percentile
    learning_rate: float  # configured, before scale_lr, as are those below
    lowest: float
    highest: float
    proposed_learning_rate: float
    lr_scaling: float  # of scale_lr; 1 without it
    steps: float  # of the run, each counted by its share of the peak learning rate
    path: tuple[Point, ...]
    path_lr: float  # in force on the path
    batch: int  # pairs in each of its steps
    pairs: int  # at which the policy was observed

    @property
    def changes(self) -> dict[str, float]:
        """Overrides for the config: the proposals that differ from the configured values by more than TOLERANCE."""
        found = {}
        if not 1 / TOLERANCE <= self.configured / self.proposed <= TOLERANCE:
            found[f"objective.{self.field}"] = self.proposed
        if self.proposed_learning_rate != self.learning_rate:
            found["training.learning_rate"] = self.proposed_learning_rate
        return found

    @property
    def overrides(self) -> list[str]:
        """`changes` as words of the command line."""
        return [f"{key}={_number(value)}" for key, value in self.changes.items()]


def report(found: Calibration) -> str:
    """The figures, what they mean and what to change, in words."""
    name, value = f"objective.{found.field}", _number(found.proposed)
    lines = ["| step | predictions moved | logit spread at a scale of 1 | weights moved |", "|---|---|---|---|"]
    lines += [f"| {p.step} | {p.movement:.2%} | {p.spread:.3g} | {p.weights:.2g} |" for p in found.path]
    lines += [f"(steps of {found.batch} pairs at lr {found.path_lr:.2g}, measured at {found.pairs} later visits)", ""]
    if found.anchored:
        lines.append(
            f"{name}: when the predictions have moved by {MOVEMENT:.0%} of the reference's error, the logit's spread "
            f"is {found.spread:.3g} for a scale of 1. It should be {found.wanted:g} there: {value}."
        )
    else:
        lines.append(
            f"{name}: there is no reference, so logits differ before any step, with a spread of "
            f"{found.spread:.3g} for a scale of 1. It should be {found.wanted:g} at the start: {value}."
        )
    mean, low, high = found.factor
    lines.append(
        f"  The gradient's factor σ(−h) is then {mean:.2f} on average, {low:.2f} to {high:.2f} for 80 % of pairs."
    )
    lines.append(f"  {_judged(found)}")
    if found.field == "beta" and found.anchored:
        lines.append(
            "  Published betas for comparison, errors being means as here: 5000 for SDXL, 2000 to 5000 for SD1.5."
        )
    lines.append("")
    scaled = "" if found.lr_scaling == 1 else f" (before scale_lr's factor {found.lr_scaling:g})"
    lines.append(
        f"training.learning_rate{scaled}: between {found.lowest:.2g}, with which the whole run "
        f"({found.steps:.0f} steps at the peak) moves the predictions by {MOVEMENT:.0%} only if all agree, and "
        f"{found.highest:.2g}, with which one step moves them by {LARGEST_STEP:.0%}. {_lr_judged(found)}"
    )
    lines += ["", " ".join(found.overrides) or "nothing to change"]
    return "\n".join(lines)


def _judged(found: Calibration) -> str:
    ratio = found.configured / found.proposed
    given = f"The configured {_number(found.configured)}"
    if 1 / TOLERANCE <= ratio <= TOLERANCE:
        return f"{given} is within a factor of {TOLERANCE:g} of that: keep it."
    much = f"{given} is {max(ratio, 1 / ratio):.2g} times too {'large' if ratio > 1 else 'small'}"
    if found.movement_at_configured is None:
        return (
            f"{much}: {'most pairs would have no gradient' if ratio > 1 else 'all pairs would have the same weight'}."
        )
    moved = found.movement_at_configured
    if ratio > 1:
        return f"{much}: pairs would saturate once the predictions have moved by {moved:.1g} of the error."
    return (
        f"{much}: no pair would saturate before the predictions have moved by {moved:.2g} times the reference's error."
    )


def _lr_judged(found: Calibration) -> str:
    given = f"The configured {found.learning_rate:.2g}"
    if found.lowest > found.highest:
        return f"The run is too short for that: take more steps. Proposed: {found.proposed_learning_rate:.2g}."
    if found.lowest <= found.learning_rate <= found.highest:
        return f"{given} is between them: keep it."
    side = "above" if found.learning_rate > found.highest else "below"
    return f"{given} is {side} both; proposed is their geometric mean, {found.proposed_learning_rate:.2g}."


def _number(value: float) -> str:
    """Plain digits where they are few, and what YAML reads as a number elsewhere."""
    return f"{value:.0f}" if value == round(value) and value < 1e7 else f"{value:.1e}" if value < 1e-2 else f"{value:g}"


def calibration_values(found: Calibration) -> dict[str, Any]:
    """For a JSON file: every figure, and the overrides."""
    return {**asdict(found), "changes": found.changes}
