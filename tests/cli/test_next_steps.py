"""The commands that are printed at the end of another one are right for what it did."""

from __future__ import annotations

import pytest

from diffalign.cli.training.train import sampled_as
from diffalign.config.schema import Config, load_config, packaged_config


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
