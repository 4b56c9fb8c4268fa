"""Against closed forms: Student's interval, the design effect, Wilson's table, and symmetry."""

from __future__ import annotations

import json
from math import sqrt
from pathlib import Path

import numpy as np
import pytest

from benchmarks import coverage
from diffalign.evaluation.stats import Bootstrap, paired, ratio, student_ratio, wilson

ROOT = Path(__file__).parents[2]
T_975 = {2: 4.3027, 4: 2.7764, 9: 2.2622, 11: 2.2010, 23: 2.0687, 39: 2.0227}  # printed tables of Student's t
Z_975 = 1.959964


def labels(prompts: int, seeds: int = 1):
    return [f"p{i}" for i in range(prompts) for _ in range(seeds)]


def width(estimate):
    return estimate.high - estimate.low


@pytest.mark.parametrize("prompts", [5, 24, 40])
def test_interval_of_normal_gains_has_students_width(prompts):
    freedom = prompts - 1
    ratios = []
    for seed in range(20):
        gains = np.random.default_rng(seed).normal(0.1, 1, prompts)
        result = paired(np.zeros(prompts), gains, labels(prompts), bootstrap=Bootstrap(resamples=4000, seed=seed))
        ratios.append(width(result.gain) / (2 * T_975.get(freedom, 0) * gains.std(ddof=1) / sqrt(prompts)))
    # percentiles of 5 values are coarse; the rest is Monte Carlo error of 4,000 resamples
    assert np.mean(ratios) == pytest.approx(1, abs=0.10 if prompts == 5 else 0.02)


def test_interval_covers_the_truth_as_often_as_it_says():
    """12 prompts, 3 correlated seeds: 95 % nominal; plain percentiles would cover about 91 %."""
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(600):
        gains = (rng.normal(0, 1, (12, 1)) + rng.normal(0, 1, (12, 3)) + 0.3).ravel()
        low_high = paired(np.zeros(36), gains, labels(12, 3), bootstrap=Bootstrap(resamples=1000, seed=trial)).gain
        covered += low_high.low <= 0.3 <= low_high.high
    assert covered / 600 == pytest.approx(0.945, abs=0.025)  # two standard errors are .018


def test_cluster_interval_is_wider_by_the_design_effect():
    """m seeds with correlation rho within a prompt: variance times 1 + (m - 1) rho (Kish)."""
    prompts, seeds, rho = 400, 8, 0.4
    rng = np.random.default_rng(1)
    gains = sqrt(rho) * rng.normal(size=(prompts, 1)) + sqrt(1 - rho) * rng.normal(size=(prompts, seeds))
    clustered = paired(np.zeros(gains.size), gains.ravel(), labels(prompts, seeds)).gain
    pictures = [f"p{i}" for i in range(gains.size)]
    naive = paired(np.zeros(gains.size), gains.ravel(), pictures, bootstrap=Bootstrap(resamples=2000)).gain
    assert (width(clustered) / width(naive)) ** 2 == pytest.approx(1 + (seeds - 1) * rho, rel=0.12)


def test_runs_add_their_own_variance():
    """Four runs whose means differ by sd .5, 200 prompts of sd 1: variances of crossed effects add."""
    rng = np.random.default_rng(2)
    run_means, prompt_means = np.array([-0.6, -0.2, 0.2, 0.6]), rng.normal(size=200)
    gains = (run_means[:, None] + prompt_means[None]).ravel()
    prompts = labels(200)
    one = paired(np.zeros(800), gains, prompts * 4)
    several = paired(np.zeros(800), gains, prompts * 4, runs=[r for r in range(4) for _ in range(200)])
    assert several.runs == 4
    assert width(one.gain) == pytest.approx(2 * Z_975 * prompt_means.std() / sqrt(200), rel=0.05)
    of_runs, of_prompts = run_means.var(ddof=1) / 4, prompt_means.var(ddof=1) / 200
    freedom = (of_runs + of_prompts) ** 2 / (of_runs**2 / 3 + of_prompts**2 / 199)  # Satterthwaite: 3.3
    expected = Z_975 * student_ratio(0.025, freedom) * sqrt(of_runs + of_prompts)
    assert width(several.gain) == pytest.approx(2 * expected, rel=0.03)  # Monte Carlo error of the percentiles


