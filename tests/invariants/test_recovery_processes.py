"""Two processes go back to a checkpoint together, as often as one does, and end with the same message."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from diffalign.config.schema import Config, save_config
from diffalign.training.run import run_training
from diffalign.training.trainable import TrainingError
from tests.invariants.pool import Pool
from tests.training.callbacks.test_recovery import events
from tests.training.test_run import metrics


def test_two_processes_go_back_as_one_does(
    make_config: Callable[..., Config], tiny_sd: Path, tmp_path: Path, pool: Pool
) -> None:
    """A beta with which pairs saturate at any learning rate: back from step 3 to 1, again, and then a stop."""
    told = {}
    for processes in (2, 1):
        config = make_config(
            tiny_sd,
            {
                "objective": {"name": "dpo", "beta": 1e9},
                "health": {"action": "roll_back", "window": 2, "saturation": 0.5, "max_roll_backs": 2},
                "training.checkpointing_steps": 1,
                "training.train_batch_size": 4 // processes,
                "output_dir": str(tmp_path / str(processes)),
            },
        )
        if processes == 1:
            with pytest.raises(TrainingError, match="stopped at step 3 after 2 roll backs"):
                run_training(config)
        else:
            save_config(config, tmp_path / "run.yaml")
            for ended in pool.run("train", tmp_path / "run.yaml"):
                assert ended.code == 2
                assert "stopped at step 3 after 2 roll backs" in ended.stderr
        told[processes] = [(e["step"], e["rule"], e["action"], e.get("lr_factor")) for e in events(config.output_dir)]
        assert [line["step"] for line in metrics(config.output_dir)] == [1, 2]
        assert metrics(config.output_dir)[1]["lr"] == pytest.approx(1e-3 / 4)
    back = [(1, "saturation", "roll_back", 0.5), (1, "saturation", "roll_back", 0.25), (3, "saturation", "stop", None)]
    assert told[1] == told[2] == back
