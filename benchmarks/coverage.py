"""How often the intervals of `evaluation/stats.py` contain the true value, and how wide they are: a simulation.

    python -m benchmarks.coverage     # writes benchmarks/results/coverage.json and .md: 4 minutes on one core

Each cell draws prompts (and training runs) from a population with a known mean, scores images of them, and computes the
95 % interval. The kinds of prompts are:

    even    every prompt has the same rate, so images are independent
    beta    the rates of prompts have a beta distribution of concentration 2 (correlation 1/3 within a prompt)
    rare    losses occur in one kind of prompt out of ten; the other prompts always win (or tie)

Gains of prompts are normal, exponential (skew 2) or lognormal (skew 6), with scale 1 before the noise of images. With
three training runs, `run_sd` is the standard deviation of their effects, on the logit of a rate or in the unit of the
gain.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffalign.evaluation.stats import Bootstrap, Paired, paired

OUT = Path("benchmarks/results/coverage")
SIZES = ((8, 12), (24, 12), (100, 4))  # prompts and pictures of each
RATES = (0.5, 0.8, 0.9, 0.97, 0.98, 0.99)
KINDS = ("even", "beta", "rare")
GAIN = 0.3  # true mean gain, in prompts' standard deviations

Floats = NDArray[np.float64]
Draw = Callable[[np.random.Generator], Floats]  # gains "run prompt picture"


def wins(
    kind: str, rate: float, prompts: int, pictures: int, ties: float = 0.0, runs: int = 1, run_sd: float = 0.0
) -> Draw:
    """Gains of +1, 0 or -1 whose decided pictures are won at `rate`; `ties` is the share of ties."""

    def draw(rng: np.random.Generator) -> Floats:
        if kind == "beta":
            rates = rng.beta(2 * rate, 2 * (1 - rate), prompts)
        elif kind == "rare":
            rates = np.where(rng.random(prompts) < 0.1, 1 - 10 * (1 - rate), 1.0)
        else:
            rates = np.full(prompts, rate)
        of_runs = _moved(rates, rng.normal(0, run_sd, (runs, 1))) if run_sd else np.broadcast_to(rates, (runs, prompts))
        shape = (runs, prompts, pictures)
        won = rng.random(shape) < of_runs[..., None]
        return np.where(rng.random(shape) < ties, 0.0, np.where(won, 1.0, -1.0))

    return draw


def gains(kind: str, prompts: int, pictures: int, runs: int = 1, run_sd: float = 0.0) -> Draw:
    """Gains of mean GAIN: effects of prompts, runs, both together (.3) and pictures (1)."""

    def draw(rng: np.random.Generator) -> Floats:
        effects = {
            "normal": lambda: rng.normal(0, 1, prompts),
            "exponential": lambda: rng.exponential(1, prompts) - 1,
            "lognormal": lambda: rng.lognormal(0, 1, prompts) - np.exp(0.5),
        }[kind]()
        both = rng.normal(0, 0.3, (runs, prompts, 1)) + run_sd * rng.normal(0, 1, (runs, 1, 1))
        return GAIN + effects[None, :, None] + both + rng.normal(0, 1, (runs, prompts, pictures))

    return draw


def cover(draw: Draw, truth: float, what: str, trials: int, resamples: int = 1000, seed: int = 0) -> dict[str, Any]:
    """Share of `trials` whose interval contains `truth`, the mean width, and misses on either side.

    what: "gain" or "win_rate". A sample's own seed follows from `seed` and its number, so figures are repeatable.
    """
    low, high = np.array([_limits(draw, what, resamples, (seed, trial)) for trial in range(trials)]).T
    slack = 1e-12  # of sums in another order
    return {
        "coverage": float(((low <= truth + slack) & (truth <= high + slack)).mean()),
        "width": float((high - low).mean()),
        "truth_below": float((truth < low - slack).mean()),
        "truth_above": float((truth > high + slack).mean()),
        "lowest": float(low.min()),
        "highest": float(high.max()),
    }


def _limits(draw: Draw, what: str, resamples: int, seed: tuple[int, int]) -> tuple[float, float]:
    sample = draw(np.random.default_rng(seed))
    runs, prompts, pictures = sample.shape
    found: Paired = paired(
        np.full(sample.size, 0.5),  # not 0 or 1, which would make the scorer a rate itself
        0.5 + sample.ravel(),
        [f"{p:03d}" for p in range(prompts) for _ in range(pictures)] * runs,
        runs=np.repeat(np.arange(runs), prompts * pictures).tolist(),
        bootstrap=Bootstrap(resamples=resamples if what == "gain" else 2),  # a rate draws none
    )
    estimate = getattr(found, what)
    return estimate.low, estimate.high


def _moved(rates: Floats, by: Floats) -> Floats:
    """Rates moved on the logit scale."""
    inner = np.clip(rates, 1e-9, 1 - 1e-9)
    return 1 / (1 + (1 - inner) / inner * np.exp(-by))


def cells() -> Iterator[tuple[dict[str, Any], Draw, float, str]]:
    """Settings, sampler, truth and what is asked of every cell."""
    for prompts, pictures in SIZES:
        size = {"prompts": prompts, "pictures": pictures}
        for kind in KINDS:
            for rate in RATES:
                for ties in (0.0, 0.2, 0.6):
                    if kind == "rare" and rate < 0.9:  # no such prompts: one in ten cannot lose more
                        continue
                    cell = {**size, "kind": kind, "rate": rate, "ties": ties, "runs": 1, "run_sd": 0.0}
                    yield cell, wins(kind, rate, prompts, pictures, ties), (1 - ties) * rate + ties / 2, "win_rate"
            for rate, run_sd in ((0.5, 0.0), (0.9, 0.0), (0.97, 0.0), (0.5, 0.2), (0.9, 0.2), (0.97, 0.2)):
                if kind == "rare" and (rate < 0.9 or run_sd):
                    continue
                draw = wins(kind, rate, prompts, pictures, 0.0, 3, run_sd)
                cell = {**size, "kind": kind, "rate": rate, "ties": 0.0, "runs": 3, "run_sd": run_sd}
                yield cell, draw, mean_rate(kind, rate, run_sd), "win_rate"
        for kind in ("normal", "exponential", "lognormal"):
            for runs, run_sd in ((1, 0.0), (3, 0.0), (3, 0.2), (3, 0.5)):
                cell = {**size, "kind": kind, "runs": runs, "run_sd": run_sd}
                yield cell, gains(kind, prompts, pictures, runs, run_sd), GAIN, "gain"


def mean_rate(kind: str, rate: float, run_sd: float) -> float:
    """The population's rate where runs move it; by a large sample, whose error is below .0005."""
    if not run_sd:
        return rate
    rng = np.random.default_rng(0)
    rates = rng.beta(2 * rate, 2 * (1 - rate), 1_000_000) if kind == "beta" else np.full(1_000_000, rate)
    return float(_moved(rates, rng.normal(0, run_sd, 1_000_000)).mean())


