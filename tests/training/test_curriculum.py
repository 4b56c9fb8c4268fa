"""A curriculum from easy to hard pairs: the visits, in batches of any size; resumed runs; and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from diffalign.config.schema import Config, ConfigError
from diffalign.data.loader.offline_pairs import OfflinePairs
from diffalign.data.loader.online import Online
from diffalign.data.loader.spec import LoaderSpec
from diffalign.data.row import DataError
from diffalign.data.sampler import Processes
from diffalign.data.table.open import open_pairs
from diffalign.training.build import build
from diffalign.training.build_source import curriculum
from diffalign.training.inspect.dry_run import describe_run
from diffalign.training.processes import make_accelerator
from diffalign.training.run import run_training
from tests.data.helpers import FakeEncoder, pick_rows, write_parquet

Make = Callable[..., Config]


@pytest.fixture
def scored(pair_folder: Path, tmp_path: Path) -> str:
    """Scores of the twelve pairs: the chosen image of pair i is better by i + 1."""
    ids = open_pairs(pair_folder).ids
    lines = [{"scorer": "x"}, *({"id": name, "score_0": i + 1.0, "score_1": 0.0} for i, name in enumerate(ids))]
    (tmp_path / "scores.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(tmp_path / "scores.jsonl")


def test_batches_of_any_size_on_any_number_of_processes_and_resumed(tmp_path: Path) -> None:
    """48 positions in three stages: two pairs, then four, then six."""
    scores = [{"score_0": i % 2 * (i + 1.0), "score_1": (1 - i % 2) * (i + 1.0)} for i in range(6)]
    rows = [row | two for row, two in zip(pick_rows(6), scores, strict=True)]
    table = open_pairs(write_parquet(tmp_path / "pairs.parquet", rows))

    def ids(batch: int, process: int = 0, processes: int = 1, first: int = 0) -> list[tuple[str, ...]]:
        order = curriculum(table, seed=3, chunks=3, positions=48)
        source = OfflinePairs(
            table,
            Online(FakeEncoder(), 16),
            LoaderSpec(3, batch, processes=Processes(process, processes), order=order),
        )
        batches = islice(source.batches(first), 48 // batch // processes - first)
        return [tuple(zip(b.ids, b.keys.tolist(), strict=True)) for b in batches]

    ones = [pair for batch in ids(1) for pair in batch]
    assert [pair for batch in ids(8) for pair in batch] == ones
    shared = [ids(4, process, 2) for process in range(2)]
    assert [pair for step in zip(*shared, strict=True) for batch in step for pair in batch] == ones
    assert ids(8, first=2) == ids(8)[2:]
    names = [name for name, _ in ones]
    assert [len(set(names[k : k + 16])) for k in (0, 16, 32)] == [2, 4, 6]
    assert set(names[:16]) == {"a5:b5", "a4:b4"}  # the largest gaps
    assert len(set(ones)) == 48  # each visit draws its own noise


def test_a_resumed_run_is_the_uninterrupted_one(
    make_config: Make, tiny_sd: Path, scored: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shared = {"data.scores": scored, "data.curriculum": {"chunks": 3, "steps": 4}, "training.checkpointing_steps": 2}
    whole = make_config(tiny_sd, shared)
    run_training(whole)
    assert "easiest first: 3 chunks in 4 steps" in capsys.readouterr().out
    other = {**shared, "output_dir": str(tmp_path / "parts")}
    run_training(make_config(tiny_sd, {**other, "training.max_train_steps": 2}))
    run_training(make_config(tiny_sd, {**other, "training.resume_from_checkpoint": "latest"}))
    folders = (tmp_path / "out", tmp_path / "parts")
    one, two = (load_file(folder / "pytorch_lora_weights.safetensors") for folder in folders)
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_curriculum_as_long_as_the_run_cannot_be_lengthened(make_config: Make, tiny_sd: Path, scored: str) -> None:
    shared = {"data.scores": scored, "data.curriculum": {"chunks": 3}, "training.checkpointing_steps": 2}
    run_training(make_config(tiny_sd, {**shared, "training.max_train_steps": 2}))
    with pytest.raises(ConfigError, match=r"training.max_train_steps: was 2, is 4"):
        run_training(make_config(tiny_sd, {**shared, "training.resume_from_checkpoint": "latest"}))


def test_it_needs_scores_that_tell_pairs_apart(make_config: Make, tiny_sd: Path, scored: str) -> None:
    config = make_config(tiny_sd, {"data.curriculum": {"chunks": 3}})
    with pytest.raises(DataError, match=r"data.curriculum sorts pairs .* these data have none; .*data score"):
        build(config, make_accelerator(config))
    config = make_config(tiny_sd, {"data.scores": scored, "data.curriculum": {"chunks": 13}})
    with pytest.raises(ValueError, match=r"data.curriculum.chunks = 13 for 12 pairs"):
        build(config, make_accelerator(config))
    with pytest.raises(ConfigError, match=r"data.curriculum.*source online_pairs generates its images"):
        make_config(tiny_sd, {"data.curriculum": {"chunks": 3}, "source": {"name": "online_pairs", "scorer": "world"}})
    with pytest.raises(ConfigError, match=r"data.curriculum.chunk: unknown key; did you mean 'chunks'"):
        make_config(tiny_sd, {"data.curriculum": {"chunk": 3}})


def test_axes_reach_a_run(make_config: Make, tiny_sd: Path, scored: str) -> None:
    """Two files of which one is worth nothing beside the other: labels follow the heavy one where they are to."""
    lines = [json.loads(line) for line in Path(scored).read_text().splitlines()]
    turned = [lines[0], *({**line, "score_0": line["score_1"], "score_1": line["score_0"]} for line in lines[1:])]
    against = Path(scored).with_name("against.jsonl")
    against.write_text("".join(json.dumps(line) + "\n" for line in turned))
    axes = {"for": scored, "against": {"file": str(against), "weight": 3.0}}
    config = make_config(tiny_sd, {"data.scores": axes, "data.relabel": True})
    run = build(config, make_accelerator(config))
    plain = make_config(tiny_sd, {"data.invert_preference": True})
    expected = build(plain, make_accelerator(plain))
    assert torch.equal(next(run.source.batches(0)).latents, next(expected.source.batches(0)).latents)
    assert run.table.scores(1) == (6.0, 2.0)
    assert "cache" not in describe_run(run).split("files")[0]
    changed = make_config(tiny_sd, {"data.scores": axes, "data.aggregate": "all_agree"})
    with pytest.raises(DataError, match="axes disagree"):
        build(changed, make_accelerator(changed))
    for given, message in (
        ({"data.scores": [scored], "data.aggregate": "min"}, "data.aggregate: min needs several axes"),
        ({"data.scores": {"x": {"fil": "b"}}}, "data.scores: {'fil': 'b'} is not an axis"),
        ({"data.scores": {"x": {"file": "b", "weight": -1}}}, "is not an axis; write {file: PATH"),
        ({"data.scores": []}, "data.scores: is empty"),
        ({"data.scores": 3}, "data.scores: 3 is not a file"),
    ):
        with pytest.raises(ConfigError) as error:
            make_config(tiny_sd, given)
        assert message in str(error.value)
