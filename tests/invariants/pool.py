"""Two processes that train one config after another, because importing torch and diffusers dominates a launch.

They are joined anew for every job, as `torchrun` joins those it starts: the same variables, a port of the job's own.
`test_processes.py` has a launcher, which is `torchrun`'s.
"""

from __future__ import annotations

import contextlib
import gc
import io
import json
import logging
import os
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PATIENCE = 300.0  # seconds for a job
AFTER_THE_FIRST = 120.0  # and for one process after the other has failed: it may wait for it forever


@dataclass(frozen=True)
class Answer:
    """How a job ended in one process."""

    code: int
    stderr: str


class Pool:
    """`run(job, *arguments)` calls a function of JOBS in each process; processes that hang or die are replaced."""

    def __init__(self, folder: Path, processes: int = 2) -> None:
        self.folder, self.processes, self.jobs = folder, processes, 0
        self._started: list[subprocess.Popen[str]] = []

    def run(self, job: str, *arguments: object) -> list[Answer]:
        """How it ended in each process. Raises RuntimeError when one gave no answer."""
        self._start()
        self.jobs += 1
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        answers = [self.folder / f"{self.jobs}-{rank}.json" for rank in range(self.processes)]
        for process, answer in zip(self._started, answers, strict=True):
            asked = {"job": job, "arguments": [str(x) for x in arguments], "port": port, "answer": str(answer)}
            assert process.stdin is not None
            process.stdin.write(json.dumps(asked) + "\n")
            process.stdin.flush()
        end = time.monotonic() + PATIENCE
        while not all(answer.exists() for answer in answers):
            there = [Answer(**json.loads(answer.read_text())) for answer in answers if answer.exists()]
            if any(answer.code for answer in there):
                end = min(end, time.monotonic() + AFTER_THE_FIRST)
            if time.monotonic() > end or any(process.poll() is not None for process in self._started):
                self.close()
                raise RuntimeError(f"{job} {arguments}: no answer from every process; answers: {there}")
            time.sleep(0.02)
        return [Answer(**json.loads(answer.read_text())) for answer in answers]

    def close(self) -> None:
        """Ends the processes."""
        for process in self._started:
            process.kill()
            process.wait()
        self._started = []

    def _start(self) -> None:
        for rank in range(len(self._started), self.processes):
            ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": self.processes, "LOCAL_WORLD_SIZE": self.processes}
            environment = {**os.environ, **{k: str(v) for k, v in ranks.items()}, "MASTER_ADDR": "127.0.0.1"}
            environment |= {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
            command = [sys.executable, "-m", "tests.invariants.pool"]
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
            )
            self._started.append(process)


def train(where: str) -> None:
    """`diffalign train` on a config file."""
    from diffalign.cli.main import main

    main(["train", where])


def train_sharded(where: str) -> None:
    """`diffalign train` under FSDP2, as `accelerate launch` asks for it."""
    asked = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    os.environ.update(asked)
    try:
        train(where)
    finally:
        for name in asked:
            del os.environ[name]


def steps(where: str, folder: str) -> None:
    """A config's steps, and the weights of this process into `folder`."""
    import torch

    from diffalign.config.schema import load_config
    from diffalign.training.build import build
    from diffalign.training.metrics import Meter
    from diffalign.training.processes import make_accelerator
    from diffalign.training.step import optimizer_step

    config = load_config(where)
    accelerator = make_accelerator(config)
    run = build(config, accelerator)
    torch.manual_seed(accelerator.process_index)  # the global generators differ and have no part in it
    batches = run.source.batches()
    for _ in range(config.training.max_train_steps):
        optimizer_step(run, batches, Meter())
    weights = {str(i): p.detach().cpu() for i, p in enumerate(run.parameters)}
    torch.save(weights, f"{folder}/{accelerator.process_index}-{accelerator.num_processes}.pt")
    accelerator.end_training()


JOBS: dict[str, Callable[..., None]] = {"train": train, "train_sharded": train_sharded, "steps": steps}


def answer(asked: dict[str, object]) -> Answer:
    """Does a job, whatever becomes of it, and leaves the group of processes."""
    import torch
    from accelerate.state import AcceleratorState, GradientState

    os.environ["MASTER_PORT"] = str(asked["port"])
    code, said = 0, io.StringIO()
    with contextlib.redirect_stderr(said):
        try:
            JOBS[str(asked["job"])](*asked["arguments"])  # type: ignore[misc]
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        except BaseException:
            code = 1
            traceback.print_exc()
    logging.getLogger().handlers.clear()  # of this job's stderr
    gc.collect()  # an error's frames hold the wrapped network, which must go before its group of processes does
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    return Answer(code, said.getvalue())


if __name__ == "__main__":
    for line in sys.stdin:
        job = json.loads(line)
        found = answer(job)
        partial = Path(f"{job['answer']}.partial")
        partial.write_text(json.dumps({"code": found.code, "stderr": found.stderr}))
        partial.rename(job["answer"])
