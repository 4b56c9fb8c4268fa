"""Which scale of the logit, and which learning rate, fit this model and these pairs? Measured, before a run.

Where a run starts, policy and reference are equal and every logit is exactly 0, whatever β is: β can only be judged
after a small movement. So calibration takes a few optimiser steps with the run's own optimiser and pairs. At other
pairs it measures two things as the policy moves away:

    movement m   rms change of the network's predictions, divided by the rms error of the reference there
    spread       of the logit for a scale of 1, over pairs, t and noise: half the distance between its 10th and 90th
                 percentiles over 1.2816, which is the standard deviation of a normal variable (these have long tails)

    scale  the logit's spread is 1 where m = 5 %: 80 % of the pairs then have a σ(−h) within about .22 and .78
    lr     highest: one step has m = 5 %; lowest: all steps of the run have m = 5 %, if they all agree

The steps follow the gradient that the loss has at the start (the logit's own, which no σ damps), so the measurement
does not depend on the configured scale. They are repeated at another learning rate until 5 % is reached between the
2nd and the last of them, so it does not depend on the configured learning rate either. In Adam's first steps every
parameter moves by about lr, whatever the gradient's size; the effect on the predictions is measured.

docs/calibration.md gives the reasons and the limits. Memory: a training step, and a copy of what is trained.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from diffalign.config.schema import Config
from diffalign.config.sections import TrainingSection
from diffalign.engine.measure import compare, measure_and_backward, predictions, squared_errors
from diffalign.errors import DiffalignError
from diffalign.io.progress import Progress
from diffalign.models.policy.networks import Networks
from diffalign.objectives import Objective
from diffalign.objectives.base import ask
from diffalign.objectives.modified import Modified
from diffalign.training.build import Run
from diffalign.training.inspect.calibration_report import LARGEST_STEP, MOVEMENT, Calibration, Point
from diffalign.training.optim.optimizers import make_lr_scheduler, make_optimizer
from diffalign.types import Evidence, PairBatch, Probe, Score

log = logging.getLogger(__name__)

NORMAL_90 = 1.2816  # the 90th percentile of a standard normal variable
ATTEMPTS = 8  # learning rates tried
LIFT = 1e3  # of the loss that is followed: as large as the loss of a usual β, so that Adam's epsilon is nothing to it
BATCH = 64  # pairs of a step, at least, where a step of the run has more


class CalibrationError(DiffalignError):
    """A run whose scale cannot be measured; the message says why."""


@dataclass(frozen=True)
class Scale:
    """The field of an objective that scales its logit."""

    field: str
    wanted: float = 1.0  # spread aimed at, of the value of the field times the spread
    in_logit: bool = True  # False: the logit that the objective reports does not contain the scale


def calibratable(config: Config) -> Scale:
    """The scale that `calibrate` can propose for this config.

    Raises CalibrationError for an objective without one, and for runs whose start is not the reference.
    """
    if config.source is not None:
        raise CalibrationError(
            f"source {config.source.name} generates its pairs while training: there are none to measure before a run. "
            "Calibrate the same objective on existing pairs of the same kind, without the source"
        )
    if not config.tuning.starts_at_reference:
        raise CalibrationError(
            f"tuning: with {config.tuning!r} the policy starts from other weights than its reference, so no logit is "
            "0; calibrate with settings that start it at the reference, such as lora without resume_lora"
        )
    if config.training.mixed_precision == "fp16":
        raise CalibrationError(
            "training.mixed_precision: fp16 skips its first steps to find a loss scale; calibrate with "
            "training.mixed_precision=bf16 (or '\"no\"'): its proposals are valid for fp16 too"
        )
    return scale_of(config.objective)


def scale_of(objective: Objective) -> Scale:
    """The field to which an objective's logit is proportional near the reference, as the objective declares it.

    Raises CalibrationError where there is none.
    """
    if objective.scale_field is None:
        raise CalibrationError(
            f"{objective.name} has no setting that scales a logit, so there is nothing to calibrate; choose "
            "its learning rate by the health rules of a short run"
        )
    return Scale(objective.scale_field, objective.scale_spread, objective.scale_in_logit)


def calibrate(run: Run, steps: int = 16, pairs: int = 128) -> Calibration:
    """Measures, and proposes a scale and a learning rate. It restores the run's weights and writes nothing.

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
    views = _views(run.networks, run.source.batches(steps), unit, pairs)
    configured, anchored = float(getattr(objective, scale.field)), objective.needs_reference
    start = _observed(run.networks, unit, views)
    followed = unit
    if not anchored:
        followed = _with(objective, scale.field, scale.wanted / start.spread)
    path, logits, lr = _find_path(_Walk(run, unit, followed, tuple(views), steps, anchored))
    spread = _spread_at(path, MOVEMENT) if anchored else start.spread
    nearest = min(logits, key=lambda p: abs(math.log(p[0] / MOVEMENT)))[1] if anchored else start.logits
    h = nearest / _spread(nearest) * (1.0 if anchored else scale.wanted)
    factor = torch.sigmoid(-h)
    peak = _steps_at_peak(training)
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
        factor=(float(factor.mean()), float(factor.quantile(0.1)), float(factor.quantile(0.9))),
        learning_rate=training.learning_rate,
        lowest=low / scaling,
        highest=high / scaling,
        proposed_learning_rate=training.learning_rate if inside else _rounded(proposed / scaling),
        lr_scaling=scaling,
        steps=peak,
        path=tuple(path),
        path_lr=lr,
        batch=training.train_batch_size * _micro_batches(training),
        pairs=sum(len(view.base_errors[0]) for view in views),
    )


