"""Training on pairs of several shapes: a batch is its pairs; resumed, or in two processes, a run is the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffalign.config.schema import Config
from diffalign.config.strict_yaml import ConfigError
from diffalign.engine.measure import measure
from diffalign.objectives.base import ask
from diffalign.training.build import Run, build
from diffalign.training.processes import make_accelerator
from diffalign.training.run import run_training
from diffalign.types import PairBatch
from tests.invariants.pool import Pool
from tests.invariants.test_processes import in_two
from tests.training.test_run import metrics, weights

MakeConfig = Callable[..., Config]
SHAPES = ((96, 48), (40, 80), (64, 64))
ACCUMULATION: dict[str, object] = {"training.gradient_accumulation_steps": 2}
KOHYA = {"table": "kohya", "step": 8}


@pytest.fixture(scope="module")
def shapes_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve pairs of three shapes."""
    folder, rng = tmp_path_factory.mktemp("shapes"), np.random.default_rng(0)
    for side in ("chosen", "rejected"):
        (folder / side).mkdir()
        for i in range(12):
            pixels = rng.integers(0, 255, (*SHAPES[i % 3][::-1], 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / side / f"{i:03d}.png")
    for i in range(12):
        (folder / f"{i:03d}.txt").write_text(f"a red circle {i % 4}")
    return folder


@pytest.fixture
def bucketed(make_config: MakeConfig, tiny_sdxl: Path, shapes_folder: Path) -> MakeConfig:
    def make(overrides: dict[str, object]) -> Config:
        shared = {"data.path": str(shapes_folder), "data.aspect_buckets": KOHYA, "training.learning_rate": 1e-4}
        return make_config(tiny_sdxl, {**shared, **overrides})

    return make


def loss(run: Run, batch: PairBatch) -> torch.Tensor:
    return run.objective.score(measure(run.networks, ask(run.objective, batch, run.networks))).loss.mean()


def test_a_batch_is_its_pairs_each_alone_at_its_own_size(bucketed: MakeConfig, tmp_path: Path) -> None:
    """Loss and gradient of micro-batches of each shape against pairs read one by one, in float32."""
    config = bucketed({"training.train_batch_size": 3, "tuning.method": "full"})
    run = build(config, make_accelerator(config))
    with torch.no_grad():
        for p in run.parameters:  # away from the reference, where a loss is log 2 whatever the pair
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())), alpha=1e-3)
    seen = set()
    for batch in islice(run.source.batches(0), 8):
        if (shape := batch.latents.shape[3:]) in seen:
            continue
        seen.add(shape)
        parts = []
        for i in range(3):
            index = run.table.ids.index(batch.ids[i])
            alone = run.source.assemble(run.source.visits.pair(index, 0))  # type: ignore[attr-defined]
            parts.append(replace(alone, keys=batch.keys[i : i + 1]))
            assert torch.equal(alone.cond.time_ids, batch.cond.time_ids[:, i : i + 1])  # type: ignore[index, arg-type]
        together = loss(run, batch)
        whole = torch.autograd.grad(together, run.parameters)
        singles = torch.stack([loss(run, part) for part in parts]).mean()
        # a margin is a difference of errors times beta / 2 = 250: one float32 ulp of an error near 1 is 3e-5 there
        torch.testing.assert_close(together, singles, rtol=0, atol=6e-5)
        for one, other in zip(whole, torch.autograd.grad(singles, run.parameters), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4 * float(other.abs().max()) + 1e-7)
    assert len(seen) == 3


def whole_parts_two(
    make: MakeConfig, folder: Path, pool: Pool, overrides: dict[str, object], groups: int, stop: int
) -> dict[str, tuple[dict[str, torch.Tensor], list[dict[str, float]]]]:
    """Weights and metrics of a whole run, of one that resumes at `stop`, and of one in two processes, which are equal.

    groups: micro-batches of a step, over the processes.
    """
    found = {}
    for name, processes in (("whole", 1), ("parts", 1), ("two", 2)):
        own = {"output_dir": str(folder / name), "training.gradient_accumulation_steps": groups // processes}
        settings = {"training.adam_epsilon": 1e-4, "training.checkpointing_steps": stop, **overrides, **own}
        if name == "parts":
            run_training(make({**settings, "training.max_train_steps": stop}))
            settings["training.resume_from_checkpoint"] = "latest"
        config = make(settings)
        if processes == 2:
            in_two(pool, config, folder / "run.yaml")
        else:
            run_training(config)
        found[name] = weights(config.output_dir), metrics(config.output_dir)
    for name, tensor in found["whole"][0].items():
        assert torch.equal(tensor, found["parts"][0][name])
        torch.testing.assert_close(found["two"][0][name], tensor, rtol=0, atol=2e-6)
    return found


def heldout_losses(lines: list[dict[str, float]]) -> list[float]:
    return [row["heldout/loss"] for row in lines if "heldout/loss" in row]


def test_a_resumed_run_and_two_processes_are_the_run(bucketed: MakeConfig, tmp_path: Path, pool: Pool) -> None:
    overrides = {"training.train_batch_size": 2, "validation.pairs": 0.5, "validation.pairs_every": 2}
    found = whole_parts_two(bucketed, tmp_path, pool, overrides, groups=4, stop=2)
    assert heldout_losses(found["whole"][1]) == heldout_losses(found["parts"][1])


def test_a_resumed_run_has_the_same_micro_batches(bucketed: MakeConfig) -> None:
    shared = {"training.max_train_steps": 1, "training.checkpointing_steps": 1}
    run_training(bucketed({**shared, "training.train_batch_size": 4}))
    other = {"training.train_batch_size": 2, "training.gradient_accumulation_steps": 2}
    with pytest.raises(ConfigError, match=r"training\.train_batch_size: was 4, is 2"):
        run_training(bucketed({**shared, **other, "training.resume_from_checkpoint": "latest"}))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("training.reference_batch_size", 4, "several micro-batches into one forward"),
        ("data.verify", "none", "needs the sizes of the images"),
        ("data.curriculum", {"chunks": 2}, "each decide which pairs make a micro-batch"),
        ("source", {"name": "selfplay"}, "data.aspect_buckets: source selfplay generates its images"),
    ],
)
def test_what_cannot_be_together_is_refused(key: str, value: object, message: str, bucketed: MakeConfig) -> None:
    more: dict[str, dict[str, object]] = {"data.curriculum": {"data.scores": "a"}}
    more["training.reference_batch_size"] = ACCUMULATION
    with pytest.raises(ConfigError, match=message):
        bucketed({key: value, **more.get(key, {})})
