"""`model.scheduler`: the noise that follows from it, against diffusers, in training, images and export alike."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline

from diffalign.cli.images.options import given_sampling
from diffalign.cli.main import parse
from diffalign.cli.training.train import sampled_as
from diffalign.config.schema import Config, save_config
from diffalign.config.strict_yaml import ConfigError
from diffalign.engine.random import initial_noise
from diffalign.engine.schedule import NoiseSchedule
from diffalign.engine.scheduler_config import completed
from diffalign.engine.scheduler_override import OVERRIDES, changes, overridden
from diffalign.errors import DiffalignError
from diffalign.evaluation.generate import generate
from diffalign.evaluation.manifest import manifest_rows
from diffalign.evaluation.sampling import Sampling
from diffalign.export.card.write import write_run_card
from diffalign.export.kohya import kohya_metadata
from diffalign.export.tuned_run import find_tuned_run
from diffalign.models.adapters.save_load import make_pipeline
from diffalign.models.loading.base import load_base, outline_base
from diffalign.models.loading.family import ModelError
from diffalign.models.spec import ModelSpec
from diffalign.training.build import trained_as
from diffalign.training.checkpoints.identity import run_identity
from diffalign.training.open_data import open_table
from tests.models.adapters.test_merge import write_lora
from tests.models.conftest import Model

SD = {"_class_name": "PNDMScheduler", "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
ZERO = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing"}


@pytest.mark.parametrize(
    "override",
    [ZERO, {"beta_end": 0.014}, {"beta_schedule": "squaredcos_cap_v2"}, {"steps_offset": 3, "set_alpha_to_one": True}],
)
def test_the_noise_is_that_of_diffusers(override: dict[str, Any]) -> None:
    schedule = NoiseSchedule.from_config(overridden(SD, override))
    theirs = DDIMScheduler.from_config({**completed(SD), "_class_name": "DDIMScheduler", **override})
    torch.testing.assert_close(schedule.alphas_cumprod, theirs.alphas_cumprod.double(), rtol=2e-5, atol=1e-7)
    assert schedule.final_alpha_cumprod == pytest.approx(float(theirs.final_alpha_cumprod), rel=1e-6)
    theirs.set_timesteps(20)
    assert schedule.timesteps(20).tolist() == theirs.timesteps.tolist()
    assert schedule.prediction_type == theirs.config.prediction_type


def test_what_it_changes_is_said() -> None:
    own = NoiseSchedule.from_config(SD)
    said = changes(own, NoiseSchedule.from_config(overridden(SD, ZERO)))
    assert said == (
        "prediction_type epsilon -> v_prediction, timestep_spacing leading -> trailing, "
        "SNR at the last timestep 0.00468 -> 0, first of 30 sampling steps 957 -> 999"
    )
    root = 0.068265  # of SD's last ᾱ (arXiv 2305.08891, Table 1)
    assert own.snr(torch.tensor(999)).item() == pytest.approx(root**2 / (1 - root**2), rel=1e-4)
    assert changes(own, own) == ""
    assert changes(own, NoiseSchedule.from_config(overridden(SD, {"beta_schedule": "linear"}))) != ""


@pytest.mark.parametrize(
    ("override", "why"),
    [
        ({"rescale_betas_zero_snr": True}, "needs a model that predicts v.*model.rescale_betas_zero_snr"),
        ({"sigma_max": 80}, "sigma_max cannot be set; allowed: prediction_type"),
        ({"prediction_type": "flow"}, "prediction_type = 'flow' is not supported"),
    ],
)
def test_what_cannot_be_is_refused(tiny_sd: Path, override: dict[str, Any], why: str) -> None:
    with pytest.raises(ModelError, match=f"the scheduler of .*{why}"):
        outline_base(ModelSpec(str(tiny_sd), scheduler=override))


def test_betas_have_no_effect_beside_a_table() -> None:
    with pytest.raises(DiffalignError, match="beta_end has no effect, because the config has trained_betas"):
        overridden({"trained_betas": [0.1, 0.2]}, {"beta_end": 0.3})


def test_the_section_of_a_config(make_config: Callable[..., Config], tiny_sd: Path) -> None:
    for settings, why in (
        ({"model.scheduler": {"timestep_spaceing": "trailing"}}, "unknown key.*timestep_spacing"),
        ({"model.scheduler": {"beta_end": 1.5}}, "beta_end"),
        ({"model.scheduler": ZERO, "model.prediction_type": "epsilon"}, "model.prediction_type are both set"),
        ({"model.scheduler": ZERO, "model.rescale_betas_zero_snr": False}, "rescale_betas_zero_snr are both set"),
    ):
        with pytest.raises(ConfigError, match=why):
            make_config(tiny_sd, settings)
    config = make_config(tiny_sd, {"model.scheduler": ZERO})
    assert set(type(config.model.scheduler).model_fields) == set(OVERRIDES)
    options = sampled_as(config)
    args = parse(["generate", "base", "--prompts", "p", "--out", "o", "--device", "cpu", *options])
    assert given_sampling(args).scheduler_config == ZERO


def test_training_images_and_export_have_it_alike(
    models, make_config: Callable[..., Config], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model: Model = models["sd"]
    config = make_config(model.folder, {"model.scheduler": ZERO})
    with caplog.at_level(logging.INFO):
        base = trained_as(load_base(config.model.spec), config.model)
    (said,) = [record.getMessage() for record in caplog.records if "the scheduler of" in record.getMessage()]
    assert "SNR at the last timestep 0.00468 -> 0" in said
    opened = trained_as(copy.copy(model.base), config.model)  # as a Trainer has it that was given an open pipeline
    assert opened.scheduler_config == base.scheduler_config
    assert torch.equal(opened.schedule.alphas_cumprod, base.schedule.alphas_cumprod)
    assert float(base.schedule.alphas_cumprod[-1]) == 0
    table = open_table(config)
    was, now = run_identity(config, table, model.base)["base"], run_identity(config, table, base)["base"]
    assert [name for name in now if now[name] != was[name]] == ["noise schedule"]

    run = Path(write_lora(model, tmp_path / "run", seed=1, rank=4, alpha=4))
    save_config(config, run / "config.yaml")
    sampling = Sampling(3, 3.0, scheduler_config=ZERO, device="cpu")
    (made,) = generate(
        str(model.folder), ["a red circle"], [5], out_dir=tmp_path / "made", tuned=run, sampling=sampling
    )
    (row,) = manifest_rows(tmp_path / "made")
    assert row["settings"]["scheduler_config"] == ZERO
    pipe = StableDiffusionPipeline.from_pretrained(model.folder, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    pipe.load_lora_weights(run)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False, **ZERO)
    noise = initial_noise(["a red circle"], [5], (4, 16, 16))
    theirs = pipe("a red circle", latents=noise, num_inference_steps=3, guidance_scale=3.0, output_type="np").images[0]
    ours = np.asarray(made.open()).astype(int)
    assert np.abs(ours - np.round(theirs * 255)).max() <= 1
    own = replace(sampling, scheduler_config=None)
    (other,) = generate(str(model.folder), ["a red circle"], [5], out_dir=tmp_path / "own", tuned=run, sampling=own)
    assert np.abs(ours - np.asarray(other.open()).astype(int)).max() > 2

    found = find_tuned_run(run)
    exported = load_base(found.base_spec())
    assert exported.scheduler_config == base.scheduler_config
    assert make_pipeline(exported).scheduler.config.rescale_betas_zero_snr is True
    assert kohya_metadata(exported, found, [], "x")["ss_zero_terminal_snr"] == "True"
    card = write_run_card(run).read_text()
    lines = 'DDIMScheduler.from_config(pipeline.scheduler.config, prediction_type="v_prediction", rescale_betas'
    assert lines in card
    assert "import DDIMScheduler, DiffusionPipeline" in card
