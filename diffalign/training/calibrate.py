"""Which scale of the logit, and which learning rate, fit this model and these pairs? Measured, before a run.

Where a run starts, policy and reference are equal and every logit is exactly 0, whatever β is: β can only be judged
after a small movement. So a few optimiser steps are taken with the run's own optimiser and pairs, and at pairs not
trained on two things are watched as the policy moves away:

    movement m   rms change of the network's predictions, divided by the rms error of the reference there
    spread       standard deviation over pairs, t and noise of the logit for a scale of 1

    scale  the logit's standard deviation is 1 where m = 5 %: from about there σ(−h) holds the policy back
    lr     highest: one step moves m by 2.5 %; lowest: all steps of the run together would move it by 5 %

The steps follow the gradient that the loss has at the start (the logit's own, which no σ damps), so the scale that was
configured has no part in the measurement. They are repeated at another learning rate until 5 % is reached between the
2nd and the last of them, so neither has the configured learning rate. Adam's first steps have every parameter move by
about lr, whatever the gradient's size; what that does to the predictions is measured and not assumed.

docs/calibration.md has the reasons and the limits. Memory is a training step and a copy of what is trained.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from diffalign.config import Config
from diffalign.engine.measure import measure_and_backward, predictions
from diffalign.objectives import Objective
from diffalign.records import Evidence, Probe, Score
from diffalign.training.optim import make_lr_scheduler, make_optimizer
from diffalign.training.setup import Run

MOVEMENT = 0.05  # m at which the logit's standard deviation is to be 1
LARGEST_STEP = MOVEMENT / 2  # m of one step at the highest learning rate
TOLERANCE = 3.0  # a configured scale within this factor of the proposed one is left alone
ATTEMPTS = 8  # learning rates tried
LIFT = 1e3  # of the loss that is followed: as large as the loss of a usual β, so that Adam's epsilon is nothing to it
BATCH = 64  # pairs of a step, at least, where a step of the run has more

# Fields that may scale a logit; whether one does is tried out, not believed.
FIELDS = ("beta", "num_train_timesteps")
# The standard deviation wanted of the reported logit, where that is not what σ is applied to.
WANTED = {"kto": 2.0}  # its arguments are half the difference of rewards


class CalibrationError(ValueError):
    """A run whose scale cannot be measured; the message says why."""


@dataclass(frozen=True)
class Scale:
    """The field of an objective that scales its logit."""

    field: str
    wanted: float = 1.0  # standard deviation aimed at, of the value of the field times the spread
    in_logit: bool = True  # False (ipo): the reported logit is the bare difference of errors


@dataclass(frozen=True)
class Point:
    """Where the policy stood after so many steps."""

    step: int
    movement: float  # m
    spread: float  # std of the logit at a scale of 1
    weights: float  # norm of the change of the trained weights, divided by their norm


@dataclass(frozen=True)
class Calibration:
    """What was measured and what follows."""

    objective: str
    field: str
    configured: float
    proposed: float
    anchored: bool  # False: no reference, so the logits spread before any step and were taken there
    spread: float  # std of the logit at a scale of 1, at 5 % of movement (not anchored: at the start)
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
    pairs: int  # looked at

    @property
    def changes(self) -> dict[str, float]:
        """Overrides for the config: what is proposed, where that differs from what is there by more than it matters."""
        found = {}
        if not 1 / TOLERANCE <= self.configured / self.proposed <= TOLERANCE:
            found[f"objective.{self.field}"] = self.proposed
        if self.proposed_learning_rate != self.learning_rate:
            found["training.learning_rate"] = self.proposed_learning_rate
        return found


def calibratable(config: Config) -> Scale:
    """The scale that `calibrate` can propose for this config.

    Raises CalibrationError for an objective without one, and for runs whose start is not the reference.
    """
    if config.source is not None:
        raise CalibrationError(
            f"source {config.source.name} makes its pairs while training: there are none to measure at before a run. "
            "Calibrate the same objective on pairs of the same kind that are there already, without the source"
        )
    if config.tuning.resume_lora is not None:
        raise CalibrationError(
            "tuning.resume_lora: the policy has left its reference already, so no logit is 0; calibrate without it"
        )
    if config.training.mixed_precision == "fp16":
        raise CalibrationError(
            "training.mixed_precision: fp16 skips its first steps to find a loss scale; calibrate with "
            "training.mixed_precision=bf16 (or '\"no\"'): what is proposed holds for fp16 as well"
        )
    return scale_of(config.objective)


def scale_of(objective: Objective) -> Scale:
    """The field to which an objective's logit is proportional, found by doubling it near the reference.

    Raises CalibrationError where there is none.
    """
    if objective.name == "ipo":
        return Scale("tau", in_logit=False)
    generator = torch.Generator().manual_seed(0)
    reference = torch.full((2, 8), 0.2, dtype=torch.float64)
    policy = reference + 1e-6 * torch.randn(2, 8, generator=generator, dtype=torch.float64)
    evidence = Evidence(policy, reference, weight=torch.ones(8, dtype=torch.float64))
    logit = objective.score(evidence).logit
    if logit is not None:
        for field in FIELDS:
            doubled = None if not hasattr(objective, field) else _with(objective, field, 2 * getattr(objective, field))
            if doubled is not None and torch.allclose(doubled.score(evidence).logit, 2 * logit, rtol=1e-3, atol=0):
                return Scale(field, WANTED.get(objective.name, 1.0))
    raise CalibrationError(
        f"{objective.name} has no setting that scales a logit, so there is nothing to calibrate: "
        f"{'it has no pairwise term' if logit is None else 'its loss does not saturate'}"
    )


def calibrate(run: Run, steps: int = 16, pairs: int = 128) -> Calibration:
    """Measures and proposes. The run's weights are as before when it returns, and nothing is written.

    steps: optimiser steps of the path, a power of two, at least 4. pairs: those at which the spread is measured.
    Raises CalibrationError for runs that cannot be calibrated (see `calibratable`), for an objective without gradient
    at its start, and where no learning rate moves the policy by 5 % in so many steps. One process only.
    """
    if run.accelerator.num_processes > 1:
        raise CalibrationError("calibrate runs in one process; start it without a launcher")
    if steps < 4 or steps & (steps - 1):
        raise CalibrationError(f"steps = {steps}: give a power of two, at least 4")
    scale, objective, training = calibratable(run.config), run.objective, run.config.training
    unit = objective if not scale.in_logit else _with(objective, scale.field, 1)
    views = _views(run, unit, steps, pairs)
    configured, anchored = float(getattr(objective, scale.field)), objective.needs_reference
    start = _look(run, unit, views)
    followed = unit
    if not anchored:
        followed = _with(objective, scale.field, scale.wanted / start.spread)
    path, logits, lr = _find_path(run, unit, followed, views, steps, anchored)
    spread = _spread_at(path, MOVEMENT) if anchored else start.spread
    nearest = min(logits, key=lambda p: abs(math.log(p[0] / MOVEMENT)))[1] if anchored else start.logits
    h = nearest / nearest.std() * (1.0 if anchored else scale.wanted)
    factor = torch.sigmoid(-h)
    peak = _steps_at_peak(run)
    low, high = _learning_rates(path, lr, peak)
    scaling = run.lr / training.learning_rate
    inside = low <= run.lr <= high
    proposed = run.lr if inside else math.sqrt(low * high) if low < high else high
    return Calibration(
        objective=objective.name,
        field=scale.field,
        configured=configured,
        proposed=_rounded(scale.wanted / spread),
        anchored=anchored,
        spread=spread,
        wanted=scale.wanted,
        movement_at_configured=_movement_at(path, scale.wanted / configured) if anchored else None,
        factor=(float(factor.mean()), *(float(factor.quantile(q)) for q in (0.1, 0.9))),
        learning_rate=training.learning_rate,
        lowest=low / scaling,
        highest=high / scaling,
        proposed_learning_rate=training.learning_rate if inside else _rounded(proposed / scaling),
        lr_scaling=scaling,
        steps=peak,
        path=tuple(path),
        path_lr=lr,
        batch=training.train_batch_size * _micro_batches(run),
        pairs=sum(len(view.base_errors[0]) for view in views),
    )


@dataclass(frozen=True)
class _View:
    """Points at which the policy is looked at, and what the base said there."""

    probe: Probe
    base: Tensor  # predictions
    base_errors: Tensor


@dataclass(frozen=True)
class _Look:
    movement: float
    spread: float
    logits: Tensor


def _views(run: Run, unit: Objective, steps: int, pairs: int) -> list[_View]:
    """Pairs that come after those of the path; the points are made by the base and stay."""
    views, found = [], 0
    batches = run.source.batches(steps)
    while found < pairs:
        batch = next(batches).to(run.accelerator.device)
        with torch.no_grad():
            probe = unit.probe(batch, run.networks)
        base = predictions(run.networks.policy, probe)
        views.append(_View(probe, base, _errors(base, probe)))
        found += batch.pairs
    return views


def _look(run: Run, unit: Objective, views: list[_View]) -> _Look:
    change, base, logits = 0.0, 0.0, []
    for view in views:
        now = predictions(run.networks.policy, view.probe)
        change += float(((now - view.base) ** 2).mean())
        base += float(view.base_errors.mean())
        reference = view.base_errors if view.probe.needs_reference else None
        evidence = Evidence(_errors(now, view.probe), reference, view.probe.t, view.probe.weight)
        logits.append(_logit(unit.score(evidence)).double())
    joined = torch.cat(logits).cpu()
    return _Look(math.sqrt(change / base), float(joined.std()), joined)


def _find_path(
    run: Run, unit: Objective, followed: Objective, views: list[_View], steps: int, anchored: bool
) -> tuple[list[Point], list[tuple[float, Tensor]], float]:
    """The path at a learning rate at which 5 % is reached after the 2nd step and before the end."""
    kept = [p.detach().clone() for p in run.parameters]
    lr = run.lr
    try:
        for _ in range(ATTEMPTS):
            path, logits = _path(run, unit, followed, views, lr, steps, anchored, kept)
            last = path[-1].movement
            if last == 0:
                raise CalibrationError(
                    f"{run.objective.name} with these settings has no gradient where training starts, or none that "
                    f"training.adam_epsilon = {run.config.training.adam_epsilon:g} leaves: {steps} steps moved nothing"
                )
            before = [p for p in path if p.step <= 2]
            if before[-1].movement < MOVEMENT <= last < math.inf:
                return path, logits, lr
            # Far off, one factor is too bold where movement is not proportional, and predictions may not be finite.
            lr *= min(100.0, max(0.01, 1.5 * MOVEMENT / last)) if last < math.inf else 0.01
    finally:
        _restore(run, kept)
    raise CalibrationError(
        f"no learning rate was found with which {steps} steps move the predictions by {MOVEMENT:.0%} "
        f"(the last one tried was {lr:.2g}): look at the data and at training.optimizer's settings"
    )


def _path(
    run: Run,
    unit: Objective,
    followed: Objective,
    views: list[_View],
    lr: float,
    steps: int,
    anchored: bool,
    kept: list[Tensor],
) -> tuple[list[Point], list[tuple[float, Tensor]]]:
    """Steps from the base at a constant learning rate, looked at after 1, 2, 4, … of them."""
    training = run.config.training
    _restore(run, kept)
    optimizer = make_optimizer(run.parameters, training, lr)
    batches, micro = run.source.batches(0), _micro_batches(run)
    limit = math.inf if training.max_grad_norm is None else training.max_grad_norm
    norm = math.sqrt(sum(float((w.double() ** 2).sum()) for w in kept))
    path, logits = [], []

    def score(evidence: Evidence) -> Score:
        found = followed.score(evidence)
        return replace(found, loss=-LIFT * _logit(found)) if anchored else found

    for step in range(1, steps + 1):
        for _ in range(micro):
            batch = next(batches).to(run.accelerator.device)
            with torch.no_grad():
                probe = followed.probe(batch, run.networks)
            measure_and_backward(run.networks, probe, score, scale=1 / micro)
        torch.nn.utils.clip_grad_norm_(run.parameters, limit)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step & (step - 1):
            continue
        now = _look(run, unit, views)
        moved = math.sqrt(sum(float(((p.detach() - w).double() ** 2).sum()) for p, w in zip(run.parameters, kept)))
        finite = math.isfinite(now.movement)
        path.append(Point(step, now.movement if finite else math.inf, now.spread, moved / norm))
        if not finite:
            break
        if now.movement > 0:
            logits.append((now.movement, now.logits))
    return path, logits


def _learning_rates(path: list[Point], lr: float, peak: float) -> tuple[float, float]:
    """The lowest and the highest learning rate that make sense; movement is taken as proportional to it."""
    half, end = path[-2], path[-1]
    power = min(1.0, max(0.5, math.log2(end.movement / half.movement)))  # 1: all steps agree; 0.5: a random walk
    whole = end.movement * (peak / end.step) ** power
    return lr * MOVEMENT / whole, lr * LARGEST_STEP / path[0].movement


def _spread_at(path: list[Point], movement: float) -> float:
    """The spread at a movement, between the path's points by a power law."""
    i = next(i for i, p in enumerate(path) if p.movement >= movement)
    a, b = path[i - 1], path[i]
    share = math.log(movement / a.movement) / math.log(b.movement / a.movement)
    return a.spread * (b.spread / a.spread) ** share


def _movement_at(path: list[Point], spread: float) -> float:
    """The movement that has a spread: near 5 % both grow alike (m² of it is second order), so in proportion."""
    return MOVEMENT * spread / _spread_at(path, MOVEMENT)


def _steps_at_peak(run: Run) -> float:
    """The run's steps, each counted by its share of the peak learning rate."""
    training = run.config.training
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedule, total = make_lr_scheduler(optimizer, training), 0.0
    for _ in range(training.max_train_steps):
        total += schedule.get_last_lr()[0]
        optimizer.step()
        schedule.step()
    return max(total, 1.0)


def _micro_batches(run: Run) -> int:
    """Of a step on the path: the run's, but no more than a few pairs need."""
    training = run.config.training
    return min(training.gradient_accumulation_steps, -(-BATCH // training.train_batch_size))


def _logit(score: Score) -> Tensor:
    assert score.logit is not None  # scale_of has looked
    return score.logit


def _errors(prediction: Tensor, probe: Probe) -> Tensor:
    return ((prediction - probe.target) ** 2).mean((-3, -2, -1))


def _with(objective: Any, field: str, value: float) -> Any:
    """The objective with another scale; a count stays a count."""
    whole = next(f.type for f in fields(objective) if f.name == field) in ("int", int)
    return replace(objective, **{field: max(1, round(value)) if whole else float(value)})


@torch.no_grad()
def _restore(run: Run, kept: list[Tensor]) -> None:
    for p, w in zip(run.parameters, kept, strict=True):
        p.copy_(w)
        p.grad = None


def _rounded(value: float) -> float:
    """Two digits: more would be a pretence."""
    return float(f"{value:.1e}")


def report(found: Calibration) -> str:
    """The figures, what they mean and what to change, in words."""
    name, value = f"objective.{found.field}", _number(found.proposed)
    lines = ["| step | predictions moved | std of the logit at a scale of 1 | weights moved |", "|---|---|---|---|"]
    lines += [f"| {p.step} | {p.movement:.2%} | {p.spread:.3g} | {p.weights:.2g} |" for p in found.path]
    lines += [f"(steps of {found.batch} pairs at lr {found.path_lr:.2g}, looked at on {found.pairs} other pairs)", ""]
    if found.anchored:
        lines.append(
            f"{name}: when the predictions have moved by {MOVEMENT:.0%} of the reference's error, the logit's standard "
            f"deviation is {found.spread:.3g} for a scale of 1. It is to be {found.wanted:g} there: {value}."
        )
    else:
        lines.append(
            f"{name}: there is no reference, so logits differ before any step, with standard deviation "
            f"{found.spread:.3g} for a scale of 1. It is to be {found.wanted:g} at the start: {value}."
        )
    mean, low, high = found.factor
    lines.append(f"  The gradient's factor σ(−h) is then {mean:.2f} on average, {low:.2f} to {high:.2f} for 80 % of pairs.")
    lines.append(f"  {_judged(found)}")
    if found.field == "beta" and found.anchored:
        lines.append(
            "  Published betas for comparison, errors being means as here: 5000 for SDXL, 2000 to 5000 for SD1.5 "
            "(sums over the latent: 65,536 and 16,384 times as large)."
        )
    lines.append("")
    scaled = "" if found.lr_scaling == 1 else f" (before scale_lr's factor {found.lr_scaling:g})"
    lines.append(
        f"training.learning_rate{scaled}: between {found.lowest:.2g}, with which the whole run ({found.steps:.0f} steps "
        f"at the peak) would just move the predictions by {MOVEMENT:.0%}, and {found.highest:.2g}, with which a single "
        f"step moves them by {LARGEST_STEP:.1%}. {_lr_judged(found)}"
    )
    lines += ["", " ".join(f"{key}={_number(v)}" for key, v in found.changes.items()) or "nothing to change"]
    return "\n".join(lines)


def _judged(found: Calibration) -> str:
    ratio = found.configured / found.proposed
    given = f"The configured {_number(found.configured)}"
    if 1 / TOLERANCE <= ratio <= TOLERANCE:
        return f"{given} is within a factor of {TOLERANCE:g} of that: leave it."
    much = f"{given} is {max(ratio, 1 / ratio):.2g} times too {'large' if ratio > 1 else 'small'}"
    if found.movement_at_configured is None:
        return f"{much}: {'most pairs would have no gradient' if ratio > 1 else 'all pairs would count alike'}."
    moved = found.movement_at_configured
    if ratio > 1:
        return f"{much}: pairs would saturate when the predictions have moved by {moved:.2g} of the error, next to nothing."
    return (
        f"{much}: nothing would hold the policy back before the predictions have moved by {moved:.2g} times the "
        "reference's error."
    )


def _lr_judged(found: Calibration) -> str:
    given = f"The configured {found.learning_rate:.2g}"
    if found.lowest > found.highest:
        return f"The run is too short for that: take more steps. Proposed: {found.proposed_learning_rate:.2g}."
    if found.lowest <= found.learning_rate <= found.highest:
        return f"{given} is between them: leave it."
    side = "above" if found.learning_rate > found.highest else "below"
    return f"{given} is {side} both; proposed is their geometric mean, {found.proposed_learning_rate:.2g}."


def _number(value: float) -> str:
    """Plain digits where they are few, and what YAML reads as a number elsewhere."""
    return f"{value:.0f}" if value == round(value) and value < 1e7 else f"{value:.1e}" if value < 1e-2 else f"{value:g}"


def plain_values(found: Calibration) -> dict[str, Any]:
    """For a JSON file: every figure, and the overrides."""
    return {**asdict(found), "changes": found.changes}
