"""Cached reference errors: the losses of a run that evaluates the reference, without evaluating it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import diffalign.training.run as module
from diffalign.config.schema import Config, ConfigError
from diffalign.data.loader.spec import LoaderSpec
from diffalign.data.precompute.recording import Work
from diffalign.data.precompute.reference_errors import record_reference
from diffalign.data.row import DataError
from diffalign.data.sampler import Processes
from diffalign.data.spec import DataSpec
from diffalign.models.policy.networks import Networks
from diffalign.training.run import run_training
from tests.training.test_run import metrics, same, weights
from tests.training.test_speed import close

MakeConfig = Callable[..., Config]


def losses(folder: Path) -> list[dict[str, float]]:
    """What was logged, but for the count of forwards."""
    return [{k: v for k, v in line.items() if k != "unet_forwards"} for line in metrics(folder)]


@pytest.fixture
def forwards(monkeypatch: pytest.MonkeyPatch) -> list[Networks]:
    """The networks of the runs built from now on; they count what the reference was asked."""
    built: list[Networks] = []
    build = module.build

    def watched(*args: Any) -> Any:
        run = build(*args)
        built.append(run.networks)
        return run

    monkeypatch.setattr(module, "build", watched)
    return built


@pytest.mark.parametrize(("family", "method"), [("tiny_sd", "full"), ("tiny_sdxl", "lora")])
def test_losses_and_weights_are_those_of_the_same_draws_without_it(
    family: str,
    method: str,
    make_config: MakeConfig,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    forwards: list[Networks],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Four pairs in batches of two, two draws: five epochs, with prompts dropped now and then.

    A pair is asked beside another one than in training, and some processors' kernels round by a row's place in its
    batch: the losses are close. Errors of another draw would be off by tens.
    """
    base = request.getfixturevalue(family)
    shared = {
        "tuning.method": method,
        "training.max_train_steps": 10,
        "training.learning_rate": 1e-5,
        "data.max_pairs": 4,
        "data.draws_per_pair": 2,
        "data.proportion_empty_prompts": 0.4,
    }
    kept = {"data.cache_dir": str(tmp_path / "cache"), "data.cache_reference_errors": True}
    for name, more in {"asked": {"data.cache_dir": kept["data.cache_dir"]}, "kept": kept, "again": kept}.items():
        run_training(make_config(base, {**shared, **more, "output_dir": str(tmp_path / name)}))
    close(losses(tmp_path / "kept"), losses(tmp_path / "asked"))
    assert losses(tmp_path / "again") == losses(tmp_path / "kept")  # the numbers of one file
    assert same(weights(tmp_path / "again"), weights(tmp_path / "kept"))
    planned = re.findall(r"reference: (.+)", capsys.readouterr().out)
    assert planned == 3 * [{"full": "frozen copy", "lora": "the policy with LoRA off"}[method]]
    # ten steps; then two batches for each of two draws; then none at all
    assert [networks.reference_forwards for networks in forwards] == [10, 4, 0]
    assert (forwards[1]._reference is None) == (forwards[0]._reference is not None) is True


def test_draws_come_back_and_only_then(make_config: MakeConfig, tiny_sd: Path, tmp_path: Path) -> None:
    """At a learning rate that moves nothing the loss repeats with the draws; without them it does not."""
    found = {}
    for draws in (2, None):
        config = make_config(
            tiny_sd,
            {
                "output_dir": str(tmp_path / str(draws)),
                "objective": {"name": "mapo", "beta": 0.1},
                "data.max_pairs": 4,
                "data.draws_per_pair": draws,
                "training.train_batch_size": 4,
                "training.learning_rate": 1e-30,
            },
        )
        run_training(config)
        found[draws] = [line["loss"] for line in metrics(config.output_dir)]
    # an epoch is one step here; pairs come in another order every time, so sums round otherwise
    a, b, c, d = found[2]
    assert (c, d) == (pytest.approx(a, rel=1e-5), pytest.approx(b, rel=1e-5))
    assert b != pytest.approx(a, rel=1e-4)
    assert found[None][2] != pytest.approx(found[None][0], rel=1e-4)


