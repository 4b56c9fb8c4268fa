"""Training a latent judge: what it writes, what changes nothing (resuming, processes), what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import softplus

from diffalign.config.schema import ConfigError, PreferenceModelConfig, parse_config
from diffalign.contrib.latent_judge.build import noisy_latents
from diffalign.contrib.latent_judge.scorer import LatentScorer
from diffalign.contrib.step_aware import world_judge
from diffalign.engine.random import integers, normal
from diffalign.errors import DiffalignError
from diffalign.training.processes import make_accelerator
from diffalign.training.run import build_run, run_training
from tests.contrib.step_aware.test_run import same_updates
from tests.invariants.pool import Pool

Make = Callable[..., PreferenceModelConfig]


@pytest.fixture
def make(tmp_path: Path, tiny_sdxl: Path, pair_folder: Path) -> Make:
    """`make({"section.key": value})`: a four-step run on a tiny base; its steps go over the end of the twelve pairs."""

    def config(overrides: dict[str, object] | None = None) -> PreferenceModelConfig:
        tree: dict[str, dict] = {
            "model": {"pretrained_model_name_or_path": str(tiny_sdxl)},
            "preference_model": {"kind": "latent", "guidance_scale": 7.5},
            "data": {"path": str(pair_folder), "resolution": 32},
            "training": {
                "max_train_steps": 4,
                "train_batch_size": 4,
                "learning_rate": 1e-4,
                "adam_epsilon": 1e-4,  # Adam's first step is lr·sign(g): without this, rounding decides signs
                "logging_steps": 1,
                "report_to": "none",
                "mixed_precision": "no",
            },
        }
        top: dict[str, object] = {"output_dir": str(tmp_path / "out")}
        for name, value in (overrides or {}).items():
            section, _, key = name.partition(".")
            (tree[section] if key else top)[key or section] = value
        return parse_config({**tree, **top})

    return config


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted((folder / "preference_model").rglob("*.safetensors"))
    return {f"{file.parent.name}/{name}": x for file in files for name, x in load_file(file).items()}


def test_the_first_loss_is_the_bases_own_and_the_run_writes_a_scorer(make: Make, tmp_path: Path) -> None:
    config = make({"training.max_train_steps": 2, "training.train_batch_size": 12})
    run = build_run(config, make_accelerator(config))
    batch = next(run.source.batches())
    xt, t = noisy_latents(batch, run.networks.schedule)
    assert torch.equal(t, integers(batch.keys, "t", 0, 1000))
    assert not torch.equal(xt[0] - xt[1], batch.latents[0] - batch.latents[1])  # each side has a noise of its own
    draws = normal(batch.keys, "noise of both sides", (2, *batch.latents.shape[2:]))
    one = run.networks.schedule.add_noise(batch.latents[1], draws[:, 1], t)
    torch.testing.assert_close(one, xt[1], rtol=0, atol=0)
    with torch.no_grad():
        scores, labels, _ = run.scores(batch)
    assert labels.tolist() == [[1.0] * 12, [0.0] * 12]
    run_training(config)
    (first, second) = metrics(tmp_path / "out")
    assert first["loss"] == pytest.approx(float(softplus(scores[1] - scores[0]).mean()), rel=1e-5)
    assert first["accuracy"] == pytest.approx(float((scores[0] > scores[1]).float().mean()))
    assert first["grad_norm"] > 0
    assert first["unet_forwards"] == 12 * 2 * 2
    assert second["loss"] != first["loss"]
    scorer = LatentScorer(str(tmp_path / "out"))
    after, before = scorer.judge.state_dict(), run.model.state_dict()
    still = [name for name, p in run.model.named_parameters() if torch.equal(after[name], before[name])]
    unused = {id(p) for p in run.model.unused()}
    assert {name for name, p in run.model.named_parameters() if id(p) in unused} <= set(still)
    assert not [name for name in still if name.startswith(("unet.", "text_encoders.1.text_projection", "visual"))]


def test_a_resumed_run_is_the_uninterrupted_one(make: Make, tmp_path: Path) -> None:
    run_training(make({"output_dir": str(tmp_path / "whole")}))
    parts = {"output_dir": str(tmp_path / "parts"), "training.checkpointing_steps": 2}
    run_training(make({**parts, "training.max_train_steps": 2}))
    run_training(make({**parts, "training.resume_from_checkpoint": "latest"}))
    one, two = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert one.keys() == two.keys()
    assert all(torch.equal(two[name], one[name]) for name in one)
    assert metrics(tmp_path / "parts") == metrics(tmp_path / "whole")


def test_accumulation_and_processes_give_the_update_of_one_batch(make: Make, tmp_path: Path, pool: Pool) -> None:
    same_updates(make, tmp_path, pool, {"processes": {"training.gradient_accumulation_steps": 2}}, weights)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"preference_model.kind": "latent_judge"}, r"preference_model.kind: "),
        ({"preference_model.tokenizer": "x"}, r"tokenizer: kind latent has no such setting; remove it"),
        (
            {"preference_model.kind": "step_aware", "preference_model.text_projection": "x"},
            r"text_projection: kind step_aware has no such setting",
        ),
    ],
)
def test_what_does_not_belong_is_refused(make: Make, change: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(change)


def test_a_text_projection_is_sds_and_fits(make: Make, tiny_sd: Path, tmp_path: Path) -> None:
    clip = tmp_path / "clip"
    world_judge.untrained(0).save_pretrained(clip)
    world_judge.words().save_pretrained(clip)
    config = make({"preference_model.text_projection": str(clip)})
    with pytest.raises(DiffalignError, match="an SDXL judge compares with the text embedding of the second encoder"):
        build_run(config, make_accelerator(config))
    config = make({"preference_model.text_projection": str(clip), "model.pretrained_model_name_or_path": str(tiny_sd)})
    with pytest.raises(DiffalignError, match=r"is \(64, 64\), and this base's text encoder needs \(32, 32\)"):
        build_run(config, make_accelerator(config))
    config = make({"model.pretrained_model_name_or_path": str(tiny_sd)})
    model = build_run(config, make_accelerator(config)).model
    assert torch.equal(model.text_projection.weight, torch.eye(32))
