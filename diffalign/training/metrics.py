"""The metrics of a run: sums stay on the device between logs, so that a log costs one transfer.

Every pair counts once, whatever the batch, the accumulation or the number of processes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffalign.io.files import save_text
from diffalign.types import CHOSEN, Evidence, Score

METRICS_FILE = "metrics.jsonl"
MARGINS_FILE = "margins.jsonl"  # how many pairs had which logit, at every log
TIMING_FILE = "timing.jsonl"  # seconds, pairs and forwards at every log: apart, because no two runs take equal time
RUN_PAGE = "run.html"  # made from these files
HEALTH_FILE = "health.jsonl"  # what the health rules found, and what was done about it
QUARTERS = 4
DECIDED = 4.0  # |logit| beyond which σ is within 2 % of 0 or 1, and weighs pairs no longer
MARGIN_WIDTH = 0.25  # of a histogram's bins of logits, which are centred at the multiples of it from −4 to 4
MARGIN_BINS = 2 * round(DECIDED / MARGIN_WIDTH) + 1  # the first and the last one have what is beyond


def observe(evidence: Evidence, score: Score, timesteps: int) -> dict[str, Tensor]:
    """Per-pair values of one micro-batch, by metric name; each tensor is averaged over all of its entries.

    Besides the objective's own: `loss`; where there is a logit h, `logit/abs`, its mean size, `gradient_factor`, the
    mean of σ(−h), and `saturated`, the share beyond ±4; `displacement`, the share of pairs whose chosen side has become
    less likely than under the reference; policy and reference errors by quarter of the timestep range
    (`error/policy/q1` is the quarter with the least noise).
    """
    values: dict[str, Tensor] = {"loss": score.loss, **score.metrics}
    if score.logit is not None:
        logit = score.logit.detach()
        values["logit/abs"] = logit.abs()
        values["gradient_factor"] = torch.sigmoid(-logit)
        values["saturated"] = (logit.abs() > DECIDED).float()
    if evidence.reference is not None:
        values["displacement"] = (evidence.margin[CHOSEN] > 0).float()
    if evidence.t is not None:
        quarter = (evidence.t * QUARTERS // timesteps).expand(evidence.policy.shape)
        for q in range(QUARTERS):
            inside = (quarter == q).flatten()
            if bool(inside.any()):  # t lives on the CPU: no device sync
                index = inside.nonzero().flatten()
                for who, errors in (("policy", evidence.policy), ("reference", evidence.reference)):
                    if errors is not None:
                        values[f"error/{who}/q{q + 1}"] = errors.flatten()[index.to(errors.device, non_blocking=True)]
    return values


class Meter:
    """Running sums and counts of named per-pair values."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self._margins: Tensor | None = None

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Adds every entry of every tensor; nothing is read back from the device."""
        for name, value in values.items():
            total = value.detach().double().sum()
            self._sums[name] = self._sums[name] + total if name in self._sums else total
            self._counts[name] = self._counts.get(name, 0) + value.numel()

    def add_margins(self, logit: Tensor | None) -> None:
        """Counts each pair's logit in its bin (NaN in none); nothing where the objective has no logit.

        Comparisons and integer sums: deterministic on every device, without waiting for it.
        """
        if logit is None:
            return
        last = MARGIN_BINS // 2
        place = (logit.detach().flatten() / MARGIN_WIDTH).round().clamp(-last, last)
        bins = torch.arange(-last, last + 1, device=place.device)
        counts = (place[:, None] == bins).sum(0)
        self._margins = counts if self._margins is None else self._margins + counts

    def margins(self, gather: Callable[[object], list[list[int]]] | None = None) -> list[int]:
        """The counts since the last call, over all processes where `gather` joins them; empty without any logit."""
        own = [] if self._margins is None else [self._margins.tolist()]
        self._margins = None
        parts = own if gather is None else gather(own)
        return [sum(counts) for counts in zip(*parts, strict=True)]

    def means(self, gather: Callable[[object], list[dict[str, tuple[float, int]]]] | None = None) -> dict[str, float]:
        """Means since the last call, over all processes where `gather` joins their sums; then starts anew."""
        own: dict[str, tuple[float, int]] = {}
        for device in {total.device for total in self._sums.values()}:  # the learning rate never left the CPU
            names = [name for name, total in self._sums.items() if total.device == device]
            sums = torch.stack([self._sums[name] for name in names]).tolist()
            own |= {name: (total, self._counts[name]) for name, total in zip(names, sums, strict=True)}
        self._sums, self._counts = {}, {}
        parts = [own] if gather is None else gather([own])
        merged: dict[str, float] = {}
        for name in dict.fromkeys(n for part in parts for n in part):
            found = [part[name] for part in parts if name in part]
            merged[name] = sum(s for s, _ in found) / sum(c for _, c in found)
        return merged


class JsonLines:
    """`metrics.jsonl`: one line a log, appended, so that a resumed run continues its own file."""

    def __init__(self, path: Path, from_step: int) -> None:
        """Opens the file and removes the lines of steps after `from_step`, which the resumed run will take again."""
        if path.exists():
            lines = [line for line in path.read_text().splitlines() if _step(line) <= from_step]
            save_text(path, "".join(f"{line}\n" for line in lines))
        self._path = path

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Appends one line, with null for numbers that are not finite."""
        with self._path.open("a") as file:
            finite = {n: None if isinstance(v, float) and not math.isfinite(v) else v for n, v in values.items()}
            file.write(json.dumps({"step": step, **finite}, allow_nan=False) + "\n")


def _step(line: str) -> float:
    """The step of a line; beyond all steps where a killed run left half a line."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf
