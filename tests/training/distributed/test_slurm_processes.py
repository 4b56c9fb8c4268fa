"""The sbatch script under a SLURM of two shell scripts: its warning reaches every process, one checkpoint, a requeue.

It is the one launch with signals over several processes: script, srun, accelerate's launcher, two processes.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from diffalign.config.schema import Config, save_config

ROOT = Path(__file__).parents[3]
STUBS = {
    "srun": 'exec "$@"',  # forwards signals to its tasks, as its own process does here
    "scontrol": 'if [ "$1" = show ]; then echo localhost; else echo "$@" >> "$STUB_LOG"; fi',
    "accelerate": f'exec {sys.executable} -m accelerate.commands.accelerate_cli "$@"',
}
SLURM = {"SLURM_NNODES": "1", "SLURM_GPUS_ON_NODE": "2", "SLURM_NODEID": "0", "SLURM_JOB_ID": "7"}


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_slurms_warning_ends_all_processes_after_one_step_and_one_checkpoint(
    make_config: Callable[..., Config], tiny_sd: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    save_config(make_config(tiny_sd, {"training.max_train_steps": 100_000}), tmp_path / "my run.yaml")
    for name, line in STUBS.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{line}\n")
        (tmp_path / name).chmod(0o755)
    environment = {**os.environ, **SLURM, "SLURM_JOB_NODELIST": "localhost", "MAIN_PORT": "0", "OMP_NUM_THREADS": "1"}
    environment |= {"PATH": f"{tmp_path}:{os.environ['PATH']}", "STUB_LOG": str(tmp_path / "log")}
    script = [shutil.which("bash"), "training_configs/accelerate/slurm.sbatch", str(tmp_path / "my run.yaml"), "seed=3"]
    with subprocess.Popen(
        script, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as job:
        try:
            end = time.monotonic() + 200
            while not (out / "metrics.jsonl").exists():
                assert job.poll() is None, job.stderr.read()
                assert time.monotonic() < end
                time.sleep(0.1)
            os.kill(job.pid, signal.SIGUSR1)
            _, said = job.communicate(timeout=200)
        finally:
            job.kill()
    assert job.returncode != 0
    assert (tmp_path / "log").read_text() == "requeue 7\n"
    (checkpoint,) = out.glob("checkpoint-*")
    step = checkpoint.name.removeprefix("checkpoint-")
    assert said.count(f"stopped by SIGUSR1 after step {step} of 100000; {checkpoint} is written") == 1
    assert "SIGUSR1: this step is finished and a checkpoint written" in said
    again = said.partition("To continue: ")[2].partition("\n")[0]
    assert "accelerate_cli launch --config_file training_configs/accelerate/ddp.yaml --num_machines 1 " in again
    assert again.endswith(f"train '{tmp_path}/my run.yaml' seed=3 training.resume_from_checkpoint=latest")
