"""Runs of the arena and their images: computed once, repeated for other settings; a diverged run is a result."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from diffalign.arena import jobs as module
from diffalign.arena.entries import Protocol, config_of, entries
from diffalign.arena.jobs import Job, run_jobs
from diffalign.training.trainable import TrainingError
from diffalign.world import pairs_path
from diffalign.world.captions import prompts

TINY = Protocol(steps=2, seeds=(0,), forwards_seeds=(), second_seeds=(), pictures=2, split="heldout")
PROMPTS = tuple(prompts("heldout")[:2])


class Here:
    """Stands for the pool: the jobs are done in this process, one after the other."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def submit(self, fn: Any, job: Job) -> Any:
        from concurrent.futures import Future

        future: Future[None] = Future()
        try:
            future.set_result(fn(job))
        except Exception as error:
            future.set_exception(error)
        return future

    def shutdown(self, cancel_futures: bool) -> None: ...


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ProcessPoolExecutor", Here)


def job(folder: Path, name: str = "dpo", tuned: dict[str, Any] | None = None, seed: int = 0) -> Job:
    (entry,) = entries((name,))
    config = config_of(entry, TINY, "world", seed, pairs_path(), {"training.train_batch_size": 2, **(tuned or {})})
    return Job(folder, config, PROMPTS, (0, 1))


def test_a_finished_job_is_not_done_again_and_another_config_is(here: None, tmp_path: Path) -> None:
    (first,) = run_jobs([job(tmp_path)], 1, "")
    assert (first.steps, first.forwards) == (2, 2 * 2 * 4)
    assert [(p.prompt, p.seed) for p in first.pictures] == [(prompt, seed) for prompt in PROMPTS for seed in (0, 1)]
    assert first.seconds > 0
    assert first.failed is None
    written = (tmp_path / "metrics.jsonl").stat().st_mtime_ns
    (again,) = run_jobs([job(tmp_path)], 1, "")
    assert (tmp_path / "metrics.jsonl").stat().st_mtime_ns == written
    assert again == first
    (other,) = run_jobs([job(tmp_path, seed=1)], 1, "")
    assert other.metrics != first.metrics
    assert other.config["seed"] == 1


def test_a_setting_that_is_new_does_not_undo_what_is_done(here: None, tmp_path: Path) -> None:
    run_jobs([job(tmp_path)], 1, "")
    file = tmp_path / "job.json"
    record = json.loads(file.read_text())
    del record["job"]["config"]["training"]["ema_decay"], record["job"]["config"]["validation"]
    file.write_text(json.dumps(record))
    written = (tmp_path / "metrics.jsonl").stat().st_mtime_ns
    run_jobs([job(tmp_path)], 1, "")
    assert (tmp_path / "metrics.jsonl").stat().st_mtime_ns == written
    record["job"]["config"]["training"]["was_once_a_key"] = 1
    file.write_text(json.dumps(record))
    run_jobs([job(tmp_path)], 1, "")
    assert (tmp_path / "metrics.jsonl").stat().st_mtime_ns > written


def test_a_diverged_run_is_a_result(here: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def diverges(config: Any) -> None:
        raise TrainingError("the loss is nan at step 1")

    monkeypatch.setattr(module, "run_training", diverges)
    (done,) = run_jobs([job(tmp_path)], 1, "")
    assert done.failed == "the loss is nan at step 1"
    assert done.pictures == []
    assert (done.steps, done.forwards) == (0, 0)


def test_any_other_error_ends_the_arena_and_says_where(
    here: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks(config: Any) -> None:
        raise KeyError("gone")

    monkeypatch.setattr(module, "run_training", breaks)
    with pytest.raises(RuntimeError, match=r"log\.txt"):
        run_jobs([job(tmp_path)], 1, "")
    assert "KeyError" in (tmp_path / "log.txt").read_text()
    assert not (tmp_path / "job.json").exists()


def test_jobs_in_processes_of_their_own_give_the_same(here: None, tmp_path: Path) -> None:
    (inside,) = run_jobs([job(tmp_path / "a")], 1, "")
    with pytest.MonkeyPatch.context() as patch:
        from concurrent.futures import ProcessPoolExecutor

        patch.setattr(module, "ProcessPoolExecutor", ProcessPoolExecutor)
        (outside,) = run_jobs([job(tmp_path / "b")], 1, "")
    assert outside.metrics == inside.metrics
    assert [p.open().tobytes() for p in outside.pictures] == [p.open().tobytes() for p in inside.pictures]


def test_kept_trajectories_lie_in_the_runs_folder_and_are_counted(here: None, tmp_path: Path) -> None:
    settings = {"objective.steps": 2, "objective.substeps": 1, "data.max_pairs": 4}
    (done,) = run_jobs([job(tmp_path, "inversion_dpo", settings)], 1, "")
    # 4 pairs of two images over two steps once, then two steps of 2 pairs at both points, policy and reference
    assert done.forwards == 4 * 2 * 2 + 2 * 2 * 2 * 2 * 2
    assert not (tmp_path / "cache").exists()
    assert json.loads((tmp_path / "job.json").read_text())["job"]["config"]["data"]["cache_dir"] is None


ARENA = """
from pathlib import Path
from diffalign.arena.jobs import run_jobs
from tests.arena.test_jobs import job
if __name__ == "__main__":
    long = {{"training.max_train_steps": 100000}}
    run_jobs([job(Path({folder!r}) / name, tuned=long) for name in "ab"], 1, "test")
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_workers_end_with_their_arena(tmp_path: Path, how: signal.Signals) -> None:
    """Nobody is left to train a run that nobody waits for, and nobody begins the next."""
    script = tmp_path / "arena.py"
    script.write_text(ARENA.format(folder=str(tmp_path / "run")))
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    arena = subprocess.Popen([sys.executable, str(script)], env=env, stderr=subprocess.DEVNULL)
    try:
        _wait_for(lambda: any(tmp_path.glob("run/*/metrics.jsonl")))
        workers = psutil.Process(arena.pid).children(recursive=True)
        arena.send_signal(how)
        arena.wait(timeout=60)
    finally:
        arena.kill()
        arena.wait()
    assert workers
    left = psutil.wait_procs(workers, timeout=30)[1]
    for worker in left:
        worker.kill()
    assert left == []


def _wait_for(condition: Callable[[], bool], seconds: float = 300) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "nothing was ever written"
        time.sleep(0.1)
