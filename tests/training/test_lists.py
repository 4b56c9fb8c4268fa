"""Training on ranked lists of several lengths: resumed, in two processes, cached; and what is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from diffalign.config.schema import Config
from diffalign.config.strict_yaml import ConfigError
from diffalign.data.row import DataError
from diffalign.training.build import build
from diffalign.training.inspect.dry_run import describe_run, dry_run
from diffalign.training.open_data import open_table, prepared
from diffalign.training.processes import make_accelerator
from diffalign.training.run import run_training
from diffalign.training.trainer import load_pairs
from tests.data.helpers import png
from tests.invariants.pool import Pool
from tests.training.test_buckets import heldout_losses, whole_parts_two
from tests.training.test_run import metrics, weights

MakeConfig = Callable[..., Config]


@pytest.fixture(scope="module")
def lists_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """lists.jsonl: six lists of three images and six of two; threes.jsonl: the first six."""
    folder = tmp_path_factory.mktemp("lists")
    rows = []
    for i in range(12):
        names = [f"{i}-{k}.png" for k in range(3 if i < 6 else 2)]
        for k, name in enumerate(names):
            (folder / name).write_bytes(png(10 * i + k, (32, 32)))
        rows.append(json.dumps({"prompt": f"a red circle {i % 4}", "images": names, "ranking": [*range(len(names))]}))
    (folder / "lists.jsonl").write_text("\n".join(rows))
    (folder / "threes.jsonl").write_text("\n".join(rows[:6]))
    return folder


@pytest.fixture
def listed(make_config: MakeConfig, tiny_sdxl: Path, lists_folder: Path) -> MakeConfig:
    def make(overrides: dict[str, object], file: str = "lists.jsonl") -> Config:
        objective = {"name": "listwise_dpo", "beta": 500.0}
        shared = {"data.path": str(lists_folder / file), "objective": objective, "training.learning_rate": 1e-4}
        return make_config(tiny_sdxl, {**shared, **overrides})

    return make


def test_a_resumed_run_and_two_processes_are_the_run(listed: MakeConfig, tmp_path: Path, pool: Pool) -> None:
    overrides = {"training.max_train_steps": 2, "validation.pairs": 0.5, "validation.pairs_every": 1}
    found = whole_parts_two(listed, tmp_path, pool, overrides, groups=2, stop=1)
    heldout = [heldout_losses(found[name][1]) for name in ("whole", "parts", "two")]
    assert heldout[0] == heldout[1]
    assert heldout[0][0] == pytest.approx((math.log(6) + math.log(2)) / 2, abs=0.02)  # as many of three as of two
    assert heldout[2] == pytest.approx(heldout[0], rel=1e-4)


def test_full_weights_from_the_images_and_from_cached_reference_errors(listed: MakeConfig, tmp_path: Path) -> None:
    found = []
    for cached in (False, True):
        overrides: dict[str, object] = {"output_dir": str(tmp_path / f"{cached}"), "data.draws_per_pair": 1}
        if cached:
            overrides |= {"data.cache_dir": str(tmp_path / "cache"), "data.cache_reference_errors": True}
        overrides |= {"tuning.method": "full", "training.adam_epsilon": 1e-4}
        config = listed(overrides, "threes.jsonl")
        run_training(config)
        found.append((weights(config.output_dir), metrics(config.output_dir)))
    assert found[0][1][0]["loss"] == pytest.approx(math.log(6), rel=1e-6)
    assert found[0][1][-1]["loss"] < found[0][1][0]["loss"]
    for name, tensor in found[0][0].items():
        torch.testing.assert_close(found[1][0][name], tensor, rtol=0, atol=2e-6)


def test_the_plan_says_which_lists_there_are(listed: MakeConfig) -> None:
    config = listed({})
    run = build(config, make_accelerator(config))
    assert "ranked lists: 6 of 2, 6 of 3 images" in describe_run(run)
    images = len(next(run.source.batches(0)).latents)
    assert {2: "1 pair, latents", 3: "1 list of 3 images, latents"}[images] in (said := dry_run(run))
    assert "activations of lists of 3 images, the longest" in said


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"data.aspect_buckets": {"table": "kohya", "step": 8}}, "data.aspect_buckets: lists.jsonl has ranked lists"),
        ({"data.scores": "a.parquet"}, "data.scores: lists.jsonl has ranked lists"),
        ({"data.pairs_of_ranking": "adjacent"}, "the objective compares whole lists"),
        (
            {"training.reference_batch_size": 4, "training.gradient_accumulation_steps": 2},
            r"training.reference_batch_size: needs lists of one length.*\(6 of 2, 6 of 3 images\)",
        ),
        ({"objective": {"name": "kto"}}, None),  # of the same file, pairs
    ],
)
def test_settings_of_pairs_are_refused(overrides: dict[str, object], message: str | None, listed: MakeConfig) -> None:
    if message is None:
        assert len(open_table(listed(overrides))) == 6 * 3 + 6
        return
    with pytest.raises((DataError, ConfigError), match=message):
        open_table(listed(overrides))


def test_a_table_of_the_other_kind_is_refused(listed: MakeConfig, lists_folder: Path) -> None:
    pairs, lists = (load_pairs(lists_folder / "lists.jsonl", lists=which) for which in (False, True))
    with pytest.raises(DataError, match=r"its pairs were opened.*open it with lists=True"):
        prepared(listed({}), pairs.table)
    with pytest.raises(DataError, match=r"was opened as ranked lists, and this run's objective compares pairs"):
        prepared(listed({"objective": {"name": "dpo"}}), lists.table)
    assert prepared(listed({}), lists.table) is lists.table
