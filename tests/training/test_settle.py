"""Settings with the value `auto` follow the model and the device; given values stay."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from diffalign.config.schema import Config, load_config, parse_config
from diffalign.training.run import run_training
from diffalign.training.settle import settled

MakeConfig = Callable[..., Config]

SMALLEST = {
    "output_dir": "out",
    "model": {"pretrained_model_name_or_path": "base"},
    "objective": {"name": "dpo"},
    "data": {"path": "pairs"},
}


@pytest.mark.parametrize(
    ("device", "able", "family", "precision", "checkpointing"),
    [
        ("cpu", True, "sdxl", "no", "none"),
        ("cpu", True, "sd", "no", "none"),
        ("cuda", True, "sdxl", "bf16", "full"),
        ("cuda", True, "sd", "bf16", "none"),
        ("cuda", False, "sdxl", "no", "full"),
    ],
)
def test_a_smallest_config_follows_model_and_device(
    device: str, able: bool, family: str, precision: str, checkpointing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: able)
    config = parse_config(SMALLEST)
    assert isinstance(config, Config)
    found = settled(config, torch.device(device), family)
    assert (found.training.mixed_precision, found.model.gradient_checkpointing) == (precision, checkpointing)
    model = {**SMALLEST["model"], "gradient_checkpointing": "selective"}
    given = parse_config({**SMALLEST, "model": model, "training": {"mixed_precision": "fp16"}})
    assert isinstance(given, Config)
    assert settled(given, torch.device(device), family) is given


def test_what_is_in_force_is_printed_and_recorded(
    make_config: MakeConfig, tiny_sd: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = {"training.mixed_precision": "auto", "model.gradient_checkpointing": "auto"}
    changes |= {"training.max_train_steps": 1, "training.checkpointing_steps": 1}
    config = make_config(tiny_sd, changes)
    run_training(config)
    bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    precision = "bf16" if bf16 else "no"
    assert f"precision {precision}, gradient checkpointing none, device" in capsys.readouterr().out
    saved = load_config(Path(config.output_dir) / "config.yaml")
    assert isinstance(saved, Config)
    assert (saved.training.mixed_precision, saved.model.gradient_checkpointing) == (precision, "none")
    changes |= {"training.max_train_steps": 2, "training.resume_from_checkpoint": "latest"}
    run_training(make_config(tiny_sd, changes))  # auto is the same as what was recorded
