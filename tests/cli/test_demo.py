"""The demo, shortened: tuning gains true reward on held-out prompts, shuffled labels do not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

import diffalign.cli.demo as demo
from diffalign.cli.demo import DemoError, run_demo


@pytest.mark.slow
def test_the_demo_shows_a_gain_and_its_control_none(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "SEEDS", "0-3")
    run_demo(tmp_path, steps=60)
    result = json.loads((tmp_path / "evaluation/result.json").read_text())
    assert (len(result["prompts"]), len(result["seeds"])) == (24, 4)
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


def test_a_command_that_fails_ends_the_demo(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(DemoError, match="status 1"):
        run_demo(tmp_path, steps=0)
    assert "max_train_steps" in capfd.readouterr().err
