"""The base and the data of a run are examined before anything is encoded or written."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from diffalign.models.adapters.lora import add_lora, save_lora
from diffalign.models.loading.base import load_base
from diffalign.models.loading.family import ModelError
from diffalign.training import build
from diffalign.training.run import run_training

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 3438167536\n"


def lora(folder: Path, base: Path) -> Path:
    loaded = load_base(str(base), vae_and_text=False)
    add_lora(loaded.unet, 4)
    return save_lora(loaded.unet, folder, loaded.family)


@pytest.mark.parametrize("place", ["resume_lora", "reference"])
def test_adapters_that_cannot_be_used(make_config, tiny_sd: Path, tmp_path: Path, place: str) -> None:
    file = lora(tmp_path / "lora", tiny_sd)
    state = load_file(file)
    first = min(state)
    kinds = {
        rf"{first.removeprefix('unet.')}.*an earlier checkpoint": {**state, first: state[first] * math.nan},
        "no layer for nowhere.lora_A.weight": {**state, "unet.nowhere.lora_A.weight": state[first].clone()},
        "Git-LFS pointer.*git lfs pull": LFS,
    }
    config = make_config(tiny_sd, {f"tuning.{place}": str(file), "data.cache_dir": str(tmp_path / "cache")})
    for message, content in kinds.items():
        file.write_bytes(content) if isinstance(content, bytes) else save_file(content, file)
        with pytest.raises(ModelError, match=message) as error:
            run_training(config)
        assert str(file) in str(error.value)
        assert not (tmp_path / "cache").exists()


def test_a_rank_above_the_layers_own(make_config, tiny_sd: Path, tmp_path: Path) -> None:
    overrides = {"tuning.rank": 4096, "data.cache_dir": str(tmp_path / "cache")}
    with pytest.raises(ModelError, match=r"rank = 4096 is above the largest rank .* set tuning.rank to at most \d+"):
        run_training(make_config(tiny_sd, overrides))
    assert not (tmp_path / "cache").exists()


def test_a_full_reference_of_another_model(make_config, tiny_sd: Path, tiny_sdxl: Path, tmp_path: Path) -> None:
    overrides = {
        "tuning.method": "full",
        "tuning.reference": str(tiny_sdxl / "unet"),
        "data.cache_dir": str(tmp_path / "cache"),
    }
    config = make_config(tiny_sd, overrides)
    with pytest.raises(ModelError, match=r"unet does not fit this base.*Use the base it was tuned from"):
        run_training(config)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_missing_reference_is_refused_before_the_base_is_loaded(
    make_config, tiny_sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    monkeypatch.setattr(build, "load_base", lambda spec: pytest.fail("the base was loaded"))
    config = make_config(tiny_sd, {"tuning.method": method, "tuning.reference": str(tmp_path / "nowhere")})
    with pytest.raises(ModelError, match=r"no tuned weights at .*nowhere.*no such path"):
        run_training(config)
