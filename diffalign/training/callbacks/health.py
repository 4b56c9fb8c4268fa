"""Rules that monitor a run: each reads the last lines of its metrics and describes what is wrong and what to try.

Rules are pure functions of what was logged, so they cost a step nothing, every process finds the same, and a resumed
run, which reads its own lines back, finds what an uninterrupted one would. A rule reads the last `health.window` lines
that have the metrics it needs, and reports only when all of them are bad. It reports once per episode; an episode ends
at the first good line. `training/callbacks/recovery.py` acts on the findings.

Left out: whether images became better. No training metric measures that (docs/evaluation.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from diffalign.config.health_section import HealthSection
from diffalign.config.sections import TrainingSection
from diffalign.training.metrics import QUARTERS

Line = Mapping[str, float]  # one line of metrics.jsonl, with its step

NOT_FINITE = "not_finite"
REMEMBERED = 500  # lines, besides the first one: more than any window needs


@dataclass(frozen=True)
class Limits:
    """The configured thresholds and the length of the run."""

    health: HealthSection
    training: TrainingSection


@dataclass(frozen=True)
class Finding:
    """What a rule found."""

    rule: str
    message: str  # what is wrong and what to try
    since: int  # the last logged step before it began; 0: the first line is bad already
    lower_lr: bool  # whether a lower learning rate is the remedy


Rule = Callable[[Sequence[Line], Limits], str | None]


def displacement(lines: Sequence[Line], limits: Limits) -> str | None:
    """The margin grows while the chosen images become less likely: only the rejected ones fall faster."""
    needed = ("displacement", "rewards/chosen", "rewards/margins")
    found = _last(lines, limits, *needed)
    if found is None:
        return None
    share = limits.health.displacement
    sick = all(x["displacement"] > share and x["rewards/chosen"] < 0 < x["rewards/margins"] for x in found)
    if not sick or found[-1]["rewards/margins"] <= found[0]["rewards/margins"]:
        return None
    now = found[-1]
    return (
        f"likelihood displacement: {now['displacement']:.0%} of the chosen images are less likely than under the "
        f"reference (rewards/chosen {now['rewards/chosen']:.3g}) while margins grow ({now['rewards/margins']:.3g}). "
        "The policy becomes worse at everything, only at the rejected images faster. Try a lower "
        "training.learning_rate, a larger objective.beta, fewer steps, or an objective "
        "with a term for the chosen side (mapo, sft)"
    )


def saturation(lines: Sequence[Line], limits: Limits) -> str | None:
    """Most logits are so large that σ no longer weighs pairs: those won have no gradient, those lost a full one."""
    found = _last(lines, limits, "saturated", "gradient_factor")
    if found is None or not all(x["saturated"] > limits.health.saturation for x in found):
        return None
    now = found[-1]
    won = now["gradient_factor"] < 0.1
    what = (
        "nearly all are won, and nothing is left to learn from them: stop earlier, use more pairs"
        if won
        else "won and lost alike, as when the predictions have moved far for this beta: lower training.learning_rate"
    )
    return (
        f"saturation: {now['saturated']:.0%} of the pairs have a logit beyond ±4, where the gradient's factor σ(−h) is "
        f"0 or 1 (its mean is {now['gradient_factor']:.2g}); {what}, or lower objective.beta (`diffalign calibrate` "
        "measures which one fits)"
    )


def backwards(lines: Sequence[Line], limits: Limits) -> str | None:
    """Descent on the loss makes the policy prefer the rejected images of its own training pairs."""
    # with a reference alone (`displacement` is there): without one the base has a preference of its own
    found = _last(lines, limits, "displacement", "rewards/accuracies", "rewards/margins")
    least = limits.health.backwards
    if found is None or not all(x["rewards/accuracies"] < least and x["rewards/margins"] < 0 for x in found):
        return None
    now = found[-1]
    return (
        f"backwards: of the training pairs only {now['rewards/accuracies']:.0%} have the chosen image above the "
        f"rejected one, and margins are below 0 ({now['rewards/margins']:.3g}). Descent prefers the rejected "
        "images: the sign of its loss is wrong, or its targets are (try objective.name: dpo on the same pairs). "
        "Swapped labels have other symptoms: they are learned as well as right ones"
    )


def no_movement(lines: Sequence[Line], limits: Limits) -> str | None:
    """Well into the run the loss is where it started, log 2, and every logit near 0."""
    found = _last(lines, limits, "loss", "logit/abs")
    if found is None:
        return None
    begun = max(limits.health.no_movement_after * limits.training.max_train_steps, limits.training.lr_warmup_steps)
    least = limits.health.no_movement
    if not all(x["step"] > begun and x["logit/abs"] < least and abs(x["loss"] - math.log(2)) < least for x in found):
        return None
    now = found[-1]
    return (
        f"no movement: at step {now['step']:.0f} the loss is {now['loss']:.5f}, still log 2, and logits are "
        f"{now['logit/abs']:.2g} on average. objective.beta or training.learning_rate is too small for this run: "
        "`diffalign calibrate` measures which ones fit"
    )


def drift(lines: Sequence[Line], limits: Limits) -> str | None:
    """The policy denoises worse and worse: its errors against the reference's, or against its own first ones."""
    policy = [f"error/policy/q{q + 1}" for q in range(QUARTERS)]
    reference = [name.replace("policy", "reference") for name in policy]
    anchored = bool(lines) and any(name in lines[-1] for name in reference)
    # without a reference lines are compared with one another, so they must cover the same timesteps
    found = [x for x in lines if _mean(x, policy) is not None and (anchored or all(name in x for name in policy))]
    if len(found) < limits.health.window + (not anchored):
        return None
    last = found[-limits.health.window :]
    base = [_mean(x, reference) if anchored else _mean(found[0], policy) for x in last]
    ratios = [_mean(x, policy) / b if b else math.inf for x, b in zip(last, base, strict=True)]  # type: ignore[operator]
    if not all(ratio > 1 + limits.health.drift for ratio in ratios):
        return None
    whose = "the reference's" if anchored else "its first ones"
    return (
        f"drift: the policy's errors are {ratios[-1]:.3g} times {whose}. "
        "It unlearns to denoise. Lower training.learning_rate, raise objective.beta, or train fewer steps"
    )


