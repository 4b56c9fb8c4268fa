"""Diversity and faithfulness of a run's images: as `evaluate` finds them; a run ends by them, resumed as well."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from diffalign.config.schema import Config
from diffalign.config.sections import ValidationSection
from diffalign.data.table.prompts import PromptError
from diffalign.errors import DiffalignError
from diffalign.evaluation.evaluate import evaluate
from diffalign.evaluation.sampling import Sampling
from diffalign.evaluation.scoring import Scoring
from diffalign.io.manifest import read_manifest
from diffalign.rewards import ScorerError
from diffalign.training.callbacks.base import TrainingState
from diffalign.training.checkpoints.checkpoint import CheckpointError
from diffalign.training.heldout.callback import HeldOut
from diffalign.training.heldout.guards import Guards, prompts_of_guards, some_prompts
from diffalign.training.run import run_training
from diffalign.world import base_path
from tests.training.heldout.test_stopping import settings
from tests.training.test_run import metrics, same, weights

MakeConfig = Callable[..., Config]
DIVERSITY = {1: 0.97, 2: 0.9, 3: 0.86, 4: 0.84, 5: 0.9, 6: 0.9}
FAITHFULNESS = {1: 0.01, 2: -0.01, 3: -0.018, 4: -0.031, 5: 0.0, 6: 0.0}
LIMITS = {  # by the setting of the limit: all settings, and what a run says that it ended
    "least_diversity": (
        {"validation.least_diversity": 0.85},
        "the diversity of images is 0.84 of the start's, and validation.least_diversity is 0.85",
    ),
    "least_faithfulness": (
        {"validation.faithfulness": "world-accuracy", "validation.least_faithfulness": -0.02},
        "world-accuracy has changed by -0.031, and validation.least_faithfulness is -0.02",
    ),
}


def test_prompts_do_not_depend_on_the_order_of_the_rows() -> None:
    prompts = ["a cat", "A  Cat", "a dog", "a cow", "a dog"]
    chosen = some_prompts(prompts, 2, 0)
    assert len(set(map(str.casefold, chosen))) == 2
    assert some_prompts(prompts[::-1], 2, 0) == chosen
    assert sorted(some_prompts(prompts, 9, 0)) == ["A  Cat", "a cow", "a dog"]
    assert len({tuple(some_prompts(prompts, 3, seed)) for seed in range(20)}) > 1


def test_it_is_what_evaluate_finds(make_config: MakeConfig, tmp_path: Path) -> None:
    changes = {
        "training.max_train_steps": 2,
        "training.checkpointing_steps": None,
        "validation.early_stopping_patience": None,
        "validation.load_best_model_at_end": False,
        "validation.faithfulness": "world",
        "validation.guard_prompts": 2,
        "validation.guard_images": 3,
        "training.learning_rate": 1e-3,
        "validation.num_inference_steps": 2,
        "validation.seed": 5,
    }
    config = make_config(base_path(), {**settings(tmp_path / "run"), **changes})
    seen = list[list[str]]()
    original, patched = Guards.on_train_begin, pytest.MonkeyPatch()
    with patched.context() as patch:

        def remember(self: Guards, state: TrainingState) -> None:
            original(self, state)
            seen.append(self.prompts)

        patch.setattr(Guards, "on_train_begin", remember)
        run_training(config)
    (prompts,) = seen
    result = evaluate(
        str(base_path()),
        {"tuned": str(tmp_path / "run")},
        prompts,
        range(5, 8),
        scorers=Scoring(("world-accuracy",), faithfulness="world"),
        sampling=Sampling(num_inference_steps=2, guidance_scale=5.0, device="cpu"),
        out_dir=tmp_path / "evaluation",
    )
    line, model = metrics(tmp_path / "run")[-1], result.models[0]
    assert model.diversity is not None
    assert model.faithfulness is not None
    for name, found, start in (("diversity", model.diversity, 1), ("faithfulness", model.faithfulness.gain, 0)):
        assert found.value != start
        logged = [line[f"heldout/{name}{end}"] for end in ("", "/low", "/high")]
        assert logged == pytest.approx([found.value, found.low, found.high], rel=1e-3)


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Values from the tables above and held-out losses that fall, in place of measured ones."""

    def loss(self: HeldOut, state: TrainingState) -> None:
        state.metrics["heldout/loss"] = 1 / state.step
        self.of_pairs = {"heldout/loss": dict.fromkeys(range(len(self.points.source.table)), 1 / state.step)}

    def measured(self: Guards, state: TrainingState) -> None:
        self.diversity, self.faithfulness = DIVERSITY[state.step], FAITHFULNESS[state.step]

    monkeypatch.setattr(HeldOut, "on_log", loss)
    monkeypatch.setattr(Guards, "on_log", measured)
    monkeypatch.setattr(Guards, "measure", lambda self: ([0.1, 0.2], []))