@dataclass(frozen=True)
class _View:
    """Points at which the policy is observed, and the base's answers there."""

    probe: Probe
    base: Tensor  # predictions
    base_errors: Tensor
    base_square: float  # mean squared error, whatever masks the data have


@dataclass(frozen=True)
class _Observed:
    movement: float
    spread: float
    logits: Tensor


def _views(networks: Networks, batches: Iterator[PairBatch], unit: Objective, pairs: int) -> list[_View]:
    """So many pairs, or a few more, which come after those of the path; the base chooses their points."""
    views, found = [], 0
    with _progress(pairs, f"the base at {pairs} pairs", " pairs") as bar:
        while found < pairs:
            batch = next(batches).to(networks.device)
            probe = ask(unit, batch, networks)
            base = predictions(networks.policy, probe)
            views.append(_View(probe, base, squared_errors(base, probe), float(((base - probe.target) ** 2).mean())))
            found += batch.pairs
            bar.update(batch.pairs)
    if not any(view.base_square for view in views):  # its targets are its own predictions
        raise CalibrationError(
            f"{unit.name} with these settings has no gradient where training starts: the base's error is 0"
        )
    return views


def _observed(networks: Networks, unit: Objective, views: Sequence[_View]) -> _Observed:
    change, base, logits = 0.0, 0.0, []
    for view in views:
        now = predictions(networks.policy, view.probe)
        change += float(((now - view.base) ** 2).mean())
        base += view.base_square
        reference = view.base_errors if view.probe.needs_reference else None
        evidence = compare(replace(view.probe, reference=reference, reference_answer=view.base), now)
        logits.append(_logit(unit.score(evidence)).double())
    joined = torch.cat(logits).cpu()
    return _Observed(math.sqrt(change / base), _spread(joined), joined)


@dataclass(frozen=True)
class _Walk:
    """The steps of one calibration: their gradient, and where the policy is observed on the way."""

    run: Run
    unit: Objective  # the objective with a scale of 1
    followed: Objective  # whose gradient is followed
    views: tuple[_View, ...]
    steps: int
    anchored: bool


def _find_path(walk: _Walk) -> tuple[list[Point], list[tuple[float, Tensor]], float]:
    """The path at a learning rate at which 5 % is reached after the 2nd step and before the end."""
    run = walk.run
    before = [p.detach().clone() for p in run.parameters]
    lr = run.lr
    try:
        for attempt in range(1, ATTEMPTS + 1):
            with _progress(walk.steps, f"attempt {attempt}, learning rate {lr:.2g}", " steps") as bar:
                path, logits = _path(walk, lr, before, bar)
            last = path[-1].movement
            second = [p for p in path if p.step <= 2][-1].movement
            if second < MOVEMENT <= last < math.inf:
                return path, logits, lr
            # 5 % in the middle between them; not too boldly, since movement is proportional only where it is small
            between = math.sqrt(second * last)
            lr *= min(100.0, max(0.01, MOVEMENT / between)) if between < math.inf else 0.01
    finally:
        _restore(run.parameters, before)
    raise CalibrationError(
        f"no learning rate was found with which {walk.steps} steps move the predictions by {MOVEMENT:.0%} "
        f"(the last one tried was {lr:.2g}): check the data and training.optimizer's settings"
    )


