"""Early stopping and the best weights: by a scripted held-out loss, killed and resumed, with and without an EMA."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from diffalign.config.schema import Config
from diffalign.config.sections import ValidationSection
from diffalign.io.files import list_files
from diffalign.io.manifest import read_manifest, write_manifest
from diffalign.training.callbacks.base import TrainingState
from diffalign.training.checkpoints.checkpoint import CheckpointError
from diffalign.training.heldout.callback import HeldOut
from diffalign.training.heldout.stopping import EarlyStopping, Rule
from diffalign.training.run import run_training
from diffalign.world import base_path
from tests.training.heldout.test_measure import FEW
from tests.training.test_run import metrics, same, weights

MakeConfig = Callable[..., Config]
NAN = float("nan")
LOSSES = {1: 3.0, 2: 1.0, 3: 0.9, 4: 1.5, 5: 1.2, 6: 0.5}  # step 2 is the last improvement: patience 2 ends at step 4


@pytest.mark.parametrize(
    ("gains", "threshold", "confidence", "improves"),
    [
        ([0.5, -0.3, 0.3, -0.1], 0.0, 0.95, False),  # mean .1, standard error .18
        ([0.5, -0.3, 0.3, -0.1], 0.0, None, True),
        ([0.3, 0.1, 0.2, 0.2], 0.0, 0.95, True),  # mean .2, standard error .04
        ([0.2, 0.2, 0.2, 0.2], 0.0, 0.95, True),
        ([0.2, 0.2, 0.2, 0.2], 0.3, 0.95, False),
        ([0.0, 0.0, 0.0, 0.0], 0.0, None, False),  # equal is no improvement
        ([-0.2, -0.2, -0.2, -0.2], 0.0, 0.95, False),
    ],
)
def test_improvements_by_hand(gains: list[float], threshold: float, confidence: float | None, improves: bool) -> None:
    before = {pair: 10.0**pair for pair in range(4)}  # pairs differ much more than the two measurements
    now = {pair: before[pair] + gain for pair, gain in enumerate(gains)}
    for lower, after in ((False, now), (True, {pair: 2 * before[pair] - now[pair] for pair in now})):
        assert Rule(lower, threshold, confidence).improves(before, after, "abcd") is improves


def test_pairs_of_one_prompt_count_as_one_and_only_common_pairs_are_compared() -> None:
    before, now = dict.fromkeys(range(20), 0.0), {**dict.fromkeys(range(10), 0.3), **dict.fromkeys(range(10, 20), 0.01)}
    assert Rule(False).improves(before, now, [str(i) for i in range(20)])
    assert not Rule(False).improves(before, now, ["a"] * 10 + ["b"] * 10)  # two prompts: .3 and .01
    assert Rule(False).improves(before, now, ["a"] * 20)  # no interval: any rise counts
    assert Rule(False).improves(before, {3: 0.1, 99: -1.0}, ["a"] * 100)
    assert not Rule(False).improves(before, {99: 1.0}, ["a"] * 100)


GOOD, FAIR, BAD = (0.4, 0.4, 0.4), (0.5, 0.3, 0.2), (0.1, 0.2, 0.1)  # FAIR is worse than GOOD by no more than chance
BEST = (0.5, 0.5, 0.6)


@pytest.mark.parametrize(
    ("metric", "plateau", "which", "values", "best", "saved", "ends"),
    [
        ("score", "stop", "best", [GOOD, FAIR, BAD, FAIR], 1, [1], 3),
        ("score", "stop", "best", [BAD, GOOD, FAIR, BEST], 4, [1, 2, 4], None),
        ("loss", "stop", "best", [GOOD, FAIR, BAD, FAIR], 3, [1, 2, 3], None),
        ("score", "stop", "latest", [GOOD, FAIR, BAD, FAIR], 4, [1, 2, 4], 3),
        ("score", "stop", "latest", [BAD, GOOD, FAIR, BEST], 4, [1, 2, 3, 4], None),
        ("score", "continue", "latest", [GOOD, FAIR, BAD, FAIR], 4, [1, 2, 4], None),
        ("score", "continue", "latest", [BAD, FAIR, BEST, GOOD, BAD], 3, [1, 2, 3], 5),
        ("score", "continue", "best", [GOOD, FAIR, BAD, FAIR], 1, [1], None),
        ("score", "continue", "latest", [BAD, (NAN, 0.9, 0.9), GOOD], 3, [1, 3], None),
        ("loss", "continue", "latest", [BAD, (0.1, 0.3, 0.1), GOOD, GOOD], 2, [1, 2], 4),
    ],
)
def test_the_final_weights_and_the_end_by_hand(
    monkeypatch: pytest.MonkeyPatch,
    metric: str,
    plateau: str,
    which: str,
    values: list[tuple[float, ...]],
    best: int,
    saved: list[int],
    ends: int | None,
) -> None:
    """From the values of three pairs: the final measurement, those stored meanwhile, and where patience 2 ends."""
    settings = ValidationSection.model_validate(
        {
            "pairs": 0.5,
            "load_best_model_at_end": True,
            "metric_for_best_model": metric,
            "on_plateau": plateau,
            "plateau_weights": which,
            "early_stopping_patience": 2,
        }
    )
    heldout = SimpleNamespace(
        of_pairs={}, points=SimpleNamespace(source=SimpleNamespace(table=SimpleNamespace(prompts="abc")))
    )
    run = SimpleNamespace(accelerator=SimpleNamespace(is_main_process=False))
    stopping, stored, ended = EarlyStopping(cast(Any, run), settings, cast(Any, heldout)), list[int](), list[int]()
    monkeypatch.setattr(
        "diffalign.training.heldout.stopping.save_best", lambda run: stored.append(stopping.history[-1].step)
    )
    for at, of_pairs in enumerate(values, start=1):
        heldout.of_pairs = {f"heldout/{metric}": dict(enumerate(of_pairs))}
        state = SimpleNamespace(step=at, metrics={f"heldout/{metric}": sum(of_pairs) / 3}, should_stop=False)
        stopping.on_log(cast(Any, state))
        ended += [at] * state.should_stop
    assert stopping.best is not None
    assert (stopping.best.step, stored, ended[:1]) == (best, saved, [] if ends is None else [ends])


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Held-out losses from LOSSES in place of measured ones."""

    def on_log(self: HeldOut, state: TrainingState) -> None:
        state.metrics["heldout/loss"] = LOSSES[state.step]
        noise = 1.0 if state.step == 3 else 0.0  # of the pairs: .1 better in the mean is then no more than chance
        count = len(self.points.source.table)
        self.of_pairs = {"heldout/loss": {i: LOSSES[state.step] + noise * (-1) ** i for i in range(count)}}

    monkeypatch.setattr(HeldOut, "on_log", on_log)