def test_what_they_depend_on_is_in_the_key(
    make_config: MakeConfig, tiny_sd: Path, tmp_path: Path, forwards: list[Networks]
) -> None:
    shared = {
        "data.cache_dir": str(tmp_path / "cache"),
        "data.cache_reference_errors": True,
        "data.max_pairs": 4,
        "data.draws_per_pair": 1,
        "training.max_train_steps": 1,
        "overwrite_output_dir": True,
    }
    asked = []
    for change in (
        {},
        {"objective": {"name": "ipo"}},  # asks at the same points
        {"objective": {"name": "kto"}},
        {"data.draws_per_pair": 2},  # the first draw is there
        {"objective": {"name": "dpo", "timesteps": [10, 20]}},
        {"seed": 1},
        {"model.attention": "math"},
        {"training.train_batch_size": 4},
        {"model.prediction_type": "v_prediction"},
    ):
        run_training(make_config(tiny_sd, {**shared, **change}))
        asked.append(forwards[-1].reference_forwards)
    assert asked == [2, 0, 0, 2, 2, 2, 2, 1, 2]


def test_a_folder_of_something_else_is_refused(
    make_config: MakeConfig, tiny_sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(
        tiny_sd,
        {
            "data.cache_dir": str(tmp_path / "cache"),
            "data.cache_reference_errors": True,
            "data.draws_per_pair": 1,
            "training.max_train_steps": 1,
            "overwrite_output_dir": True,
        },
    )
    run_training(config)
    (manifest,) = (tmp_path / "cache/reference_errors").glob("*/manifest.json")
    content = json.loads(manifest.read_text())
    content["key"]["network"] = "another"
    del content["sha256"]  # as if of before there were hashes
    manifest.write_text(json.dumps(content))
    with pytest.raises(DataError, match="contains a recording of something else; delete it"):
        run_training(config)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"data.draws_per_pair": None}, "needs data.draws_per_pair"),
        ({"data.cache_dir": None}, "needs data.cache_dir"),
        ({"objective": {"name": "inpo"}}, "inpo has no reference, or a network computes its points"),
        ({"objective": {"name": "sft"}}, "sft has no reference"),
        (
            {"training.reference_batch_size": 4, "training.gradient_accumulation_steps": 2},
            "does not evaluate a reference",
        ),
    ],
)
def test_what_it_needs_is_said_before_anything_is_read(
    change: dict[str, Any], match: str, make_config: MakeConfig, tmp_path: Path
) -> None:
    settings = {"data.cache_dir": str(tmp_path), "data.cache_reference_errors": True, "data.draws_per_pair": 2}
    with pytest.raises(ConfigError, match=match):
        make_config(tmp_path / "no base is looked at", {**settings, **change})


def test_unreadable_pairs_are_left_out_and_shards_are_shared(tmp_path: Path) -> None:
    from diffalign.data.cache.latents import open_cache
    from diffalign.data.cache.reference_errors import ReferenceErrors
    from diffalign.data.loader.offline_pairs import OfflinePairs
    from diffalign.data.table.open import open_pairs
    from diffalign.data.table.pairs import PairTable  # noqa: F401
    from tests.data.cache.test_latents import encode, needed
    from tests.data.helpers import FakeEncoder, pick_rows, write_parquet

    rows = pick_rows(7)
    rows[2]["jpg_1"] = rows[2]["jpg_1"][:60]
    table = open_pairs(write_parquet(tmp_path / "pairs.parquet", rows), DataSpec(verify="none"))
    encode(table, tmp_path / "cache")
    cache = open_cache(tmp_path / "cache", needed(table))

    def source(content: Any) -> OfflinePairs:
        return OfflinePairs(table, content, LoaderSpec(3, 2, draws=3), time_ids=FakeEncoder().time_ids)

    sizes: list[int] = []

    def errors(batch: Any) -> torch.Tensor:
        sizes.append(batch.pairs)
        return batch.latents.mean((2, 3, 4))

    key = {"network": "a"}
    for process in range(2):
        work = Work(processes=Processes(process, 2))
        folder, per_shard = record_reference(source(cache), key, errors, 3, work, pairs_per_shard=4)
    assert per_shard == 4
    assert len(list(folder.glob("errors-*.safetensors"))) == 3 * 2
    assert set(sizes) == {2}  # the last batch of a shard with three readable pairs is filled up
    made = len(sizes)
    record_reference(source(cache), key, errors, 3, Work(), pairs_per_shard=4)
    assert len(sizes) == made
    batches = source(ReferenceErrors(cache, folder, per_shard)).batches()
    for _ in range(12):  # every pair at all of its draws
        batch = next(batches)
        assert torch.equal(batch.reference, batch.latents.mean((2, 3, 4)))
