"""The health rules: for each the metrics that it needs, when they are bad, and what to report.

Left out: whether images became better. No training metric measures that (docs/evaluation.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from diffalign.config.health_section import HealthSection
from diffalign.config.sections import TrainingSection

Line = Mapping[str, float]  # one line of metrics.jsonl, with its step
Lines = Sequence[Line]

ERROR_RATIO = "error ratio"  # added to each line: the policy's mean error over the reference's, or over its first one

LISTS = "list/accuracy"  # in the lines of objectives that compare ranked lists

# added to lines with a measurement of held-out pairs: how many there were, and values of the best one before their name
MEASURED, AT_BEST, HELDOUT_LOSS = "measurements", "at best", "heldout/loss"


@dataclass(frozen=True)
class Limits:
    """The configured thresholds and the length of the run."""

    health: HealthSection
    training: TrainingSection


@dataclass(frozen=True)
class Rule:
    """A condition on the last lines, and the report where it holds."""

    needs: tuple[str, ...]  # metrics that a line must have to count
    bad: Callable[[Lines, Limits], bool]  # of a full window of such lines
    report: str | Callable[[Line], str]  # on the last line; a string is a format for its metrics
    lower_lr: bool = False  # whether a lower learning rate is the remedy

    def check(self, lines: Lines, limits: Limits) -> str | None:
        """The report, or None where there are too few lines or they are not bad."""
        size = limits.health.window
        window = [line for line in lines if all(name in line for name in self.needs)][-size:]
        if len(window) < size or not self.bad(window, limits):
            return None
        return self.report.format_map(window[-1]) if isinstance(self.report, str) else self.report(window[-1])


def every(bad: Callable[[Line, HealthSection], bool]) -> Callable[[Lines, Limits], bool]:
    """The condition that each line of the window is bad."""
    return lambda lines, limits: all(bad(line, limits.health) for line in lines)


def _displaced(lines: Lines, limits: Limits) -> bool:
    share = limits.health.displacement
    bad = all(x["displacement"] > share and x["rewards/chosen"] < 0 < x["rewards/margins"] for x in lines)
    return bad and lines[-1]["rewards/margins"] > lines[0]["rewards/margins"]


def _unmoved(lines: Lines, limits: Limits) -> bool:
    health, training = limits.health, limits.training
    begun = max(health.no_movement_after * training.max_train_steps, training.lr_warmup_steps)
    least = health.no_movement
    # of lists of m images the loss begins at log m!, and lines do not tell m: their logits alone count
    at_start = (LISTS in x or abs(x["loss"] - math.log(2)) < least for x in lines)
    return all(x["step"] > begun and x["logit/abs"] < least for x in lines) and all(at_start)


def _same_flips(lines: Lines, limits: Limits) -> bool:
    edge = limits.health.dead_flips
    rates = [x["flip_rate"] for x in lines]
    return min(rates) >= 1 - edge or max(rates) <= edge


def _report_saturation(line: Line) -> str:
    state = "won and lost alike, as when the predictions have moved far for this beta: lower training.learning_rate"
    if line["gradient_factor"] < 0.1:
        state = "nearly all are won, and nothing is left to learn from them: stop earlier, use more pairs"
    return (
        f"saturation: {line['saturated']:.0%} of the pairs have a logit beyond ±4, where the gradient's factor σ(−h) "
        f"is 0 or 1 (its mean is {line['gradient_factor']:.2g}); {state}, or lower objective.beta (`diffalign "
        "calibrate` measures which one fits)"
    )


def _report_flips(line: Line) -> str:
    if line["flip_rate"] < 0.5:
        return (
            f"dead flips: flip_rate is {line['flip_rate']:.2g}: no rejected image is treated as a chosen one, and the "
            "loss is DPO's. If that is intended, set objective.flip: none; else check that the reference is a "
            "snapshot of the policy"
        )
    return (
        f"dead flips: flip_rate is {line['flip_rate']:.2g}: the policy is worse than its reference at nearly every "
        "winner, so no image is pushed away. Lower training.learning_rate or objective.beta"
    )


def _overfits(line: Line, health: HealthSection) -> bool:
    above = line["heldout/loss/low"] > line[f"{AT_BEST} {HELDOUT_LOSS}"] + health.overfitting
    return above and line["loss"] < line[f"{AT_BEST} loss"]


def _report_overfitting(line: Line) -> str:
    then = {name: line.get(f"{AT_BEST} {name}", math.nan) for name in ("step", HELDOUT_LOSS, "rewards/accuracies")}
    training = "the training loss falls"
    if "rewards/accuracies" in line and line["rewards/accuracies"] > then["rewards/accuracies"]:
        training = (
            f"the training accuracy rises ({then['rewards/accuracies']:.0%}, now {line['rewards/accuracies']:.0%})"
        )
    return (
        f"overfitting: {training} while the loss of the held-out pairs is above its best value, "
        f"{then[HELDOUT_LOSS]:.4g} at step {then['step']:.0f} (now {line[HELDOUT_LOSS]:.4g}, 95 % interval from "
        f"{line['heldout/loss/low']:.4g}). The run memorises its training pairs. Stop there "
        "(validation.early_stopping_patience, validation.load_best_model_at_end), use more pairs, or lower "
        "training.learning_rate"
    )


def _report_chance(line: Line) -> str:
    accuracy, training = line["heldout/accuracy"], line.get("rewards/accuracies")
    why = "labels may be shuffled, training.learning_rate too low, or the held-out pairs too few"
    if training is not None and training > line.get("heldout/accuracy/high", 1.0):
        why = f"the training pairs are at {training:.0%}, memorised: labels may be shuffled"
    elif training is not None:
        why = f"the training pairs are at {training:.0%}: labels may be shuffled, or training.learning_rate too low"
    return (
        f"chance: the held-out pairs are not predicted better than chance after {line[MEASURED]:.0f} measurements "
        f"(accuracy {accuracy:.2f}, 95 % interval from {line['heldout/accuracy/low']:.2f}); {why}. Look at a sample of "
        "the pairs (`diffalign data check --sample`); if the labels are right, try a higher rate or more pairs"
    )


def _report_drift(line: Line) -> str:
    whose = "the reference's" if any(name.startswith("error/reference") for name in line) else "its first ones"
    return (
        f"drift: the policy's errors are {line[ERROR_RATIO]:.3g} times {whose}. It unlearns to denoise. Lower "
        "training.learning_rate, raise objective.beta, or train fewer steps"
    )


RULES = {
    # The margin grows while the chosen images become less likely: only the rejected ones fall faster.
    "displacement": Rule(
        needs=("displacement", "rewards/chosen", "rewards/margins"),
        bad=_displaced,
        report="likelihood displacement: {displacement:.0%} of the chosen images are less likely than under the "
        "reference (rewards/chosen {rewards/chosen:.3g}) while margins grow ({rewards/margins:.3g}). The policy "
        "becomes worse at everything, only at the rejected images faster. Try a lower training.learning_rate, a "
        "larger objective.beta, fewer steps, objective.safeguard_mu, or a term for the chosen images "
        "(docs/objectives.md)",
        lower_lr=True,
    ),
    # Most logits are so large that σ no longer weighs pairs: those won have no gradient, those lost a full one.
    "saturation": Rule(
        needs=("saturated", "gradient_factor"),
        bad=every(lambda x, health: x["saturated"] > health.saturation),
        report=_report_saturation,
        lower_lr=True,
    ),
    # The policy denoises worse and worse.
    "drift": Rule(
        needs=(ERROR_RATIO,),
        bad=every(lambda x, health: x[ERROR_RATIO] > 1 + health.drift),
        report=_report_drift,
        lower_lr=True,
    ),
    # Descent on the loss makes the policy prefer the rejected images of its own training pairs. Only with a reference
    # (`displacement` needs one): without, the base has a preference of its own.
    "backwards": Rule(
        needs=("displacement", "rewards/accuracies", "rewards/margins"),
        bad=every(lambda x, health: x["rewards/accuracies"] < health.backwards and x["rewards/margins"] < 0),
        report="backwards: of the training pairs only {rewards/accuracies:.0%} have the chosen image above the "
        "rejected one, and margins are below 0 ({rewards/margins:.3g}). Descent prefers the rejected images: the sign "
        "of its loss is wrong, or its targets are (try Diffusion-DPO on the same pairs). Swapped labels have "
        "other symptoms: they are learned as well as right ones",
    ),
    # Well into the run the loss is where it started, log 2, and every logit near 0.
    "no_movement": Rule(
        needs=("loss", "logit/abs"),
        bad=_unmoved,
        report=lambda x: (
            f"no movement: at step {x['step']:.0f} the loss is {x['loss']:.5f}, still "
            f"{'where it began' if LISTS in x else 'log 2'}, and logits are {x['logit/abs']:.2g} on average. "
            "objective.beta or training.learning_rate is too small for this run: `diffalign calibrate` measures which "
            "ones fit"
        ),
    ),
    # Every rejected side is treated alike, so a method that chooses per pair chooses nothing.
    "dead_flips": Rule(needs=("flip_rate",), bad=_same_flips, report=_report_flips),
    # A source that generates its pairs finds hardly any whose scores differ enough.
    "no_valid_pairs": Rule(
        needs=("rollout/valid",),
        bad=every(lambda x, health: x["rollout/valid"] < health.valid_pairs),
        report="hardly any valid pair: {rollout/valid:.1%} of what is sampled. Lower the source's threshold, sample "
        "more images of a prompt, or try another scorer; it may no longer distinguish the images",
    ),
    # The training pairs are memorised: beyond the best measurement of the held-out pairs their loss rises.
    "overfitting": Rule(
        needs=("heldout/loss/low", "loss", f"{AT_BEST} loss"), bad=every(_overfits), report=_report_overfitting
    ),
    # Nothing that was learned holds for other pairs.
    "chance": Rule(
        needs=("heldout/accuracy", "heldout/accuracy/low", MEASURED),
        bad=every(lambda x, health: x["heldout/accuracy/low"] <= 0.5 and x[MEASURED] >= health.chance_after),
        report=_report_chance,
    ),
    # The log-ratios are outside the clip, where there is no gradient.
    "all_clipped": Rule(
        needs=("clip_rate",),
        bad=every(lambda x, health: x["clip_rate"] > health.clipped),
        report="clipped: {clip_rate:.0%} of the ratios are outside [1 − clip, 1 + clip] and have no gradient. The "
        "policy is as far from its reference as the clip allows: stop, lower training.learning_rate, or widen "
        "objective.clip",
    ),
}
