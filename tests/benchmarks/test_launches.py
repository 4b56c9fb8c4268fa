"""The benchmark that launches packaged configs, on the smallest model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.launches import FAMILY, LEFT_OUT, ROOT, main


@pytest.mark.slow
def test_a_config_is_launched_and_a_failure_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--device", "cpu", "--model", "tiny", "--steps", "1", "--work", str(tmp_path)]
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "--only", "dpo_lora", "--out", str(tmp_path / "good")])
    assert ended.value.code == 0
    found = json.loads((tmp_path / "good.json").read_text())["runs"]["dpo_lora"]
    assert (found["ok"], found["steps"], found["unet_forwards"]) == (True, 1, 2 * 4 * 4)
    assert "| dpo_lora | dpo | ended | 1 | 0.6931 | yes |" in (tmp_path / "good.md").read_text()
    with pytest.raises(SystemExit) as ended:  # 20 px are no multiple of the VAE's factor and the UNet's
        main([*arguments, "--only", "mapo_lora", "--resolution", "20", "--out", str(tmp_path / "bad")])
    assert ended.value.code == 1
    found = json.loads((tmp_path / "bad.json").read_text())["runs"]["mapo_lora"]
    assert not found["ok"]
    assert "resolution" in found["said"]
    assert "| mapo_lora | mapo | failed |" in capsys.readouterr().out


def test_what_is_left_out_and_what_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("step_aware", "dpo_ful"):
        with pytest.raises(SystemExit):
            main(["--only", name])
        assert "dpo_full" in capsys.readouterr().err
    for family in set(FAMILY.values()):
        assert {*LEFT_OUT, "dpo_full"} <= {file.stem for file in (ROOT / "training_configs" / family).glob("*.yaml")}