def test_every_run_must_have_every_prompt():
    with pytest.raises(ValueError, match="same prompts"):
        paired([0, 0, 0], [1, 1, 1], ["a", "b", "a"], runs=[0, 0, 1])


def test_swapping_the_sides_mirrors_everything():
    rng = np.random.default_rng(3)
    a, b = rng.normal(size=(2, 60))
    forth, back = paired(a, b, labels(20, 3)), paired(b, a, labels(20, 3))
    assert back.gain.value == -forth.gain.value
    assert back.gain.low == pytest.approx(-forth.gain.high, abs=1e-12)
    assert back.win_rate.value == pytest.approx(1 - forth.win_rate.value, abs=1e-12)
    assert back.win_rate.high == pytest.approx(1 - forth.win_rate.low, abs=1e-12)
    assert (back.wins, back.losses) == (forth.losses, forth.wins)


def test_counts_and_rate_by_hand():
    result = paired([0, 0, 0, 0], [0.5, 0.009, -0.02, 0.011], ["a", "a", "b", "b"])
    assert (result.wins, result.ties, result.losses) == (2, 1, 1)
    assert result.win_rate.value == 2.5 / 4
    assert result.gain.value == pytest.approx(0.125)
    assert paired([0, 0], [0.5, 0.009], ["a", "b"], tie=0).ties == 0
    assert paired([1, 1], [1, 1], ["a", "b"], tie=0).ties == 2


def test_one_model_has_a_rate_of_one_half_and_ties_of_two_are_no_certainty():
    same = paired(np.full(12, 0.3), np.full(12, 0.3), labels(4, 3))
    assert (same.win_rate.value, same.win_rate.low, same.win_rate.high) == (0.5, 0.5, 0.5)
    result = paired(np.ones(12), np.ones(12) + 1e-3, labels(4, 3))
    assert (result.wins, result.ties, result.losses) == (0, 12, 0)
    assert 0.2 < result.win_rate.low < 0.5 < result.win_rate.high < 0.8
    assert result.win_rate.high - 0.5 == pytest.approx(0.5 - result.win_rate.low)


def test_a_change_of_a_scorer_of_0_and_1_is_twice_its_rate():
    base, tuned = np.ones(24), np.array([1.0] * 23 + [0.0])
    found = paired(base, tuned, labels(8, 3))
    assert found.gain.value == pytest.approx(-1 / 24)
    assert (found.gain.low, found.gain.high) == pytest.approx((2 * found.win_rate.low - 1, 2 * found.win_rate.high - 1))
    assert found.gain.low < -0.1 < 0 <= found.gain.high  # percentiles: -.139 to 0


@pytest.mark.parametrize(
    ("kind", "rate", "prompts", "pictures", "runs", "run_sd"),
    [
        ("beta", 0.97, 24, 12, 1, 0),  # resampled prompts cover 87 %
        ("beta", 0.98, 24, 12, 1, 0),  # 84 %
        ("beta", 0.99, 100, 4, 1, 0),  # 87 %
        ("rare", 0.97, 24, 12, 1, 0),
        ("even", 0.98, 24, 12, 1, 0),
        ("beta", 0.97, 8, 12, 3, 0.2),
    ],
)
def test_the_win_rate_s_interval_covers_near_1(kind, rate, prompts, pictures, runs, run_sd):
    truth = coverage.mean_rate(kind, rate, run_sd)
    found = coverage.cover(coverage.wins(kind, rate, prompts, pictures, 0, runs, run_sd), truth, "win_rate", 400)
    assert found["coverage"] >= 0.93
    assert found["lowest"] >= 0
    assert found["highest"] <= 1


