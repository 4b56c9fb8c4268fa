"""Best-of-K and online pairs on a tiny pipeline: the scorer's choice is used, and runs can be resumed."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from diffalign.config.schema import Config, ConfigError
from diffalign.data.table.prompts import PromptError
from diffalign.data.transforms import to_images
from diffalign.sources import BestOf, Context, OnlinePairs, SourceError
from diffalign.training.run import run_training
from tests.sources.judges import Brightness
from tests.training.test_run import metrics, same, weights

MakeConfig = Callable[..., Config]
PROMPTS = ["a red circle", "a blue square", "a photo", "the large square", "a small circle"]
FAST = {"sampling_steps": 2, "generation_batch_size": 4}


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_chosen_is_the_best_and_rejected_the_worst(family: str, make_context: Callable[..., Context]) -> None:
    context = make_context(family, PROMPTS)
    settings = OnlinePairs("tests.sources.judges:Brightness", prompts_per_round=4, samples_per_prompt=3, **FAST)
    source = settings.build(context)
    batch = next(source.batches())
    assert batch.latents.shape == (2, 2, 4, 16, 16)
    for side in range(2):
        images = to_images(context.encoder.decode(batch.latents[side]), ["", ""], [0, 0])
        assert Brightness().score(images, []).tolist() == pytest.approx(batch.scores[side].tolist(), abs=0.02)
    assert (batch.scores[0] > batch.scores[1]).all()
    said = source.take_metrics()
    assert len(said["rollout/score"]) == 12
    assert float(said["rollout/gap"].max()) >= float((batch.scores[0] - batch.scores[1]).max())
    assert (batch.cond.time_ids is None) == (family == "sd")


def test_best_of_has_one_side(make_context: Callable[..., Context]) -> None:
    context = make_context("sd", ["a red circle " * 100, *PROMPTS[1:]])
    settings = BestOf("tests.sources.judges:Brightness", prompts_per_round=4, samples_per_prompt=3, **FAST)
    source = settings.build(context)
    batches = list(islice(source.batches(), 2))
    assert batches[0].latents.shape == (1, 2, 4, 16, 16)
    seen = [place.prompt for place in source.places(0)]
    named = context.encoder.notices.truncated  # in the log, and used
    assert list(named) == [p for p in seen if len(p) > 1000] != []
    best = source.take_metrics()["rollout/score_best"]
    assert sorted(best.tolist()) == sorted(torch.cat([b.scores[0] for b in batches]).tolist())


def test_pairs_below_the_gap_are_not_valid(make_context: Callable[..., Context]) -> None:
    equal = OnlinePairs("tests.sources.judges:Indifferent", prompts_per_round=1, samples_per_prompt=2, **FAST)
    with pytest.raises(SourceError, match="10 rounds in a row, of 1 prompts each, had no valid pair"):
        next(equal.build(make_context("sd", PROMPTS)).batches())


def test_a_score_that_is_no_number_names_the_image(make_context: Callable[..., Context]) -> None:
    broken = BestOf("tests.sources.judges:Broken", prompts_per_round=1, **FAST)
    with pytest.raises(SourceError, match="scorer 'broken' gave nan to the image of prompt"):
        next(broken.build(make_context("sd", PROMPTS)).batches())


SOURCE = {"scorer": "tests.sources.judges:Brightness", "prompts_per_round": 3, "samples_per_prompt": 2, **FAST}


@pytest.mark.parametrize(
    ("method", "objective", "source"),
    [("lora", {"name": "dpo", "beta": 500.0}, "online_pairs"), ("full", {"name": "sft"}, "best_of")],
)
def test_a_resumed_run_is_the_uninterrupted_one(
    method: str, objective: dict, source: str, make_config: MakeConfig, tiny_sdxl: Path, tmp_path: Path
) -> None:
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    shared = {
        "tuning.method": method,
        "objective": objective,
        "source": {"name": source, **SOURCE},
        "data.path": str(tmp_path / "prompts.txt"),
        "training.checkpointing_steps": 2,
        "training.learning_rate": 1e-4,
    }
    run_training(make_config(tiny_sdxl, {**shared, "output_dir": str(tmp_path / "whole")}))
    # a second run killed after its checkpoint at step 2, in the middle of a round, and resumed
    run_training(make_config(tiny_sdxl, {**shared, "output_dir": str(tmp_path / "cut"), "training.max_train_steps": 2}))
    for part in ("unet", "pytorch_lora_weights.safetensors"):
        path = tmp_path / "cut" / part
        if path.exists():
            path.rename(tmp_path / part)
    again = {"output_dir": str(tmp_path / "cut"), "training.resume_from_checkpoint": "latest"}
    run_training(make_config(tiny_sdxl, {**shared, **again}))
    assert same(weights(tmp_path / "cut"), weights(tmp_path / "whole"))
    assert (tmp_path / "whole/checkpoint-2/source.json").read_text() == (
        tmp_path / "cut/checkpoint-2/source.json"
    ).read_text()
    first = metrics(tmp_path / "whole")[0]
    assert first["rollout/pairs"] == 3.0
    if objective["name"] == "dpo":
        assert first["loss"] == float(np.float32(np.log(2)))
    shutil.rmtree(tmp_path / "whole")


def test_configs_are_checked(make_config: MakeConfig, tiny_sd: Path, tmp_path: Path) -> None:
    def fault(**changes: object) -> str:
        tree = {"source": {"name": "online_pairs", "scorer": "world"}, **changes}
        with pytest.raises(ConfigError) as caught:
            make_config(tiny_sd, tree)
        return str(caught.value)

    assert "no source is called 'online_pair'; did you mean 'online_pairs'?" in fault(source={"name": "online_pair"})
    assert "scorers: online_pairs has no such setting; did you mean 'scorer'?" in fault(
        source={"name": "online_pairs", "scorers": "x"}
    )
    assert "samples_per_prompt = 1: must be at least 2" in fault(
        source={"name": "best_of", "scorer": "x", "samples_per_prompt": 1}
    )
    of_winners = fault(source={"name": "best_of", "scorer": "world"})
    assert "generates chosen images for objective sft only, and objective dpo compares images" in of_winners
    assert "data.cache_dir: source online_pairs" in fault(**{"data.cache_dir": "x"})
    config = make_config(tiny_sd, {"source": {"name": "online_pairs", "scorer": "world", "min_gap": 0.1}})
    assert config.resolved()["source"]["min_gap"] == 0.1
    assert make_config(tiny_sd, {"source": config.resolved()["source"]}).source == config.source
    missing = make_config(tiny_sd, {"source": config.source, "data.path": str(tmp_path / "none.txt")})
    with pytest.raises(PromptError, match="no such file"):
        run_training(missing)
    named = make_config(tiny_sd, {"source": config.source, "data.path": "a red circle"})
    with pytest.raises(PromptError, match="prompts are read from a file"):
        run_training(named)