def dead_flips(lines: Sequence[Line], limits: Limits) -> str | None:
    """SePPO: every rejected side is treated alike, so the method chooses nothing."""
    found = _last(lines, limits, "flip_rate")
    edge = limits.health.dead_flips
    if found is None or not (
        all(x["flip_rate"] >= 1 - edge for x in found) or all(x["flip_rate"] <= edge for x in found)
    ):
        return None
    if found[-1]["flip_rate"] <= edge:
        return (
            f"dead flips: flip_rate is {found[-1]['flip_rate']:.2g}: no rejected image is treated as a chosen one, and "
            "the loss is DPO's. If that is intended, set objective.flip: none; else check that the reference is a "
            "former policy"
        )
    return (
        f"dead flips: flip_rate is {found[-1]['flip_rate']:.2g}: the policy is worse than its reference at nearly "
        "every winner, so no image is pushed away. Lower training.learning_rate or objective.beta"
    )


def no_valid_pairs(lines: Sequence[Line], limits: Limits) -> str | None:
    """A source that generates its pairs finds hardly any whose scores differ enough."""
    found = _last(lines, limits, "rollout/valid")
    if found is None or not all(x["rollout/valid"] < limits.health.valid_pairs for x in found):
        return None
    return (
        f"hardly any valid pair: {found[-1]['rollout/valid']:.1%} of what is sampled. Lower the source's threshold, "
        "sample more images of a prompt, or try another scorer; it may no longer distinguish the images"
    )


def all_clipped(lines: Sequence[Line], limits: Limits) -> str | None:
    """SPO: the log-ratios are outside the clip, where there is no gradient."""
    found = _last(lines, limits, "clip_rate")
    if found is None or not all(x["clip_rate"] > limits.health.clipped for x in found):
        return None
    return (
        f"clipped: {found[-1]['clip_rate']:.0%} of the ratios are outside [1 − clip, 1 + clip] and have no gradient. "
        "The policy is as far from its reference as the clip allows: stop, lower training.learning_rate, or widen "
        "objective.clip"
    )


# Name -> rule, and whether it asks for a lower learning rate.
RULES: dict[str, tuple[Rule, bool]] = {
    "displacement": (displacement, True),
    "saturation": (saturation, True),
    "drift": (drift, True),
    "backwards": (backwards, False),
    "no_movement": (no_movement, False),
    "dead_flips": (dead_flips, False),
    "no_valid_pairs": (no_valid_pairs, False),
    "all_clipped": (all_clipped, False),
}


@dataclass
class Watch:
    """The lines of a run so far, and the rules that have reported the episode they are in."""

    limits: Limits
    lines: list[Line] = field(default_factory=list)
    open: set[str] = field(default_factory=set)

    def check(self, line: Line) -> list[Finding]:
        """Adds a line; returns what the rules find in it and those before, each once per episode."""
        self.lines.append({name: x for name, x in line.items() if x is not None and math.isfinite(x)})
        if len(self.lines) > 2 * REMEMBERED:
            self.lines = [self.lines[0], *self.lines[-REMEMBERED:]]
        found = []
        for name, (rule, lower_lr) in RULES.items():
            message = rule(self.lines, self.limits)
            if message is None:
                self.open.discard(name)
            elif name not in self.open:
                self.open.add(name)
                found.append(Finding(name, message, self._before(), lower_lr))
        return found

    def _before(self) -> int:
        """The step of the last line before a window that ends now."""
        earlier = self.lines[: -self.limits.health.window]
        return int(earlier[-1]["step"]) if earlier else 0


def broken_metric(line: Line) -> str | None:
    """Which of loss and gradient is not finite. No window: one line is enough."""
    for name in ("loss", "grad_norm"):
        if name in line and not math.isfinite(line[name]):
            return f"the {'loss' if name == 'loss' else 'gradient norm'} is {line[name]} at step {line['step']:.0f}"
    return None


def _last(lines: Sequence[Line], limits: Limits, *names: str) -> Sequence[Line] | None:
    """The last window of lines that have these metrics; None where there are too few."""
    found = [x for x in lines if all(x.get(name) is not None for name in names)][-limits.health.window :]
    return found if len(found) == limits.health.window else None


def _mean(line: Line, names: Sequence[str]) -> float | None:
    there = [line[name] for name in names if line.get(name) is not None]
    return sum(there) / len(there) if there else None
