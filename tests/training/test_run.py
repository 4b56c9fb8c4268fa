"""Whole runs on small random SD- and SDXL-structured folders: start, resume, save, and load in diffusers."""

from __future__ import annotations

import importlib.util
import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors.torch import load_file

import diffalign.training.run as run_module
from diffalign.config.schema import Config, ConfigError, load_config
from diffalign.training.checkpoints.checkpoint import CheckpointError
from diffalign.training.run import run_training
from diffalign.training.settle import settled
from diffalign.training.trainable import Trainable, TrainingError
from tests.tolerance import PICTURE, assert_same_picture

MakeConfig = Callable[..., Config]
FAMILIES = ("tiny_sd", "tiny_sdxl")
PIPELINES = {"tiny_sd": StableDiffusionPipeline, "tiny_sdxl": StableDiffusionXLPipeline}


def weights(folder: str | Path) -> dict[str, torch.Tensor]:
    """The final weights of a run, LoRA or full."""
    folder = Path(folder)
    lora = folder / "pytorch_lora_weights.safetensors"
    return load_file(lora if lora.exists() else folder / "unet/diffusion_pytorch_model.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def metrics(folder: str | Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("family", FAMILIES)
def test_first_step_is_log_2_with_a_gradient_and_then_it_learns(
    family: str, method: str, make_config: MakeConfig, request: pytest.FixtureRequest
) -> None:
    # four pairs, seen every step at the same points would be no test of generalisation: this is one of descent
    config = make_config(
        request.getfixturevalue(family),
        {"tuning.method": method, "training.max_train_steps": 6, "training.learning_rate": 2e-4},
    )
    run_training(config)
    lines = metrics(config.output_dir)
    assert lines[0]["loss"] == float(torch.tensor(2.0).log())
    assert lines[0]["rewards/margins"] == 0.0
    assert lines[0]["grad_norm"] > 0
    assert lines[1]["loss"] != lines[0]["loss"]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("family", FAMILIES)
def test_two_and_two_steps_are_four_bitwise(
    family: str, method: str, make_config: MakeConfig, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    base = request.getfixturevalue(family)
    shared = {
        "tuning.method": method,
        "training.lr_scheduler": "cosine",
        "training.lr_warmup_steps": 1,
        "training.ema_decay": 0.9,
        "training.checkpointing_steps": 2,
        "data.proportion_empty_prompts": 0.3,
    }
    whole = make_config(base, {**shared, "output_dir": str(tmp_path / "whole")})
    run_training(whole)
    # as if the run had been killed after its checkpoint at step 2, and one log later
    for part in ("checkpoint-4", "unet", "pytorch_lora_weights.safetensors"):
        path = tmp_path / "whole" / part
        if path.exists():
            path.rename(tmp_path / part)
    run_training(
        make_config(
            base, {**shared, "output_dir": str(tmp_path / "whole"), "training.resume_from_checkpoint": "latest"}
        )
    )
    assert same(weights(tmp_path / "whole"), weights(tmp_path))
    assert same(weights(tmp_path / "whole/checkpoint-4"), weights(tmp_path / "checkpoint-4"))
    assert [line["step"] for line in metrics(whole.output_dir)] == [1, 2, 3, 4]


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("family", FAMILIES)
def test_saved_weights_give_the_same_image_in_diffusers(
    family: str, method: str, make_config: MakeConfig, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The policy in memory at the end of the run, against a fresh pipeline that loaded what the run wrote."""
    import diffalign.training.run as module

    base, runs = request.getfixturevalue(family), []
    build = module.build
    monkeypatch.setattr(module, "build", lambda *a: runs.append(build(*a)) or runs[0])
    config = make_config(base, {"tuning.method": method, "training.learning_rate": 1e-2})
    run_training(config)

    cls = PIPELINES[family]
    untouched = cls.from_pretrained(base, safety_checker=None) if family == "tiny_sd" else cls.from_pretrained(base)
    loaded = cls.from_pretrained(base, safety_checker=None) if family == "tiny_sd" else cls.from_pretrained(base)
    if method == "lora":
        loaded.load_lora_weights(config.output_dir)
    else:
        loaded.unet = UNet2DConditionModel.from_pretrained(f"{config.output_dir}/unet")
    memory = cls.from_pretrained(base, safety_checker=None) if family == "tiny_sd" else cls.from_pretrained(base)
    memory.unet = runs[0].unet

    def picture(pipe: object) -> np.ndarray:
        pipe.set_progress_bar_config(disable=True)
        g = torch.Generator().manual_seed(0)
        return pipe("a red circle", num_inference_steps=3, generator=g, output_type="np", height=32, width=32).images

    assert_same_picture(picture(loaded), picture(memory))
    assert np.abs(picture(loaded) - picture(untouched)).max() > 10 * PICTURE


@pytest.mark.parametrize("method", ["lora", "full"])
def test_accumulation_and_batch_are_interchangeable(
    method: str, make_config: MakeConfig, tiny_sdxl: Path, tmp_path: Path
) -> None:
    """4 x 1, 2 x 2 and 1 x 4 (batch x accumulation) draw the same pairs and give the same update."""
    results = {}
    for batch in (4, 2, 1):
        config = make_config(
            tiny_sdxl,
            {
                "output_dir": str(tmp_path / str(batch)),
                "tuning.method": method,
                "training.train_batch_size": batch,
                "training.gradient_accumulation_steps": 4 // batch,
                "training.max_train_steps": 2,
                "training.learning_rate": 1e-4,
                "training.adam_epsilon": 1e-4,  # Adam's first step is lr·sign(g): without this, rounding decides signs
            },
        )
        run_training(config)
        results[batch] = (weights(config.output_dir), metrics(config.output_dir))
    reference, lines = results[4]
    for batch in (2, 1):
        tensors, other = results[batch]
        for a, b in zip(lines, other, strict=True):
            assert a.keys() == b.keys()
            for name in a:
                # rewards are differences of errors times beta / 2 = 250: one float32 ulp of an error near 1 is 3e-5
                assert b[name] == pytest.approx(a[name], rel=2e-3, abs=6e-5), name
        for name in reference:
            torch.testing.assert_close(tensors[name], reference[name], rtol=0, atol=2e-6)


def test_precision_ema_and_optimizers_run(make_config: MakeConfig, tiny_sdxl: Path, tmp_path: Path) -> None:
    for i, change in enumerate(
        (
            {"training.mixed_precision": "bf16"},
            {"training.mixed_precision": "bf16", "tuning.method": "full"},
            {"training.optimizer": "adafactor", "training.learning_rate": 1e-4},
            {"model.gradient_checkpointing": True, "model.attention": "math"},
            {"objective.name": "mapo", "objective.beta": 0.1},
            {"objective.name": "cdpo"},
        )
    ):
        config = make_config(tiny_sdxl, {**change, "output_dir": str(tmp_path / str(i)), "training.max_train_steps": 2})
        run_training(config)
        lines = metrics(config.output_dir)
        if "objective.name" not in change:
            assert lines[0]["loss"] == float(torch.tensor(2.0).log()), change
            assert lines[0]["displacement"] == 0.0
        assert lines[1]["loss"] != lines[0]["loss"], change


def test_final_weights_are_the_average_when_there_is_one(make_config: MakeConfig, tiny_sd: Path) -> None:
    config = make_config(tiny_sd, {"training.ema_decay": 0.5, "training.checkpointing_steps": 4})
    run_training(config)
    final, raw = weights(config.output_dir), weights(f"{config.output_dir}/checkpoint-4")
    assert final.keys() == raw.keys()
    assert not same(final, raw)


def test_checkpoint_limit_keeps_the_newest(make_config: MakeConfig, tiny_sd: Path) -> None:
    config = make_config(tiny_sd, {"training.checkpointing_steps": 1, "training.checkpoints_total_limit": 2})
    run_training(config)
    assert sorted(p.name for p in Path(config.output_dir).glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-4"]


def test_what_is_recorded_of_a_run(make_config: MakeConfig, tiny_sd: Path) -> None:
    config = make_config(tiny_sd)
    run_training(config)
    facts = json.loads((Path(config.output_dir) / "run.json").read_text())
    in_force = settled(config, torch.device(facts["device"]), "sd")
    assert load_config(f"{config.output_dir}/config.yaml") == in_force
    assert facts["versions"]["torch"] == torch.__version__.split("+")[0] or facts["versions"]["torch"]
    assert facts["processes"] == 1


def test_a_folder_with_a_run_is_not_lost(make_config: MakeConfig, tiny_sd: Path) -> None:
    config = make_config(tiny_sd, {"training.checkpointing_steps": 4})
    run_training(config)
    with pytest.raises(ConfigError, match="already contains a run"):
        run_training(config)
    with pytest.raises(ConfigError, match=r"objective\.beta: was 500\.0, is 7\.0"):
        run_training(make_config(tiny_sd, {"objective.beta": 7.0, "training.resume_from_checkpoint": "latest"}))
    with pytest.raises(CheckpointError, match="has: checkpoint-4"):
        run_training(
            make_config(tiny_sd, {"training.checkpointing_steps": 4, "training.resume_from_checkpoint": "checkpoint-9"})
        )
    run_training(make_config(tiny_sd, {"overwrite_output_dir": True, "objective.beta": 7.0}))
    assert not list(Path(config.output_dir).glob("checkpoint-*"))


def test_a_resumed_run_of_the_first_release_is_not_asked_to_rename_its_record(
    make_config: MakeConfig, tiny_sd: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run_training(config := make_config(tiny_sd, {"training.checkpointing_steps": 2}))
    recorded = Path(config.output_dir) / "config.yaml"
    written = recorded.read_text()
    assert written.count(" num_inference_steps:") == 1
    recorded.write_text(written.replace(" num_inference_steps:", " steps:"))
    run_training(make_config(tiny_sd, {"training.checkpointing_steps": 2, "training.resume_from_checkpoint": "latest"}))
    assert "is now called" not in caplog.text


def test_a_loss_that_is_not_finite_stops_the_run(make_config: MakeConfig, tiny_sd: Path) -> None:
    with pytest.raises(TrainingError, match="loss is nan at step"):
        run_training(make_config(tiny_sd, {"training.learning_rate": 100.0, "tuning.method": "full"}))


def test_eight_bit_adam_says_what_it_needs(make_config: MakeConfig, tiny_sd: Path) -> None:
    with pytest.raises(ValueError, match="needs a CUDA device"):
        run_training(make_config(tiny_sd, {"training.optimizer": "adamw_8bit"}))


def test_a_tracker_that_is_not_there_is_named(make_config: MakeConfig, tiny_sd: Path) -> None:
    if importlib.util.find_spec("wandb") is not None:
        pytest.skip("wandb is installed")
    with pytest.raises(ImportError, match="pip install wandb"):
        run_training(make_config(tiny_sd, {"training.report_to": "wandb"}))


def test_the_network_is_freed_before_its_processes_part(
    make_config: MakeConfig, tiny_sdxl: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[weakref.ref[Trainable]] = []
    alive: list[bool] = []
    train, end = run_module.train, Accelerator.end_training

    def watched(run: Trainable, *args: Any) -> dict[str, float]:
        started.append(weakref.ref(run))
        return train(run, *args)

    def ended(self: Accelerator) -> None:
        alive.extend(each() is not None for each in started)
        end(self)

    monkeypatch.setattr(run_module, "train", watched)
    monkeypatch.setattr(Accelerator, "end_training", ended)
    run_training(make_config(tiny_sdxl, {"training.max_train_steps": 1}))
    assert alive == [False]


def test_an_error_does_not_keep_the_network() -> None:
    class Network:
        pass

    made: list[weakref.ref[Network]] = []

    def fails() -> None:
        network = Network()
        made.append(weakref.ref(network))
        try:
            raise ValueError("first")
        except ValueError as first:
            raise RuntimeError("second") from first

    try:
        fails()
    except RuntimeError as error:
        caught = error
    assert made[0]() is not None  # its frames are those of the error
    run_module.free_frames(caught)
    assert made[0]() is None
