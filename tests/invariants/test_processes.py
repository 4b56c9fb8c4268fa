"""Two processes (gloo), with DDP and FSDP2, give the update of one: cached, online, self-play; once by a launcher."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from diffalign.config.schema import Config, PreferenceModelConfig, save_config
from diffalign.training.run import run_training
from tests.invariants.pool import ROOT, Pool
from tests.training.test_run import metrics, weights


def in_two(pool: Pool, config: Config | PreferenceModelConfig, where: Path, job: str = "train") -> None:
    """Trains a config to its end in two processes."""
    save_config(config, where)
    for ended in pool.run(job, where):
        assert ended.code == 0, ended.stderr[-3000:]


def started(config: Config, processes: int, where: Path) -> subprocess.CompletedProcess[str]:
    """How training ended under accelerate's launcher (which is torchrun's) with a config of ours, well or not."""
    save_config(config, where)
    launch = ["accelerate.commands.launch", "--config_file", "training_configs/accelerate/fsdp2.yaml"]
    options = [f"--num_processes={processes}", "--main_process_port=0"]
    return subprocess.run(
        [sys.executable, "-m", *launch, *options, "-m", "diffalign", "train", str(where)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},  # just what the docs say: no ACCELERATE_USE_CPU
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


OBJECTIVES = {
    "dpo": {"name": "dpo", "beta": 500.0},
    "dspo": {"name": "dspo", "beta": 0.5},  # its loss depends on the distance of policy and reference
    "inpo": {"name": "inpo", "beta": 500.0, "steps": 4},
    # guided, and its points backpropagated one at a time: all but the last without synchronising
    "inversion_dpo": {
        "name": "inversion_dpo",
        "beta": 500.0,
        "steps": 3,
        "substeps": 2,
        "guidance": 2.0,
        "safeguard_mu": 0.5,
    },
    "diffusion_nft": {"name": "diffusion_nft", "beta": 0.5},
    "seppo": {"name": "seppo", "beta": 500.0, "flip": "none"},  # a flip would turn rounding at D = 0 into a sign
}
# two iterations of one step; the second has the first one's policy as reference, written by the main process
SELFPLAY = {
    "name": "selfplay",
    "reference": "latest",
    "updates_per_iteration": 1,
    "images_per_iteration": 5,
    "sampling_steps": 2,
}
GROUPS = {
    "name": "graded_groups",
    "scorer": "tests.sources.judges:Brightness",
    "prompts_per_round": 2,
    "samples_per_prompt": 4,
    "sampling_steps": 2,
}


@pytest.mark.parametrize(
    ("method", "objective"),
    [
        ("lora", "dspo"),
        ("full", "dpo"),
        ("lora", "inpo"),
        ("full", "inversion_dpo"),
        ("lora", "seppo"),
        ("full", "diffusion_nft"),
    ],
)
def test_two_processes_give_the_update_of_one(
    method: str, objective: str, make_config: Callable[..., Config], tiny_sdxl: Path, tmp_path: Path, pool: Pool
) -> None:
    shared = {
        "tuning.method": method,
        "objective": OBJECTIVES[objective],
        "training.max_train_steps": 2,
        "training.learning_rate": 1e-4,
        "training.adam_epsilon": 1e-4,  # Adam's first step is lr·sign(g): without this, rounding decides signs
        "data.proportion_empty_prompts": 0.2,
    }
    if objective == "seppo":
        shared["source"] = SELFPLAY
    if objective == "diffusion_nft":  # each process samples one group, and grades need the scores of both
        prompts = tmp_path / "prompts.txt"
        prompts.write_text("a red circle\na blue square\na photo\n")
        shared |= {"source": GROUPS, "training.ref_model_sync_steps": 1, "data.path": str(prompts)}
    if objective == "dspo":  # and with a reference that follows the policy
        shared |= {"training.ref_model_sync_steps": 1, "training.ref_model_mixup_alpha": 0.5}
    if (method, objective) == ("full", "dpo"):  # and once through the cache, whose shards the processes share out
        shared["data.cache_dir"] = str(tmp_path / "cache")
    runs = {}
    for job, processes in (("train", 2), ("train_sharded", 2), ("train", 1)):
        # references that follow the policy are refused under FSDP2; inpo and seppo are in `benchmarks.equal_runs`
        if job == "train_sharded" and objective in ("dspo", "inpo", "seppo", "diffusion_nft"):
            continue
        config = make_config(
            tiny_sdxl,
            {
                **shared,
                "output_dir": str(tmp_path / f"{job}-{processes}"),
                "training.train_batch_size": 4 // processes,
                "training.gradient_accumulation_steps": 2,
            },
        )
        if processes == 1:
            run_training(config)
        elif (method, objective, job) == ("full", "dpo", "train_sharded"):
            done = started(config, processes, tmp_path / "run.yaml")
            assert done.returncode == 0, done.stderr[-3000:]
        else:
            in_two(pool, config, tmp_path / "run.yaml", job)
        runs[job, processes] = (weights(config.output_dir), metrics(config.output_dir))
        margins = Path(config.output_dir) / "margins.jsonl"
        lines = margins.read_text().splitlines() if objective != "diffusion_nft" else []
        assert not lines or [sum(json.loads(line)["counts"]) for line in lines] == [8, 8]  # every pair of a step, once
    one = runs.pop(("train", 1))
    for two in runs.values():
        for name in one[0]:
            torch.testing.assert_close(two[0][name], one[0][name], rtol=0, atol=2e-6)
        for a, b in zip(one[1], two[1], strict=True):
            assert a.keys() == b.keys()
            for name in a:
                # rewards are differences of errors times beta / 2 = 250: an ulp of an error near 1 is 3e-5 there
                assert b[name] == pytest.approx(a[name], rel=2e-3, abs=6e-5), name