@pytest.mark.parametrize(("runs", "run_sd"), [(1, 0), (3, 0.5)])
def test_a_gain_s_interval_covers(runs, run_sd):
    """Three runs whose effects differ by half of the prompts': plain resampling of both covers 83 %."""
    draw = coverage.gains("normal", 100, 4, runs, run_sd)
    assert coverage.cover(draw, coverage.GAIN, "gain", 300, resamples=300)["coverage"] >= 0.90  # 2 standard errors: .03


def test_winning_everywhere_is_not_certainty():
    result = paired(np.zeros(24), np.ones(24), labels(8, 3))
    assert result.win_rate.value == 1
    assert result.win_rate.low == pytest.approx(8 / (8 + Z_975**2))  # Wilson at rate 1, n = 8 prompts
    assert result.win_rate.high == pytest.approx(1)


def test_wilson_against_a_published_value():
    low, high = wilson(81 / 263, 263)  # Newcombe 1998, Statistics in Medicine 17: .2553 to .3662
    assert (round(low, 4), round(high, 4)) == (0.2553, 0.3662)


@pytest.mark.parametrize("freedom", [4, 9, 11, 23, 39])
def test_student_quantile_against_the_table(freedom):
    assert Z_975 * student_ratio(0.025, freedom) == pytest.approx(T_975[freedom], rel=4e-4)


def test_scores_that_are_not_numbers_are_named():
    tuned = np.array([0.0, 1.0, np.nan, 2.0])
    with pytest.raises(ValueError, match=r"tuned score of image 2 \(prompt 'b'\) is nan"):
        paired(np.zeros(4), tuned, ["a", "a", "b", "b"])
    with pytest.raises(ValueError, match="one score and one prompt per image"):
        paired(np.zeros(3), np.zeros(3), ["a", "a"])
    with pytest.raises(ValueError, match="no images"):
        paired([], [], [])


def test_one_prompt_has_no_interval():
    result = paired([0, 0], [1, 2], ["a", "a"])
    assert result.gain.value == 1.5
    assert np.isnan([result.gain.low, result.win_rate.high]).all()


def test_ratio_interval_agrees_with_the_delta_method():
    rng = np.random.default_rng(4)
    bottom = rng.uniform(1, 2, 300)
    top = 0.8 * bottom + rng.normal(0, 0.1, 300)
    estimate = ratio(top, bottom)
    assert estimate.value == top.sum() / bottom.sum()
    deviation = (top - estimate.value * bottom).std() / bottom.mean() / sqrt(300)
    assert width(estimate) == pytest.approx(2 * Z_975 * deviation, rel=0.05)


def test_the_same_seed_gives_the_same_interval():
    rng = np.random.default_rng(5)
    gains = rng.normal(size=30)
    results = [paired(np.zeros(30), gains, labels(10, 3), bootstrap=Bootstrap(seed=seed)) for seed in (0, 0, 1)]
    assert results[0] == results[1] != results[2]


def test_the_docs_show_what_was_measured():
    """The committed table is the record's, and every line of it in the docs is there."""
    results = ROOT / "benchmarks/results"
    table = (results / "coverage.md").read_text(encoding="utf-8")
    record = json.loads((results / "coverage.json").read_text())
    assert table.endswith(coverage.table(record))
    section = (
        (ROOT / "docs/evaluation.md").read_text(encoding="utf-8").partition("## How often")[2].partition("\n## ")[0]
    )
    shown = [line for line in section.splitlines() if line.startswith("|")]
    assert len(shown) > 30
    assert set(shown) <= set(table.splitlines())
    near_1 = [line for line in record if line["what"] == "win_rate" and line["rate"] >= 0.97]
    assert min(line["coverage"] for line in near_1) > 0.91
