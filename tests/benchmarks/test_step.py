"""The benchmark of a step on the smallest model, its table of optimisations, and stepping through a script."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator

from benchmarks.ladder import growing, ladder, rungs
from benchmarks.live import LiveScript
from benchmarks.ours import Ours, make_config
from benchmarks.peer import PeerSettings
from benchmarks.step import Benchmark, main, parser
from benchmarks.timing import Timed, ratio

SCRIPT = """
import argparse
import wandb
from accelerate import Accelerator

def parse_args(arguments):
    parser = argparse.ArgumentParser()
    parser.add_argument("--train_batch_size", type=int)
    return parser.parse_known_args(arguments)[0]

def main(args):
    accelerator = Accelerator()
    for step in range(1000):
        if step == 3:
            raise ValueError("no more pairs")
        accelerator.log({"loss": step * args.train_batch_size}, step=step)
"""


@pytest.mark.slow
def test_the_command_on_the_tiny_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short = ["--warmup", "1", "--steps", "2", "--rounds", "1", "--pairs", "1", "--data-pairs", "4"]
    main(["--device", "cpu", "--model", "tiny", *short, "--work", str(tmp_path), "--out", str(tmp_path / "result")])
    result = json.loads((tmp_path / "result.json").read_text())
    published, tuned, ours, kept = result["rows"]
    assert kept["name"] == "ours, reference errors kept"
    assert 0 < kept["useful_flops"] < ours["useful_flops"]  # its steps ask no reference
    assert kept["before_seconds"] > 0
    assert ours["useful_flops"] == published["useful_flops"] == tuned["useful_flops"] > 1e9
    assert {row["steps"] for row in result["rows"]} == {2}
    assert all(row["floor_ms"] > 0 and row["largest_part"] for row in result["rows"])
    assert result["ratios"]["ours against peer as published"]["median"] > 0
    assert result["ratios"]["ours, reference errors kept against peer as published"]["median"] > 0
    text = (tmp_path / "result.md").read_text()
    assert text.strip() in capsys.readouterr().out
    assert "| ours | 1 |" in text


def test_every_lever_is_a_config(tmp_path: Path) -> None:
    climbed = set()
    for device in ("cpu", "cuda"):
        for tuning in ("lora", "full"):
            for precision in ("no", "bf16"):
                base = {"tuning.method": tuning, "training.mixed_precision": precision, "training.train_batch_size": 3}
                for lever, settings in rungs(device, 3, tuning, precision):
                    make_config(tmp_path, tmp_path / "pairs.parquet", tmp_path, {**base, **settings})
                    climbed.add(lever.name)
    assert {lever.name for lever in ladder(3) if lever.package is None} <= climbed
    assert len({lever.name for lever in ladder(3)}) == len(ladder(3))
    for key, values in growing(64).values():
        for value in values:
            make_config(tmp_path, tmp_path / "pairs.parquet", tmp_path, {key: value})


@pytest.mark.slow
def test_a_cache_that_grows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows say how many pairs; the second opening encodes nothing."""
    short = ["--warmup", "1", "--steps", "2", "--rounds", "1", "--pairs", "1", "--data-pairs", "2"]
    arguments = ["--device", "cpu", "--model", "tiny", *short]
    benchmark = Benchmark(parser().parse_args(arguments), tmp_path)
    opened, built = benchmark.ours, []

    def watched(name: str, settings: dict[str, Any]) -> Ours:
        ours = opened(name, settings)
        built.append({path: path.stat().st_mtime_ns for path in tmp_path.glob("cache-*/*.safetensors")})
        assert len(ours.run.source.table) == 3
        return ours

    monkeypatch.setattr(benchmark, "ours", watched)
    assert benchmark.stored(3).name == "pairs in the cache: 3"
    first, second = built
    assert first
    assert first == second


def test_a_ratio_is_taken_turn_by_turn() -> None:
    """A machine that slows down by three between turns changes nothing."""
    fast, slow = Timed([[1.0, 1.0], [3.0, 3.0]]), Timed([[2.0, 2.0], [6.0, 6.0]])
    assert ratio(slow, fast) == {"median": 2.0, "min": 2.0, "max": 2.0, "rounds": 2}


def test_a_script_is_taken_step_by_step(tmp_path: Path) -> None:
    """Unmodified, with its own errors, and ended where it stands."""
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    settings, log, has_wandb = PeerSettings(train_batch_size=7), Accelerator.log, "wandb" in sys.modules
    live = LiveScript(path, tmp_path, tmp_path / "data" / "pairs.parquet", tmp_path, settings)
    live.step()
    live.step()
    assert [line["loss"] for line in live.logged] == [0, 7]
    live.close()
    failing = LiveScript(path, tmp_path, tmp_path / "data" / "pairs.parquet", tmp_path, settings)
    for _ in range(3):
        failing.step()
    with pytest.raises(ValueError, match="no more pairs"):
        failing.step()
    failing.close()
    assert ("wandb" in sys.modules) == has_wandb  # the script leaves this process as it was
    assert Accelerator.log is log
    with pytest.raises(FileNotFoundError, match="train_diffusion_dpo_sdxl"):
        LiveScript(tmp_path / "none.py", tmp_path, tmp_path, tmp_path, settings)
