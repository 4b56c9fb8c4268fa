"""The health rules of a run: each reports on a series with its fault, and none on a run that learns."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from torch.nn.functional import logsigmoid

from diffalign.config.health_section import HealthSection
from diffalign.config.schema import Config, TrainingSection, load_config, packaged_config
from diffalign.objectives import DiffusionDPO
from diffalign.training.callbacks.health import Watch, broken_metric
from diffalign.training.callbacks.health_rules import RULES, Limits, Line
from diffalign.training.run import run_training
from diffalign.types import Evidence, Score

MakeConfig = Callable[..., Config]
LIMITS = Limits(HealthSection(), TrainingSection(max_train_steps=100, lr_warmup_steps=10))
LOG_2 = math.log(2)


def series(values: dict[str, list[float]], every: int = 10) -> list[Line]:
    """Lines at steps 10, 20, … from one list for each metric."""
    count = max(len(v) for v in values.values())
    return [{"step": (i + 1) * every, **{k: v[i] for k, v in values.items()}} for i in range(count)]


def spoken(lines: list[Line], limits: Limits = LIMITS) -> list[tuple[int, str]]:
    """(step, rule) of everything said, in order."""
    watch = Watch(limits)
    return [(int(line["step"]), found.rule) for line in lines for found in watch.check(line)]


def messages(lines: list[Line]) -> list[str]:
    """The text of every finding, in order."""
    watch = Watch(LIMITS)
    return [found.message for line in lines for found in watch.check(line)]


def quarters(policy: float, reference: float | None) -> dict[str, float]:
    said = {f"error/policy/q{q}": policy / q for q in (1, 2, 3, 4)}
    return said if reference is None else said | {f"error/reference/q{q}": reference / q for q in (1, 2, 3, 4)}


SICK: dict[str, list[Line]] = {
    "displacement": series(
        {
            "displacement": [0.5, 0.9, 0.95, 0.97],
            "rewards/chosen": [0.1, -0.3, -0.6, -1.0],
            "rewards/margins": [0.1, 0.2, 0.4, 0.7],
        }
    ),
    "saturation": series({"saturated": [0.2, 0.6, 0.7, 0.8], "gradient_factor": [0.4, 0.5, 0.5, 0.5]}),
    "backwards": series(
        {
            "displacement": [0.5] * 4,
            "rewards/accuracies": [0.5, 0.3, 0.2, 0.1],
            "rewards/margins": [0.1, -0.1, -0.2, -0.3],
        }
    ),
    "no_movement": series({"loss": [LOG_2] * 5, "logit/abs": [0.0, 1e-3, 1e-3, 2e-3, 2e-3]}),
    "drift": [{"step": 10.0 * (i + 1), **quarters(e, 0.2)} for i, e in enumerate((0.2, 0.4, 0.5, 0.6))],
    "dead_flips": series({"flip_rate": [0.5, 1.0, 1.0, 0.99]}),
    "no_valid_pairs": series({"rollout/valid": [0.5, 0.01, 0.0, 0.0]}),
    "overfitting": series(
        {
            "heldout/loss": [0.6, 0.9, 0.9, 0.9],
            "heldout/loss/low": [0.5, 0.7, 0.7, 0.7],
            "loss": [0.6, 0.5, 0.4, 0.3],
        }
    ),
    "chance": series(
        {
            "heldout/loss": [0.7] * 7,
            "heldout/accuracy": [0.6, *[0.52] * 6],
            "heldout/accuracy/low": [0.55, *[0.45] * 6],
        }
    ),
    "all_clipped": series({"clip_rate": [0.1, 0.97, 0.98, 0.99]}),
}


def test_every_rule_has_a_case() -> None:
    assert SICK.keys() == RULES.keys()


@pytest.mark.parametrize("name", SICK)
def test_a_rule_speaks_when_its_window_is_full_and_only_then(name: str) -> None:
    lines = SICK[name]
    assert spoken(lines) == [(int(lines[-1]["step"]), name)]
    assert spoken(lines[:-1]) == []
    one_good_line_in_the_window = [*lines[:-2], lines[0], lines[-1]]
    if name != "no_movement":
        assert spoken([{**x, "step": 10 * i} for i, x in enumerate(one_good_line_in_the_window)]) == []


@pytest.mark.parametrize("name", SICK)
def test_a_rule_speaks_once_an_episode(name: str) -> None:
    sick, well = SICK[name][-1], SICK[name][0]
    if name == "no_movement":
        well = {"loss": 0.5, "logit/abs": 1.0}
    lines = [*SICK[name], sick, sick, well, sick, sick, sick]
    if name == "displacement":  # a margin that no longer grows ends an episode, too
        lines = [*SICK[name], well, *SICK[name][1:]]
    renumbered = [{**x, "step": 10 * (i + 1)} for i, x in enumerate(lines)]
    assert [rule for _, rule in spoken(renumbered)] == [name, name]


@pytest.mark.parametrize("name", SICK)
def test_what_is_said_names_the_trouble_and_a_remedy(name: str) -> None:
    (message,) = messages(SICK[name])
    assert any(word in message for word in ("Try", "try", "lower", "Lower", "calibrate"))
    assert "{" not in message
    assert messages([]) == []


def test_no_movement_of_lists_is_seen_by_their_logits() -> None:
    """Of lists of four images, the loss begins at log 24."""
    still = {"loss": [math.log(24)] * 5, "logit/abs": [1e-3] * 5, "list/accuracy": [0.5] * 5}
    assert "still where it began" in messages(series(still))[0]
    assert messages(series({**still, "logit/abs": [0.5] * 5})) == []


def test_overfitting_and_chance_say_what_the_training_pairs_do() -> None:
    rising = [{**line, "rewards/accuracies": 0.6 + line["step"] / 100} for line in SICK["overfitting"]]
    assert "the training accuracy rises (70%, now 100%)" in messages(rising)[0]
    assert "its best value, 0.6 at step 10 (now 0.9, 95 % interval from 0.7)" in messages(rising)[0]
    worse = [{**line, "loss": 0.7} for line in SICK["overfitting"][1:]]  # training pairs get worse as well: not this
    assert spoken([SICK["overfitting"][0], *worse]) == []
    for accuracy, words in ((0.9, "are at 90%, memorised"), (0.5, "are at 50%: labels may be shuffled, or")):
        lines = [{**line, "heldout/accuracy/high": 0.6, "rewards/accuracies": accuracy} for line in SICK["chance"]]
        assert words in messages(lines)[0]
    seldom = [{"step": 5.0, "loss": 0.5}, *SICK["chance"]]  # lines without a measurement do not count
    assert spoken(seldom) == spoken(SICK["chance"])


def test_only_values_that_are_there_are_judged() -> None:
    """Runs without a logit, a reference or a source log less; so does a line whose values are not finite."""
    lines = [{"step": 10 * i, "loss": 0.2, "lr": 1e-5} for i in range(10)]
    assert spoken(lines) == []
    assert spoken([{**x, "saturated": math.nan, "gradient_factor": math.nan} for x in lines]) == []


def test_without_a_reference_drift_is_from_the_first_line() -> None:
    lines = [{"step": 10 * (i + 1), **quarters(e, None)} for i, e in enumerate((0.2, 0.4, 0.5, 0.6))]
    assert spoken(lines) == [(40, "drift")]
    assert "times its first ones" in messages(lines)[0]
    assert "times the reference's" in messages(SICK["drift"])[0]
    falling = [{"step": 10 * (i + 1), **quarters(e, None)} for i, e in enumerate((0.2, 0.19, 0.18, 0.17))]
    assert spoken(falling) == []


def test_a_loss_may_stay_at_log_2_while_the_run_begins() -> None:
    still = {"loss": [LOG_2] * 5, "logit/abs": [1e-3] * 5}
    assert spoken(series(still, every=4)) == []  # the first fifth of 100 steps
    assert spoken(series({**still, "logit/abs": [0.1] * 5})) == []
    assert spoken(series({**still, "loss": [2.5e-8] * 5})) == []  # IPO: no log 2 in it
    late = Limits(HealthSection(), TrainingSection(max_train_steps=100, lr_warmup_steps=60))
    assert spoken(series(still), late) == []


def test_growing_margins_without_loss_of_the_chosen_side_are_no_displacement() -> None:
    margins = [0.1, 0.2, 0.4, 0.7]
    fine = {"displacement": [0.9] * 4, "rewards/chosen": [0.1, 0.1, 0.2, 0.3], "rewards/margins": margins}
    assert spoken(series(fine)) == []
    lost = {"displacement": [0.9] * 4, "rewards/chosen": [-1.0] * 4, "rewards/margins": margins[::-1]}
    assert spoken(series(lost)) == []


def test_thresholds_are_the_configured_ones() -> None:
    strict = Limits(HealthSection(window=2, saturation=0.1), LIMITS.training)
    assert spoken(SICK["saturation"], strict) == [(20, "saturation")]


def test_since_is_the_last_line_before_the_window() -> None:
    watch = Watch(LIMITS)
    found = [f for line in SICK["drift"] for f in watch.check(line)]
    assert [f.since for f in found] == [10]
    first = Watch(LIMITS)
    assert [f.since for line in SICK["drift"][1:] for f in first.check(line)] == [0]


def test_few_lines_are_kept_and_rules_find_in_them_what_they_find_in_all() -> None:
    """`saturated` is missing at times, and `flip_rate` at most steps."""
    draw, watch, lines = random.Random(0), Watch(LIMITS), list[Line]()
    found: list[tuple[str, str]] = []
    expected: list[tuple[str, str]] = []
    speaking: dict[str, str | None] = {}
    for step in range(1, 500):
        saturated = {"saturated": draw.choice([0.1, 0.7, 0.8]), "gradient_factor": draw.random()} if step % 7 else {}
        lines.append({"step": step, **saturated} | ({} if step % 29 else {"flip_rate": draw.choice([0.0, 0.0, 0.5])}))
        found += [(each.rule, each.message) for each in watch.check(lines[-1])]
        for name in ("saturation", "dead_flips"):
            message = RULES[name].check(lines, LIMITS)
            expected += [(name, message)] if message is not None and speaking.get(name) is None else []
            speaking[name] = message
    assert found == expected
    assert len({name for name, _ in found}) == 2
    kept = {id(line) for window in watch.windows.values() for line in window}
    assert len(kept) <= 2 * LIMITS.health.window


def test_one_value_that_is_no_number_is_enough() -> None:
    assert broken_metric({"step": 3, "loss": math.nan}) == "the loss is nan at step 3"
    assert broken_metric({"step": 3, "loss": 0.5, "grad_norm": math.inf}) == "the gradient norm is inf at step 3"
    assert broken_metric({"step": 3, "loss": 0.5}) is None


def test_a_base_without_a_reference_may_prefer_what_it_likes() -> None:
    lines = [{k: v for k, v in line.items() if k != "displacement"} for line in SICK["backwards"]]
    assert spoken(lines) == []


def world(tmp_path: Path, *overrides: str) -> list[Line]:
    """The metrics of a short run on the embedded world."""
    common = ("training.report_to=none", f"output_dir={tmp_path / 'run'}", "training.checkpointing_steps=null")
    config = load_config(packaged_config("world/dpo.yaml"), common, overrides)
    assert isinstance(config, Config)
    run_training(config)
    return [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]


SHORT = ("training.train_batch_size=8", "training.logging_steps=2", "training.lr_warmup_steps=0")


def test_a_run_that_learns_is_left_alone(tmp_path: Path) -> None:
    """Ten steps of the world at the published settings of its config; a fifth of the run is over after two."""
    lines = world(tmp_path, *SHORT, "training.max_train_steps=10")
    assert len(lines) == 5
    assert lines[-1]["logit/abs"] > LIMITS.health.no_movement
    assert spoken(lines, Limits(HealthSection(), TrainingSection(max_train_steps=10))) == []
    assert not (tmp_path / "run/health.jsonl").exists()


def test_a_loss_with_the_wrong_sign_is_named_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Diffusion-DPO with h for −h in its loss alone: what a slip in a new objective looks like."""
    score = DiffusionDPO.score

    def flipped(self: DiffusionDPO, evidence: Evidence) -> Score:
        found = score(self, evidence)
        return replace(found, loss=-logsigmoid(-found.logit))  # type: ignore[operator]

    monkeypatch.setattr(DiffusionDPO, "score", flipped)
    # the same pairs again and again, so that a few steps are enough to prefer one side of nearly all of them
    world(tmp_path, *SHORT, "training.max_train_steps=16", "data.max_pairs=8", "training.learning_rate=5e-5")
    said = [json.loads(line) for line in (tmp_path / "run/health.jsonl").read_text().splitlines()]
    assert "backwards" in {event["rule"] for event in said}


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        ("training.learning_rate=1e-2", "unlearns to denoise"),
        ("objective.beta=2000000", "beyond ±4"),
        ("objective.beta=2", "still log 2"),
    ],
)
def test_a_broken_run_is_named_so(broken: str, words: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Once, in the log and in the run's folder, with the settings that are wrong named."""
    world(tmp_path, *SHORT, "training.max_train_steps=8", broken)
    said = [json.loads(line) for line in (tmp_path / "run/health.jsonl").read_text().splitlines()]
    about = [event for event in said if words in event["says"]]
    assert len(about) == 1
    assert about[0]["action"] == "warn"
    assert broken.partition("=")[0] in about[0]["says"]
    assert sum(words in record.getMessage() for record in caplog.records) == 1
