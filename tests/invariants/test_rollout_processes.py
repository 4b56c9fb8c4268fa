"""Two processes sample, divide and train on the same sampling steps as one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from diffalign.config.schema import Config
from diffalign.training.run import run_training
from tests.invariants.pool import Pool
from tests.invariants.test_processes import in_two
from tests.sources.test_rollout import overrides
from tests.training.test_run import metrics, weights


@pytest.mark.parametrize("judge", ["images", "latents"])
def test_two_processes_give_the_pairs_and_the_update_of_one(
    judge: str,
    make_config: Callable[..., Config],
    tiny_sd: Path,
    judge_folder: Callable[[str], Path],
    tmp_path: Path,
    pool: Pool,
) -> None:
    runs = {}
    lpo = {"scorer": f"latent-judge={judge_folder('sd')}"} if judge == "latents" else {}
    jobs = [("train", 2), ("train", 1)] if lpo else [("train", 2), ("train_sharded", 2), ("train", 1)]
    for job, processes in jobs:
        config = make_config(
            tiny_sd,
            {
                **overrides(tmp_path, num_candidates=2, prompts_per_round=3, **lpo),
                "tuning.method": "full" if lpo else "lora",
                "output_dir": str(tmp_path / f"{job}-{processes}"),
                "training.max_train_steps": 4,  # into the second round, with a pair carried
                "training.train_batch_size": 4 // processes,
                "training.adam_epsilon": 1e-4,  # Adam's first step is lr·sign(g): without this, rounding decides signs
            },
        )
        if processes == 1:
            run_training(config)
        else:
            in_two(pool, config, tmp_path / "run.yaml", job)
        runs[job, processes] = (weights(config.output_dir), metrics(config.output_dir))
    one = runs.pop(("train", 1))
    for two in runs.values():
        for name in one[0]:
            torch.testing.assert_close(two[0][name], one[0][name], rtol=0, atol=2e-6)
        assert one[1][2]["rollout/carried"] == two[1][2]["rollout/carried"] == 1
        for a, b in zip(one[1], two[1], strict=True):
            assert a.keys() == b.keys()
            for key in a:
                torch.testing.assert_close(a[key], b[key], rtol=1e-3, atol=1e-4)
