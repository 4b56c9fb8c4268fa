"""Monitoring of a run by its metrics: which rules of `training/callbacks/health_rules.py` its last lines break.

Rules are pure functions of what was logged, so they cost a step nothing, every process finds the same, and a resumed
run, which reads its own lines back, finds what an uninterrupted one would. A rule reads the last `health.window` lines
that have the metrics it needs, and reports when they are bad: once per episode, which ends at the first good line.
`training/callbacks/recovery.py` acts on the findings.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field

from diffalign.training.callbacks.health_rules import AT_BEST, ERROR_RATIO, HELDOUT_LOSS, MEASURED, RULES, Limits, Line
from diffalign.training.metrics import QUARTERS

NOT_FINITE = "not_finite"


@dataclass(frozen=True)
class Finding:
    """What a rule found."""

    rule: str
    message: str  # what is wrong and what to try
    since: int  # the last logged step before it began; 0: the first line is bad already
    lower_lr: bool  # whether a lower learning rate is the remedy


@dataclass
class Watch:
    """The lines that the rules read, of a run so far, and the rules that have reported the episode they are in.

    A line stays as long as it is in the window of a rule, so memory does not grow with a run.
    """

    limits: Limits
    windows: dict[str, deque[Line]] = field(default_factory=dict)  # by rule: the last lines with what it needs
    steps: deque[int] = field(default_factory=deque)  # of the last window of lines, and of the one before
    open: set[str] = field(default_factory=set)
    first_error: float | None = None  # the policy's mean in the first line with errors at all timesteps
    measured: int = 0  # lines with a measurement of held-out pairs
    best: Line | None = None  # the one with the lowest held-out loss

    def check(self, line: Line) -> list[Finding]:
        """Adds a line; returns what the rules find in it and those before, each once per episode."""
        finite = {name: x for name, x in line.items() if x is not None and math.isfinite(x)}
        whole = finite | self._error_ratio(finite) | self._since_best(finite)
        size = self.limits.health.window
        self.steps = deque([*self.steps, int(line["step"])], maxlen=size + 1)
        found = []
        for name, rule in RULES.items():
            window = self.windows.setdefault(name, deque(maxlen=size))
            if all(needed in whole for needed in rule.needs):
                window.append(whole)
            message = rule.check(window, self.limits)
            if message is None:
                self.open.discard(name)
            elif name not in self.open:
                self.open.add(name)
                found.append(Finding(name, message, self._before(), rule.lower_lr))
        return found

    def _before(self) -> int:
        """The step of the last line before a window that ends now."""
        return self.steps[0] if len(self.steps) > self.limits.health.window else 0

    def _since_best(self, line: Line) -> dict[str, float]:
        """Of a line with a measurement of held-out pairs: how many there were, and what the best one had."""
        if HELDOUT_LOSS not in line:
            return {}
        self.measured += 1
        if self.best is None or line[HELDOUT_LOSS] < self.best[HELDOUT_LOSS]:
            self.best = line
        kept = {"step", HELDOUT_LOSS, "loss", "rewards/accuracies"} & self.best.keys()
        return {MEASURED: self.measured} | {f"{AT_BEST} {name}": self.best[name] for name in kept}

    def _error_ratio(self, line: Line) -> dict[str, float]:
        """How large the policy's error is beside the reference's, or beside its own first one; empty without errors.

        Without a reference lines are compared with one another, so they must cover the same timesteps.
        """
        policy, reference = _errors(line, "policy"), _errors(line, "reference")
        if not policy or (not reference and len(policy) < QUARTERS):
            return {}
        error = sum(policy) / len(policy)
        if reference:
            base = sum(reference) / len(reference)
        elif self.first_error is not None:
            base = self.first_error
        else:
            self.first_error = error
            return {}
        return {ERROR_RATIO: error / base if base else math.inf}


def broken_metric(line: Line) -> str | None:
    """Which of loss and gradient is not finite. No window: one line is enough."""
    for name in ("loss", "grad_norm"):
        if name in line and not math.isfinite(line[name]):
            return f"the {'loss' if name == 'loss' else 'gradient norm'} is {line[name]} at step {line['step']:.0f}"
    return None


def _errors(line: Line, who: str) -> list[float]:
    names = (f"error/{who}/q{q + 1}" for q in range(QUARTERS))
    return [line[name] for name in names if name in line]
