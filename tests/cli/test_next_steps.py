"""The commands that are printed at the end of another one are right for what it did."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from diffalign.cli.images.options import given_sampling
from diffalign.cli.main import parse
from diffalign.cli.training.train import sampled_as
from diffalign.config.schema import Config, load_config, packaged_config, save_config


@pytest.mark.parametrize(
    ("name", "overrides", "options"),
    [
        ("world/dpo.yaml", [], []),
        (
            "world/dpo.yaml",
            ["model.pretrained_vae_model_name_or_path=my/vae", "model.prediction_type=v_prediction"],
            ["--vae", "my/vae", "--prediction-type", "v_prediction"],
        ),
        (
            "world/dpo.yaml",
            ["model.max_token_length=225", "model.chunk_layout=webui", "model.clip_skip=1"],
            ["--max-token-length", "225", "--chunk-layout", "webui", "--clip-skip", "1"],
        ),
        ("world/ppd.yaml", ["data.users=u.json"], ["--users", "u.json", "--user"]),
    ],
)
def test_images_are_sampled_as_the_run_was_trained(name: str, overrides: list[str], options: list[str]) -> None:
    config = load_config(packaged_config(name), overrides)
    assert isinstance(config, Config)
    assert sampled_as(config)[: len(options)] == options
    assert len(sampled_as(config)) == len(options) + ("--user" in options)


def test_images_in_another_way_than_the_run_was_trained_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = ["model.max_token_length=28", "model.scheduler.timestep_spacing=trailing"]
    config = load_config(packaged_config("world/dpo.yaml"), settings)
    assert isinstance(config, Config)
    save_config(config, tmp_path / "config.yaml")
    common = ["--prompts", "p", "--out", "o", "--device", "cpu"]
    with caplog.at_level(logging.WARNING):
        given_sampling(parse(["generate", "b", "--tuned", str(tmp_path), *common, *sampled_as(config)]))
        given_sampling(parse(["generate", "b", "--tuned", str(tmp_path / "not there"), *common]))
        assert caplog.messages == []
        given_sampling(
            parse(["evaluate", "b", "--tuned", f"dpo={tmp_path}", "--scorer", "world", "--clip-skip", "1", *common])
        )
    (said,) = caplog.messages
    assert "was trained with another scheduler, clip_skip, max_token_length than these images have" in said
    assert said.endswith("--scheduler-config timestep_spacing=trailing --max-token-length 28")
