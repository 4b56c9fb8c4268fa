"""The diversity of a run's images: as `evaluate` measures it, and the end of a run by it, resumed as well."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from diffalign.config.schema import Config
from diffalign.errors import DiffalignError
from diffalign.evaluation.evaluate import evaluate
from diffalign.evaluation.sampling import Sampling
from diffalign.io.manifest import read_manifest
from diffalign.training.callbacks.base import TrainingState
from diffalign.training.checkpoints.checkpoint import CheckpointError
from diffalign.training.heldout.callback import HeldOut
from diffalign.training.heldout.diversity import Diversity, some_prompts
from diffalign.training.run import run_training
from diffalign.world import base_path
from tests.training.heldout.test_stopping import settings
from tests.training.test_run import metrics, same, weights

MakeConfig = Callable[..., Config]
VALUES = {1: 0.97, 2: 0.9, 3: 0.86, 4: 0.84, 5: 0.9, 6: 0.9}


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
        "validation.least_diversity": 0,
        "validation.diversity_prompts": 2,
        "validation.diversity_images": 3,
        "validation.num_inference_steps": 2,
        "validation.seed": 5,
    }
    config = make_config(base_path(), {**settings(tmp_path / "run"), **changes})
    seen = list[list[str]]()
    original, patched = Diversity.__init__, pytest.MonkeyPatch()
    with patched.context() as patch:

        def remember(self: Diversity, heldout: HeldOut, validation: object) -> None:
            original(self, heldout, config.validation)
            seen.append(self.prompts)

        patch.setattr(Diversity, "__init__", remember)
        run_training(config)
    (prompts,) = seen
    result = evaluate(
        str(base_path()),
        {"tuned": str(tmp_path / "run")},
        prompts,
        range(5, 8),
        scorers=("world",),
        sampling=Sampling(num_inference_steps=2, guidance_scale=5.0, device="cpu"),
        out_dir=tmp_path / "evaluation",
    )
    found, line = result.models[0].diversity, metrics(tmp_path / "run")[-1]
    assert found is not None
    assert found.value != 1
    names = ("heldout/diversity", "heldout/diversity/low", "heldout/diversity/high")
    assert [line[name] for name in names] == pytest.approx([found.value, found.low, found.high], rel=1e-3)


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Diversities from VALUES and held-out losses that fall, in place of measured ones."""

    def loss(self: HeldOut, state: TrainingState) -> None:
        state.metrics["heldout/loss"] = 1 / state.step
        self.of_pairs = {"heldout/loss": dict.fromkeys(range(len(self.points.source.table)), 1 / state.step)}

    def diversity(self: Diversity, state: TrainingState) -> None:
        self.value = VALUES[state.step]

    monkeypatch.setattr(HeldOut, "on_log", loss)
    monkeypatch.setattr(Diversity, "on_log", diversity)
    monkeypatch.setattr(Diversity, "measure", lambda self: [0.1, 0.2])


@pytest.mark.usefixtures("scripted")
@pytest.mark.parametrize("plateau", ["stop", "continue"])
def test_a_run_ends_where_it_is_too_low_with_the_weights_before(
    plateau: str, make_config: MakeConfig, tmp_path: Path
) -> None:
    out, changes = tmp_path / "run", {"validation.on_plateau": plateau, "validation.least_diversity": 0.85}
    run_training(make_config(base_path(), {**settings(out), **changes}))
    assert [line["step"] for line in metrics(out)] == [1, 2, 3, 4]
    assert same(weights(out), weights(out / "checkpoint-3"))
    found = read_manifest(out)
    assert not isinstance(found, str)
    assert found["step"] == 3
    (event,) = [json.loads(line) for line in (out / "health.jsonl").read_text().splitlines()]
    assert (event["step"], event["rule"]) == (4, "early_stopping")
    assert "the diversity of images is 0.84 of the start's, and validation.least_diversity is 0.85" in event["says"]
    kept = metrics(out), weights(out)

    for killed_after in (2, 4):
        for step in range(killed_after + 1, 5):
            shutil.rmtree(out / f"checkpoint-{step}")
        run_training(make_config(base_path(), {**settings(out, training__resume_from_checkpoint="latest"), **changes}))
        assert (metrics(out), same(weights(out), kept[1])) == (kept[0], True)

    other = settings(out, training__resume_from_checkpoint="latest", validation__seed=7)
    with pytest.raises(CheckpointError, match="with the same validation"):
        run_training(make_config(base_path(), {**other, **changes}))

    longer = settings(out, training__resume_from_checkpoint="latest", validation__least_diversity=None)
    run_training(make_config(base_path(), {**longer, "validation.on_plateau": plateau}))
    assert [line["step"] for line in metrics(out)] == [1, 2, 3, 4, 5, 6]
    assert same(weights(out), weights(out / "checkpoint-6"))


@pytest.mark.usefixtures("scripted")
def test_a_start_that_was_not_measured_or_has_no_diversity_is_refused(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, least = tmp_path / "run", {"validation.least_diversity": 0.85}
    run_training(make_config(base_path(), {**settings(out), "training.max_train_steps": 1}))
    with pytest.raises(CheckpointError, match="did not measure the diversity of its start"):
        run_training(make_config(base_path(), {**settings(out, training__resume_from_checkpoint="latest"), **least}))
    monkeypatch.setattr(Diversity, "measure", lambda self: [0.0, 0.0])
    with pytest.raises(DiffalignError, match="all equal"):
        run_training(make_config(base_path(), {**settings(tmp_path / "other"), **least}))
