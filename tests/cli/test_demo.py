"""The demo, shortened: tuning gains true reward on held-out prompts, shuffled labels do not."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import diffalign.cli.demo as demo
from diffalign.cli.commands import make_parser
from diffalign.cli.demo import DemoError, run_demo
from diffalign.config.schema import load_config
from diffalign.rewards import load_scorer
from diffalign.world.emoji import base_path, pairs_path
from diffalign.world.emoji.captions import prompts
from diffalign.world.emoji.controls import write_control


@pytest.mark.slow
def test_the_demo_shows_a_gain_and_its_control_none(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(demo.SEEDS, "small", "0-1")
    run_demo(tmp_path, world="small", steps=40)
    result = json.loads((tmp_path / "evaluation/result.json").read_text())
    assert (len(result["prompts"]), len(result["seeds"])) == (24, 2)
    models = {model["name"]: model for model in result["models"]}
    dpo, control = models["dpo"], models["shuffled"]
    assert dpo["scores"]["world"]["gain"]["value"] >= 0.05
    assert dpo["scores"]["world"]["gain"]["low"] > 0
    assert dpo["faithfulness"]["gain"]["value"] >= -0.03
    assert dpo["diversity"]["value"] >= 0.85
    assert abs(control["scores"]["world"]["gain"]["value"]) <= 0.03
    printed = capfd.readouterr().out
    assert f"{dpo['scores']['world']['gain']['value']:+.3f}" in printed  # what is printed is what was measured
    assert "win/tie/loss" in printed
    assert "accelerate launch" in printed
    assert Image.open(tmp_path / "evaluation/grid.png").width > 400


def test_another_world_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DemoError, match="world is 'sdxl'; it must be one of 'emoji', 'small'"):
        run_demo(tmp_path / "demo", world="sdxl")
    assert not (tmp_path / "demo").exists()


def test_a_command_that_fails_ends_the_demo(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = demo._start

    def start(arguments: list[str], **options: Any) -> subprocess.Popen[bytes]:
        """The training itself; in place of the rest something that ends well, or waits to be stopped."""
        if options.get("output"):
            return subprocess.Popen(["sleep", "600"], start_new_session=True)
        return real(arguments, **options) if "train" in arguments else subprocess.Popen(["true"])

    monkeypatch.setattr(demo, "_start", start)
    with pytest.raises(DemoError, match="status 1"):
        run_demo(tmp_path, world="small", steps=0)
    assert "max_train_steps" in capfd.readouterr().err


def test_the_commands_of_the_emoji_world_are_right(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Written and parsed, not run: two trainings and 432 images take minutes."""
    started: list[list[str]] = []

    def start(arguments: list[str], **_: object) -> subprocess.Popen[bytes]:
        started.append(arguments)
        return subprocess.Popen(["true"])

    monkeypatch.setattr(demo, "_start", start)
    run_demo(tmp_path)
    control, *trainings, evaluation = started
    assert write_control(control[2], pairs_path()).is_file()
    assert control[0] == write_control.__module__
    for training, pairs in zip(trainings, (control[2], str(pairs_path())), strict=True):
        config = load_config(training[2], training[3:])
        assert config.data.path == pairs
        assert config.model.pretrained_model_name_or_path == str(base_path())
    arguments = make_parser(evaluation[1]).parse_args(evaluation[1:])
    assert {scorer: load_scorer(scorer).name for scorer in arguments.scorer} == {
        n: n for n in ("emoji-glossy", "emoji")
    }
    assert Path(arguments.prompts).read_text().splitlines() == prompts("heldout")
