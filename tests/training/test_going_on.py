"""Resumed runs: their schedule, time spent on rounds and recordings, and checkpoints of older versions."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from diffalign.config.schema import Config, load_config
from diffalign.training.optim.optimizers import make_lr_scheduler, resume_schedule
from diffalign.training.run import run_training
from tests.data.helpers import pick_rows, write_parquet
from tests.sources.test_selfplay import SOURCE as SELFPLAY
from tests.training.test_run import metrics, same, weights

MakeConfig = Callable[..., Config]
OLD = Path(__file__).parents[1] / "golden/old_formats/checkpoint-2"
SAMPLED = {
    "scorer": "tests.sources.judges:Brightness",
    "prompts_per_round": 4,
    "sampling_steps": 2,
}


def scheduled(kind: str, steps: int, warmup: int = 1) -> Any:
    """The optimiser and schedule of a run of so many steps."""
    training = SimpleNamespace(lr_scheduler=kind, lr_warmup_steps=warmup, max_train_steps=steps)
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))], lr=1e-3)
    scheduler = make_lr_scheduler(optimizer, training)
    return SimpleNamespace(config=SimpleNamespace(training=training), optimizer=optimizer, lr_scheduler=scheduler)


def rates(run: Any, steps: int) -> list[float]:
    """The learning rates of the next steps."""
    seen = []
    for _ in range(steps):
        seen.append(run.optimizer.param_groups[0]["lr"])
        run.optimizer.step()
        run.lr_scheduler.step()
    return seen


@pytest.mark.parametrize("longer", [8, 4])
@pytest.mark.parametrize("kind", ["linear", "cosine", "polynomial", "constant_with_warmup"])
def test_a_lengthened_run_goes_on_along_the_schedule_of_its_new_length(
    kind: str, longer: int, caplog: pytest.LogCaptureFixture
) -> None:
    short = scheduled(kind, 4)
    first = rates(short, 4 if longer > 4 else 2)
    state = {
        "optimizer": short.optimizer.state_dict(),
        "lr_scheduler": short.lr_scheduler.state_dict(),
        "step": len(first),
        "max_train_steps": 4,
    }
    resumed, whole = scheduled(kind, longer), scheduled(kind, longer)
    with caplog.at_level(logging.WARNING):
        resume_schedule(resumed, state)
    expected = rates(whole, longer)
    assert rates(resumed, longer - len(first)) == expected[len(first) :]
    assert min(expected[1:]) > 0  # the first is the warm-up's
    if longer > 4 and kind != "constant_with_warmup":
        step_five = f"step 5 has the learning rate {expected[4]:.4g}"
        assert f"max_train_steps is 8 and was 4: lr_scheduler {kind} goes on as in a run of 8" in caplog.text
        assert step_five in caplog.text
    else:
        assert caplog.text == ""


def test_a_checkpoint_of_before_there_were_manifests_is_resumed(
    tiny_sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Written by the code of commit 9320911, at the end of a cosine over two steps; then lengthened to four."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sd").symlink_to(tiny_sd)
    write_parquet(tmp_path / "pairs.parquet", pick_rows(4))
    shutil.copytree(OLD, tmp_path / "out/checkpoint-2")
    changes = ["training.resume_from_checkpoint=latest", "training.max_train_steps=4"]
    run_training(load_config(OLD / "config.yaml", changes))
    assert "has no hashes" in caplog.text
    assert [line["step"] for line in metrics("out")] == [3, 4]
    assert metrics("out")[0]["lr"] == pytest.approx(5e-4)  # half-way of a cosine over four steps
    assert [line["unet_forwards"] for line in metrics("out")] == [24, 32]


@pytest.mark.parametrize(
    ("source", "objective"),
    [
        ({"name": "rollout", **SAMPLED, "sampling_steps": 4, "plain_steps": 2, "threshold": 0.0}, {"name": "spo"}),
        ({"name": "best_of", **SAMPLED, "samples_per_prompt": 2}, {"name": "sft"}),
        ({**SELFPLAY, "images_per_iteration": 4}, {"name": "seppo", "beta": 500.0}),
    ],
    ids=["spo", "raft", "selfplay"],
)
def test_a_run_killed_after_it_made_a_round_ends_where_its_twin_ends(
    source: dict[str, Any], objective: dict[str, Any], make_config: MakeConfig, tiny_sd: Path, tmp_path: Path
) -> None:
    """The last checkpoint is from before a round whose files are there: counted as if it were made again."""
    (tmp_path / "prompts.txt").write_text("a red circle\na blue square\na photo\nthe large square")
    own = {} if source["name"] == "selfplay" else {"data.path": str(tmp_path / "prompts.txt")}
    settings = {
        **own,
        "source": {**source, "keep_rounds": True},
        "objective": objective,
        "training.checkpointing_steps": 2,
        "training.max_train_steps": 9,
    }
    whole = make_config(tiny_sd, {**settings, "output_dir": str(tmp_path / "all")})
    run_training(make_config(tiny_sd, {**settings, "output_dir": str(tmp_path / "all"), "training.max_train_steps": 6}))
    budget = int(metrics(whole.output_dir)[5]["unet_forwards"]) + 1
    limited = {**settings, "training.max_unet_forwards": budget}
    twin = make_config(tiny_sd, {**limited, "output_dir": str(tmp_path / "twin")})
    run_training(twin)
    killed = shutil.copytree(tmp_path / "twin", tmp_path / "killed")
    for step in (4, 6, 8):  # as if killed after round 2, or 1, was made and before the next checkpoint
        shutil.rmtree(killed / f"checkpoint-{step}", ignore_errors=True)
    replaced = killed / "source/history/.policy-00001.replaced"  # as if killed before it was removed
    if source["name"] == "selfplay":
        assert (killed / "source/history/policy-00001").is_dir()
        replaced.mkdir()
    run_training(
        make_config(tiny_sd, {**limited, "output_dir": str(killed), "training.resume_from_checkpoint": "latest"})
    )
    assert not replaced.exists()
    assert metrics(killed) == metrics(twin.output_dir)
    assert same(weights(killed), weights(twin.output_dir))


def test_a_run_killed_after_it_recorded_counts_the_recording(
    make_config: MakeConfig, tiny_sd: Path, tmp_path: Path
) -> None:
    """Two draws of four pairs, two sides: 16 forwards before the first step, made, found, or left by a killed run."""
    shared = {
        "data.cache_dir": str(tmp_path / "cache"),
        "data.cache_reference_errors": True,
        "data.draws_per_pair": 2,
        "data.max_pairs": 4,
        "training.max_unet_forwards": 16 + 3 * 4 + 1,
    }
    for name in ("made", "found"):
        run_training(make_config(tiny_sd, {**shared, "output_dir": str(tmp_path / name)}))
        assert [line["unet_forwards"] for line in metrics(tmp_path / name)] == [20, 24, 28]