@pytest.mark.usefixtures("scripted")
@pytest.mark.parametrize(
    ("plateau", "limit"), [("stop", "least_diversity"), ("continue", "least_diversity"), ("stop", "least_faithfulness")]
)
def test_a_run_ends_where_one_is_too_low_with_the_weights_before(
    plateau: str, limit: str, make_config: MakeConfig, tmp_path: Path
) -> None:
    limited, says = LIMITS[limit]
    out, changes = tmp_path / "run", {"validation.on_plateau": plateau, **limited}
    run_training(make_config(base_path(), {**settings(out), **changes}))
    assert [line["step"] for line in metrics(out)] == [1, 2, 3, 4]
    assert same(weights(out), weights(out / "checkpoint-3"))
    found = read_manifest(out)
    assert not isinstance(found, str)
    assert found["step"] == 3
    (event,) = [json.loads(line) for line in (out / "health.jsonl").read_text().splitlines()]
    assert (event["step"], event["rule"]) == (4, "early_stopping")
    assert says in event["says"]
    kept = metrics(out), weights(out)

    for killed_after in (2, 4):
        for step in range(killed_after + 1, 5):
            shutil.rmtree(out / f"checkpoint-{step}")
        run_training(make_config(base_path(), {**settings(out, training__resume_from_checkpoint="latest"), **changes}))
        assert (metrics(out), same(weights(out), kept[1])) == (kept[0], True)

    other = settings(out, training__resume_from_checkpoint="latest", validation__seed=7)
    with pytest.raises(CheckpointError, match="with the same prompts and validation"):
        run_training(make_config(base_path(), {**other, **changes}))

    longer = settings(out, training__resume_from_checkpoint="latest")
    run_training(
        make_config(
            base_path(), {**longer, **changes, f"validation.{limit}": -1 if limit == "least_faithfulness" else 0}
        )
    )
    assert [line["step"] for line in metrics(out)] == [1, 2, 3, 4, 5, 6]
    assert same(weights(out), weights(out / "checkpoint-6"))


@pytest.mark.usefixtures("scripted")
def test_a_start_that_was_not_measured_or_has_no_diversity_is_refused(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, least = tmp_path / "run", {"validation.least_diversity": 0.85}
    run_training(make_config(base_path(), {**settings(out), "training.max_train_steps": 1}))
    with pytest.raises(CheckpointError, match="did not measure the images of its start"):
        run_training(make_config(base_path(), {**settings(out, training__resume_from_checkpoint="latest"), **least}))
    monkeypatch.setattr(Guards, "measure", lambda self: ([0.0, 0.0], []))
    with pytest.raises(DiffalignError, match="all equal"):
        run_training(make_config(base_path(), {**settings(tmp_path / "other"), **least}))


class NotFinite:
    """A scorer without a score for its second image."""

    name = "not-finite"

    def score(self, images: Sequence[object], prompts: Sequence[str]) -> Tensor:
        return torch.tensor([1.0, float("nan"), *[1.0] * (len(images) - 2)])


class TooFew:
    """A scorer that leaves an image out."""

    name = "too-few"

    def score(self, images: Sequence[object], prompts: Sequence[str]) -> Tensor:
        return torch.ones(len(images) - 1)


@pytest.mark.parametrize(
    ("scorer", "says"),
    [
        ("NotFinite", "scorer not-finite gave no finite score to '.+'; name another scorer"),
        ("TooFew", "scorer too-few gave 3 scores for 4 images"),
    ],
)
def test_scores_that_are_none_are_refused_at_the_start(
    scorer: str, says: str, make_config: MakeConfig, tmp_path: Path
) -> None:
    changes = {"validation.faithfulness": f"{__name__}:{scorer}", "validation.num_inference_steps": 1}
    changes |= {"validation.guard_prompts": 2, "validation.guard_images": 2}
    with pytest.raises(ScorerError, match=says):
        run_training(make_config(base_path(), {**settings(tmp_path / "run"), **changes}))
    assert not (tmp_path / "run/metrics.jsonl").exists()


def test_a_scorer_that_is_none_is_refused_before_anything_is_encoded(make_config: MakeConfig, tmp_path: Path) -> None:
    changes = {"validation.faithfulness": "wrld-accuracy", "data.cache_dir": str(tmp_path / "cache")}
    with pytest.raises(ScorerError, match="world-accuracy"):
        run_training(make_config(base_path(), {**settings(tmp_path / "run"), **changes}))
    assert not (tmp_path / "cache").exists()


def test_prompts_of_a_file(tmp_path: Path) -> None:
    def chosen(given: object, **changes: object) -> list[str]:
        limits = {"pairs": 0.5, "least_diversity": 0.8, "guard_prompts": given, **changes}
        return prompts_of_guards(ValidationSection.model_validate(limits), ["a dog", "a cat"])

    file = tmp_path / "prompts.txt"
    file.write_text("a fox\na hen\na fox\n")
    assert chosen(str(file)) == ["a fox", "a hen"]
    assert sorted(chosen(9)) == ["a cat", "a dog"]
    assert chosen(str(file), least_diversity=None) == []
    file.write_text("a fox\n")
    with pytest.raises(DiffalignError, match="has one prompt, which gives no interval; name more"):
        chosen(str(file))
    with pytest.raises(PromptError, match="no such file"):
        chosen(str(tmp_path / "other.txt"))
    with pytest.raises(PromptError, match="prompts are read from a file that ends in"):
        chosen("a fox")
    assert chosen(2e0) == chosen(2)
    for wrong in (1, 2.5, True, None, float("nan"), float("inf"), 10**10):
        with pytest.raises(ValueError, match="from 2 on"):
            chosen(wrong)
