"""A new term of a pair takes three edits (CONTRIBUTING): its field, its column, its use. Here a temperature is one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from diffalign.data import weights
from diffalign.data.cache.latents import CacheSpec, open_cache
from diffalign.data.loader.offline_pairs import OfflinePairs
from diffalign.data.loader.online import Online
from diffalign.data.loader.spec import LoaderSpec
from diffalign.data.precompute.latents import encode_cache
from diffalign.data.row import BAD_TERM
from diffalign.data.spec import DataSpec
from diffalign.data.table.identity import data_identity
from diffalign.data.table.open import open_pairs
from diffalign.data.table.pairs import PairTable
from diffalign.engine.measure import ask_reference, measure_and_backward
from diffalign.engine.schedule import NoiseSchedule
from diffalign.objectives import DiffusionDPO
from diffalign.objectives.base import ask, dpo_logit
from diffalign.types import Evidence, Score, Terms, axes
from tests.data.helpers import FakeEncoder, pick_rows, write_jsonl, write_parquet
from tests.toy import SDXL_CONFIG


@dataclass(frozen=True)
class WithTemperature(Terms):
    """The first edit: a field of `types.Terms` with its axes."""

    temperature: Tensor | None = field(default=None, metadata=axes("pair"))


TEMPERATURE = weights.Number(neutral=1.0, least=0.125)  # the second: an entry of `data.weights.TERMS`


@dataclass(frozen=True)
class Tempered(DiffusionDPO):
    """The third: an objective's equation that has the term in it."""

    name: ClassVar[str] = "tempered"

    def score(self, evidence: Evidence) -> Score:
        logit, metrics = dpo_logit(evidence, self.beta)
        assert isinstance(evidence.terms, WithTemperature)
        assert evidence.terms.temperature is not None
        return Score(-logsigmoid(logit / evidence.terms.temperature), logit, metrics)


@pytest.fixture(autouse=True)
def edits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "Terms", WithTemperature)
    monkeypatch.setitem(weights.TERMS, "temperature", TEMPERATURE)


def parquet(folder: Path) -> Path:
    rows = [row | {"temperature": 0.5 + i} for i, row in enumerate(pick_rows(7))]
    return write_parquet(folder / "pairs.parquet", [*rows[:6], rows[6] | {"temperature": None}])


def jsonl(folder: Path) -> Path:
    return write_jsonl(folder / "pairs.jsonl", 7, temperature=2.5)


def cached(table: PairTable, folder: Path, **options: Any) -> OfflinePairs:
    done = encode_cache(table, FakeEncoder(), folder / "cache", CacheSpec(16))
    return OfflinePairs(
        table, open_cache(folder / "cache", done.key), LoaderSpec(3, 2, **options), time_ids=FakeEncoder().time_ids
    )


def online(table: PairTable, folder: Path, **options: Any) -> OfflinePairs:
    return OfflinePairs(table, Online(FakeEncoder(), 16), LoaderSpec(3, 2, **options))


@pytest.mark.parametrize(("source", "workers"), [(online, 0), (cached, 0), (cached, 1)])
@pytest.mark.parametrize("make", [parquet, jsonl])
def test_from_the_column_to_the_score(
    make: Callable[[Path], Path], source: Callable[..., OfflinePairs], workers: int, tmp_path: Path
) -> None:
    table = open_pairs(make(tmp_path))
    assert table.terms == ("temperature",)
    expected = {name: table.number("temperature", i) for i, name in enumerate(table.ids)}
    if make is parquet:
        assert list(expected.values()) == [0.5, 1.5, 2.5, 3.5, 4.5, 5.5, 1.0]  # an empty cell is neutral
    models: Any = SimpleNamespace(
        schedule=NoiseSchedule.from_config(SDXL_CONFIG),
        policy=lambda xt, t, cond: (0.5 * xt).requires_grad_(),
        reference=lambda xt, t, cond: 0.4 * xt,
    )
    batches = [b.to("cpu") for b in islice(source(table, tmp_path, num_workers=workers).batches(), 4)]
    probes = ask_reference(models, [ask(Tempered(beta=20.0), batch, models) for batch in batches])
    for batch, probe in zip(batches, probes, strict=True):
        evidence, score = measure_and_backward(models, probe, Tempered(beta=20.0).score)
        wanted = torch.tensor([expected[name] for name in batch.ids])
        assert isinstance(evidence.terms, WithTemperature)
        assert torch.equal(evidence.terms.temperature, wanted)  # type: ignore[arg-type]
        assert score.logit is not None
        torch.testing.assert_close(score.loss, -logsigmoid(score.logit / wanted))
        assert not torch.allclose(score.loss, -logsigmoid(score.logit))
        second = batch.select(pair=slice(1, 2)).terms
        assert isinstance(second, WithTemperature)
        assert torch.equal(second.temperature, wanted[1:])  # type: ignore[arg-type]


def test_it_is_checked_left_out_and_part_of_the_identity_as_the_others_are(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "pairs.jsonl", 3, temperature=2.5)
    before = data_identity(open_pairs(file))
    file.write_text(file.read_text().replace("2.5", "0.1", 1))
    table = open_pairs(file)
    (problem,) = table.problems
    assert (len(table), problem.kind) == (2, BAD_TERM)
    assert "temperature is 0.1; write a finite number, 0.125 or more, or leave it empty" in problem.reason
    file.write_text(file.read_text().replace("0.1", "3.5", 1))
    assert data_identity(open_pairs(file))["terms"] != before["terms"]
    assert open_pairs(file, DataSpec(columns={"temperature": ""})).terms == ()
