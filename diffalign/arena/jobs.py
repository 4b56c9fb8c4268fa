"""Training runs and their images, several at a time, each in one thread of a process of its own.

FOLDER/config.yaml …        the run, as `diffalign train` leaves it
FOLDER/log.txt              what it printed
FOLDER/pictures/            its images, as `diffalign generate` leaves them
FOLDER/job.json             written last: the config it was made with, seconds, forwards; or why it failed

A finished job is not done again; one with another config is done anew.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import shutil
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch

from diffalign.config.schema import parse_config
from diffalign.config.strict_yaml import ConfigError
from diffalign.evaluation.generate import generate
from diffalign.evaluation.manifest import GeneratedImage
from diffalign.evaluation.sampling import Sampling
from diffalign.io.progress import Progress
from diffalign.training.run import run_training
from diffalign.training.trainable import TrainingError
from diffalign.world import base_path

DONE = "job.json"
STEPS, GUIDANCE = 20, 5.0  # of the images


@dataclass(frozen=True)
class Job:
    """One training run and its images; without a config the images of the base."""

    folder: Path
    config: dict[str, Any] | None
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]  # of the images of each prompt


@dataclass(frozen=True)
class FinishedJob:
    """The result of a job."""

    config: dict[str, Any]  # empty for the base
    pictures: list[GeneratedImage]
    metrics: list[dict[str, float]]  # every line of metrics.jsonl
    seconds: float  # CPU seconds of the training
    commit: str | None  # git commit that it was trained at
    failed: str | None  # why there are no images

    @property
    def steps(self) -> int:
        """Optimiser steps taken."""
        return int(self.metrics[-1]["step"]) if self.metrics else 0

    @property
    def forwards(self) -> int:
        """Images through the UNet in training."""
        return int(self.metrics[-1]["unet_forwards"]) if self.metrics else 0


def run_jobs(jobs: Sequence[Job], workers: int, desc: str) -> list[FinishedJob]:
    """Does what is not done yet, `workers` jobs at a time, and returns all in order; a bar shows the jobs."""
    waiting = [job for job in jobs if not _finished(job)]
    bar = Progress(total=len(jobs), initial=len(jobs) - len(waiting), desc=desc, unit=" runs")
    if waiting:
        os.environ["OMP_NUM_THREADS"] = "1"  # networks this small gain nothing from more
        spawn = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(min(workers, len(waiting)), mp_context=spawn, initializer=_begin)
        try:
            for future in as_completed({pool.submit(_do, job) for job in waiting}):
                future.result()
                bar.update()
        except KeyboardInterrupt:
            for worker in multiprocessing.active_children():
                worker.kill()  # a signal that a run catches would end this run, and the worker begin the next
            raise
        finally:
            pool.shutdown(cancel_futures=True)
    bar.close()
    return [_read(job) for job in jobs]


def _begin() -> None:
    """Sets up a worker: one thread, and an end when its arena is killed."""
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _finished(job: Job) -> bool:
    """Whether this very job is done: the same config, prompts and seeds.

    Settings that came to configs since then have their defaults in a run that did not know them.
    """
    file, wanted = job.folder / DONE, _plain(job)
    if not file.is_file():
        return False
    found = json.loads(file.read_text())["job"]
    if (found["prompts"], found["seeds"]) != (wanted["prompts"], wanted["seeds"]):
        return False
    if found["config"] is None or job.config is None:
        return found["config"] is job.config
    try:
        return _resolved(found["config"]) == _resolved(job.config)
    except ConfigError:  # it has a setting that is gone
        return False


def _resolved(config: dict[str, Any]) -> dict[str, Any]:
    return parse_config(placed(config, Path("anywhere"))).resolved()


def _do(job: Job) -> None:
    """Trains and generates; a diverged run is a result, any other error ends the arena."""
    if job.config is not None and job.folder.exists():
        shutil.rmtree(job.folder)
    job.folder.mkdir(parents=True, exist_ok=True)
    begun, failed = time.process_time(), None
    with (job.folder / "log.txt").open("w") as log, redirect_stdout(log), redirect_stderr(log), _logging_to(log):
        try:
            if job.config is not None:
                run_training(parse_config(placed(job.config, job.folder), where=str(job.folder)))
            seconds = time.process_time() - begun
            _generate(job)
        except TrainingError as error:
            seconds, failed = time.process_time() - begun, str(error)
        except Exception as error:
            traceback.print_exc(file=log)
            raise RuntimeError(f"{job.folder}: {error} (more in its log.txt)") from None
    for rest in ("cache", "source", "logs"):
        shutil.rmtree(job.folder / rest, ignore_errors=True)
    partial = job.folder / "job.partial"
    partial.write_text(json.dumps({"job": _plain(job), "seconds": seconds, "failed": failed}, indent=2) + "\n")
    partial.replace(job.folder / DONE)


@contextmanager
def _logging_to(log: TextIO) -> Iterator[None]:
    """Sends the log of the block to this file."""
    handler, root = logging.StreamHandler(log), logging.getLogger()
    before = root.level
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    try:
        yield
    finally:
        root.removeHandler(handler)
        root.setLevel(before)


def placed(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The config with the folders of this run."""
    data = dict(config["data"])
    if data["cache_trajectories"]:
        data["cache_dir"] = str(folder / "cache")
    return {**config, "data": data, "output_dir": str(folder), "overwrite_output_dir": True}


def _generate(job: Job) -> list[GeneratedImage]:
    """The job's images, generated where they are missing."""
    return generate(
        str(base_path()),
        job.prompts,
        job.seeds,
        out_dir=job.folder / "pictures",
        tuned=None if job.config is None else str(job.folder),
        sampling=Sampling(STEPS, GUIDANCE, batch_size=96, device="cpu"),
    )


def _read(job: Job) -> FinishedJob:
    record = json.loads((job.folder / DONE).read_text())
    metrics, facts = job.folder / "metrics.jsonl", job.folder / "run.json"
    return FinishedJob(
        config=job.config or {},
        pictures=[] if record["failed"] else _generate(job),
        metrics=[json.loads(line) for line in metrics.read_text().splitlines()] if metrics.is_file() else [],
        seconds=record["seconds"],
        commit=json.loads(facts.read_text())["git_commit"] if facts.is_file() else None,
        failed=record["failed"],
    )


def _plain(job: Job) -> dict[str, Any]:
    """What a job's result depends on, as JSON gives it back."""
    return json.loads(json.dumps({"config": job.config, "prompts": job.prompts, "seeds": job.seeds}))
