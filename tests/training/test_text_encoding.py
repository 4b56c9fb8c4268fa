"""A run with long prompts and clip skip: the same with and without a cache, and not mixed with another encoding."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from diffalign.config.schema import Config
from diffalign.data.row import DataError
from diffalign.models.adapters.lora import LORA_FILE
from diffalign.models.loading.family import ModelError
from diffalign.training.build import build
from diffalign.training.inspect.dry_run import describe_run
from diffalign.training.run import run_training

ZERO = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing"}
TEXT = {"model.max_token_length": 150, "model.clip_skip": 1, "training.max_train_steps": 2}


def test_a_run_with_and_without_a_cache(make_config: Callable[..., Config], tiny_sd: Path, tmp_path: Path) -> None:
    def trained(name: str, settings: dict[str, Any]) -> dict[str, torch.Tensor]:
        run_training(make_config(tiny_sd, {**settings, "output_dir": str(tmp_path / name)}))
        return load_file(tmp_path / name / LORA_FILE)

    cache = {"data.cache_dir": str(tmp_path / "cache")}
    cached, online = trained("cached", TEXT | cache), trained("online", TEXT)
    for name, value in online.items():
        torch.testing.assert_close(cached[name], value, rtol=1e-4, atol=1e-6)
    assert any(
        not torch.equal(value, online[name]) for name, value in trained("plain", {**TEXT, "model.clip_skip": 0}).items()
    )
    with pytest.raises(DataError, match="how prompts are encoded differ"):
        build(make_config(tiny_sd, TEXT | cache | {"model.clip_skip": 0}), Accelerator(cpu=True))
    described = describe_run(build(make_config(tiny_sd, TEXT | {"model.scheduler": ZERO}), Accelerator(cpu=True)))
    assert "prompts  max_token_length 150, clip_skip 1" in described
    assert "timestep_spacing trailing; SNR at the last timestep 0\n" in described
    assert "TextSpec(max_token_length=150, clip_skip=1)" in (tmp_path / "online" / "README.md").read_text()


def test_weights_in_the_data_are_refused_before_a_model_is_loaded(
    make_config: Callable[..., Config], tmp_path: Path, pair_folder: Path
) -> None:
    import shutil

    data = Path(shutil.copytree(pair_folder, tmp_path / "data"))
    caption = next(file for file in sorted(data.rglob("*.txt")))
    caption.write_text("a (red:1.3) circle")
    config = make_config(tmp_path / "no model", {"model.prompt_weights": "refuse", "data.path": str(data)})
    with pytest.raises(ModelError, match=r"the weight \(red:1.3\), and prompt_weights is refuse"):
        build(config, Accelerator(cpu=True))