def settings(out: Path, **changes: Any) -> dict[str, Any]:
    return {
        **FEW,
        "output_dir": str(out),
        "training.max_train_steps": 6,
        "training.learning_rate": 1e-3,
        "validation.pairs_every": 1,
        "validation.early_stopping_patience": 2,
        "validation.load_best_model_at_end": True,
        "validation.metric_for_best_model": "loss",
        "training.checkpointing_steps": 1,
        **{name.replace("__", "."): value for name, value in changes.items()},
    }


@pytest.mark.usefixtures("scripted")
def test_a_run_ends_by_its_patience_with_the_best_weights_also_when_killed(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    run_training(make_config(base_path(), settings(out)))
    assert [line["step"] for line in metrics(out)] == [1, 2, 3, 4]
    assert same(weights(out), weights(out / "checkpoint-3"))
    assert not same(weights(out), weights(out / "checkpoint-4"))
    found = read_manifest(out)
    assert not isinstance(found, str)
    assert found["step"] == 3
    (event,) = [json.loads(line) for line in (out / "health.jsonl").read_text().splitlines()]
    assert (event["step"], event["rule"]) == (4, "early_stopping")
    assert "heldout/loss has not improved by more than chance in 2 measurements; it is 1.5; the best" in event["says"]
    assert event["says"].endswith("the best is 0.9 at step 3")
    assert not (out / "best").exists()
    kept = metrics(out), weights(out)

    # before step 3, which improves on step 2 by no more than chance; before its weights are final; at the stop itself
    for killed_after in (2, 3, 4):
        for step in range(killed_after + 1, 5):
            shutil.rmtree(out / f"checkpoint-{step}")
        resumed = settings(out, training__resume_from_checkpoint="latest")
        run_training(make_config(base_path(), resumed))
        assert (metrics(out), same(weights(out), kept[1])) == (kept[0], True)
        assert [json.loads(line)["step"] for line in (out / "health.jsonl").read_text().splitlines()] == [4]

    longer = settings(out, training__resume_from_checkpoint="latest", validation__early_stopping_patience=None)
    run_training(make_config(base_path(), longer))
    assert [line["step"] for line in metrics(out)] == [1, 2, 3, 4, 5, 6]
    assert same(weights(out), weights(out / "checkpoint-6"))

    shutil.rmtree(out / "checkpoint-4/best")
    for name in ("checkpoint-5", "checkpoint-6"):
        shutil.rmtree(out / name)
    (out / "checkpoint-4/manifest.json").unlink()
    write_manifest(out / "checkpoint-4", {"step": 4, "files": list_files(out / "checkpoint-4")})
    with pytest.raises(CheckpointError, match=r"does not contain the weights of its best measurement, step 3"):
        run_training(make_config(base_path(), longer))


@pytest.mark.usefixtures("scripted")
def test_the_best_weights_are_the_averaged_ones(make_config: MakeConfig, tmp_path: Path) -> None:
    shared = {"training__ema_decay": 0.5, "tuning__method": "full", "training__checkpointing_steps": None}
    run_training(make_config(base_path(), settings(tmp_path / "stopped", **shared)))
    short = {"training__max_train_steps": 3, "validation__load_best_model_at_end": False}
    run_training(make_config(base_path(), settings(tmp_path / "short", **shared, **short)))
    assert same(weights(tmp_path / "stopped"), weights(tmp_path / "short"))


def test_a_resumed_run_measures_the_same(make_config: MakeConfig, tmp_path: Path) -> None:
    out = tmp_path / "run"
    plain = settings(out, validation__early_stopping_patience=None, training__checkpointing_steps=2)
    plain |= {"training.max_train_steps": 3, "data.random_flip": True}
    run_training(make_config(base_path(), plain))
    whole = metrics(out), weights(out)
    assert len({line["heldout/loss"] for line in whole[0]}) == 3
    run_training(make_config(base_path(), {**plain, "training.resume_from_checkpoint": "latest"}))
    assert (metrics(out), same(weights(out), whole[1])) == (whole[0], True)


def test_measurements_of_an_older_version_are_refused(tmp_path: Path) -> None:
    settings = ValidationSection.model_validate({"pairs": 0.5, "early_stopping_patience": 2})
    stopping = EarlyStopping(cast(Any, SimpleNamespace()), settings, cast(Any, SimpleNamespace()))
    stopping.load_state({}, tmp_path)  # a run that did not measure
    with pytest.raises(CheckpointError, match="an older version wrote the held-out measurements"):
        stopping.load_state({"history": [[1, 0.5, True]], "compared": {0: 0.5}}, tmp_path)