def table(lines: list[dict[str, Any]]) -> str:
    """The cells as Markdown: coverage in percent and mean width, a column for each number of prompts."""
    found: dict[tuple[Any, ...], dict[tuple[int, int], dict[str, Any]]] = {}
    for line in lines:
        key = (line["what"], line["kind"], line.get("rate"), line.get("ties"), line["runs"], line["run_sd"])
        found.setdefault(key, {})[line["prompts"], line["pictures"]] = line
    head = ["interval of", "prompts' kind", "rate", "ties", "runs", "run sd", *(f"{n} × {m}" for n, m in SIZES)]
    rows = [f"| {' | '.join(head)} |", "|---|---" + "|---:" * (len(head) - 2) + "|"]
    for (what, kind, rate, ties, runs, run_sd), by_size in sorted(found.items(), key=lambda item: _order(item[0])):
        shown = [f"{100 * by_size[size]['coverage']:.0f} ({by_size[size]['width']:.3f})" for size in SIZES]
        settings = ["" if value is None else f"{value:g}" for value in (rate, ties, runs, run_sd)]
        rows.append(f"| {' | '.join([what.replace('_', ' '), kind, *settings, *shown])} |")
    return "\n".join(rows) + "\n"


def _order(key: tuple[Any, ...]) -> tuple[Any, ...]:
    what, kind, rate, ties, runs, run_sd = key
    return what, runs, kind, rate or 0, ties or 0, run_sd


def main() -> None:
    """Every cell, to JSON and Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    lines = [
        {"what": what, **settings, "truth": truth, "trials": args.trials, **cover(draw, truth, what, args.trials)}
        for settings, draw, truth, what in cells()
    ]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.with_suffix(".json").write_text(json.dumps(lines, indent=1) + "\n")
    error = 100 * (0.05 * 0.95 / args.trials) ** 0.5
    lead = (
        f"Coverage in % of 95 % intervals, mean width in brackets; prompts × pictures of each. {args.trials} samples a "
        f"cell: a standard error of {error:.1f}. Written by `python -m benchmarks.coverage`.\n\n"
    )
    args.out.with_suffix(".md").write_text(lead + table(lines))


if __name__ == "__main__":
    main()