def _path(walk: _Walk, lr: float, before: list[Tensor], bar: Any) -> tuple[list[Point], list[tuple[float, Tensor]]]:
    """Steps from the base at a constant learning rate; the policy is observed after 1, 2, 4, … of them."""
    run, training = walk.run, walk.run.config.training
    _restore(run.parameters, before)
    optimizer = make_optimizer(run.parameters, training, lr)
    batches, micro = run.source.batches(0), _micro_batches(training)
    limit = math.inf if training.max_grad_norm is None else training.max_grad_norm
    norm = math.sqrt(sum(float((w.double() ** 2).sum()) for w in before))
    path, logits = [], []

    def score(evidence: Evidence) -> Score:
        found = walk.followed.score(evidence)
        return replace(found, loss=-LIFT * _logit(found)) if walk.anchored else found

    for step in range(1, walk.steps + 1):
        for _ in range(micro):
            batch = next(batches).to(run.accelerator.device)
            probe = ask(walk.followed, batch, run.networks)
            measure_and_backward(run.networks, probe, score, scale=1 / micro)
        gradient = torch.nn.utils.clip_grad_norm_(run.parameters, limit)
        if step == 1 and float(gradient) == 0:  # weight decay alone would move something
            raise CalibrationError(f"{run.objective.name} with these settings has no gradient where training starts")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        bar.update()
        if step & (step - 1):
            continue
        now = _observed(run.networks, walk.unit, walk.views)
        moved = math.sqrt(sum(float(((p.detach() - w).double() ** 2).sum()) for p, w in zip(run.parameters, before)))
        finite = math.isfinite(now.movement)
        path.append(Point(step, now.movement if finite else math.inf, now.spread, moved / norm))
        bar.set_postfix(moved=f"{now.movement:.2%}")
        if not finite:
            break
        if now.movement > 0:
            logits.append((now.movement, now.logits))
    return path, logits


def _progress(total: int, stage: str, unit: str) -> Any:
    """A bar with rate and time left on a terminal; elsewhere one log line for the stage."""
    bar = Progress(total=total, desc=stage, unit=unit, disable=None)
    if bar.disable:
        log.info("calibrate: %s", stage)
    return bar


def _spread(logits: Tensor) -> float:
    """The standard deviation, if the logits were normal, from their inner 80 %."""
    low, high = logits.quantile(torch.tensor([0.1, 0.9], dtype=logits.dtype))
    return float(high - low) / (2 * NORMAL_90)


def _learning_rates(path: list[Point], lr: float, peak: float) -> tuple[float, float]:
    """The lowest and the highest learning rate that make sense; movement is taken as proportional to it."""
    whole = path[-1].movement * peak / path[-1].step
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


def _steps_at_peak(training: TrainingSection) -> float:
    """The run's steps, each counted by its share of the peak learning rate."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedule, total = make_lr_scheduler(optimizer, training), 0.0
    for _ in range(training.max_train_steps):
        total += float(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return max(total, 1.0)


def _micro_batches(training: TrainingSection) -> int:
    """Of a step on the path: the run's, but no more than a few pairs need."""
    return min(training.gradient_accumulation_steps, -(-BATCH // training.train_batch_size))


def _logit(score: Score) -> Tensor:
    assert score.logit is not None  # scale_of refuses objectives without one
    return score.logit


def _with(objective: Any, field: str, value: float) -> Any:
    """The objective with another scale; a count stays a count."""
    if isinstance(objective, Modified):
        return replace(objective, objective=_with(objective.objective, field, value))
    whole = next(f.type for f in fields(objective) if f.name == field) in ("int", int)
    return replace(objective, **{field: max(1, round(value)) if whole else float(value)})


@torch.no_grad()
def _restore(parameters: Sequence[Tensor], before: Sequence[Tensor]) -> None:
    for p, w in zip(parameters, before, strict=True):
        p.copy_(w)
        p.grad = None


def _rounded(value: float) -> float:
    """Two digits, as many as the measurement justifies."""
    return float(f"{value:.1e}")
