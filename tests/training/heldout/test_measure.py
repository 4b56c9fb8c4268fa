"""Held-out pairs in a run: the numbers by another way, the same for any batch and order, and no effect on the run."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from diffalign import Trainer, TrainingArguments, load_pairs
from diffalign.config.schema import Config, ConfigError
from diffalign.data.row import DataError
from diffalign.engine.random import normal, pair_key
from diffalign.training.build import build
from diffalign.training.heldout.estimates import estimates
from diffalign.training.heldout.measure import FixedPoints, PointValues
from diffalign.training.run import run_training
from diffalign.training.trainable import Run
from diffalign.world import base_path, pairs_path
from tests.training.test_run import metrics, same, weights

MakeConfig = Callable[..., Config]
WORLD = {"data.path": str(pairs_path()), "data.resolution": 16, "data.max_pairs": 24, "data.verify": "none"}
FEW = {**WORLD, "validation.pairs": 0.25}
COMPARED = ("accuracy", "margin", "score")  # of objectives that compare the images of a pair


def moved(config: Config) -> Run:
    """A built run whose policy differs from its reference."""
    run = build(config, Accelerator(cpu=True))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in run.parameters:
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    return run


def points_of(run: Run) -> FixedPoints:
    assert run.heldout is not None
    return run.heldout


def test_the_numbers_are_those_of_diffusers_noise_and_the_equation(make_config: MakeConfig) -> None:
    from diffusers import DDPMScheduler

    run = moved(make_config(base_path(), FEW))
    assert "held out  6 pairs, measured every 100 steps at 4 points each\n" in run.describe()
    source = points_of(run).source
    values = [value for value in points_of(run).values(run.objective, run.networks) if value.pair == 2]
    assert [value.t * 4 // 1000 for value in values if value.t is not None] == [0, 1, 2, 3]
    noising = DDPMScheduler.from_config(run.base.scheduler_config)
    batch = source.assemble(source.visits.pair(2, 0))
    for value in values:
        keys = torch.tensor([pair_key(0, source.table.ids[2], value.point)])
        noise, t = normal(keys, "noise", batch.latents.shape[2:]), torch.tensor([value.t])
        d = []
        for side in (0, 1):
            xt = noising.add_noise(batch.latents[side], noise, t)
            cond = batch.cond.select(side=slice(side, side + 1)).flatten()
            with torch.no_grad():
                errors = [
                    ((ask(xt, t, cond) - noise) ** 2).mean() for ask in (run.networks.policy, run.networks.reference)
                ]
            d.append(float(errors[0] - errors[1]))
        logit = -250.0 * (d[0] - d[1])  # -(beta / 2) (D_chosen - D_rejected)
        assert value.margin == pytest.approx(logit, rel=1e-3, abs=1e-4)
        assert value.loss == pytest.approx(math.log1p(math.exp(-logit)), rel=1e-4)


def test_batch_and_order_change_no_number(make_config: MakeConfig) -> None:
    run = moved(make_config(base_path(), FEW))
    points, before = points_of(run), run.networks.image_forwards
    torch.manual_seed(5)
    first = points.values(run.objective, run.networks)
    assert torch.rand(()) == torch.rand((), generator=torch.Generator().manual_seed(5))  # no draw of the global one
    assert run.networks.image_forwards == before
    again = points.values(run.objective, run.networks)  # from memory, with the reference's errors remembered
    assert again == first
    table = points.source.table
    backwards = type(points.source)(
        table.part(range(len(table))[::-1]), points.source.content, points.source.spec, time_ids=None
    )
    other = FixedPoints(backwards, points.points, batch_size=1).values(run.objective, run.networks)
    by_id = {(table.ids[::-1][v.pair], v.point): v for v in other}
    for value in first:
        found = by_id[table.ids[value.pair], value.point]
        assert (found.t, found.loss) == (
            value.t,
            pytest.approx(value.loss, rel=1e-3),
        )  # β times differences of float32 errors


def test_a_path_changes_no_weight_and_a_share_only_the_pairs(make_config: MakeConfig, tmp_path: Any) -> None:
    training = {"training.max_train_steps": 3, "training.ema_decay": 0.5}
    plain = make_config(base_path(), {**WORLD, **training, "output_dir": str(tmp_path / "plain")})
    run_training(plain)
    half = str(tmp_path / "half.parquet")
    import pyarrow.parquet as pq

    pq.write_table(pq.read_table(pairs_path()).slice(100, 10), half)
    path = {**WORLD, **training, "validation.pairs": half, "validation.pairs_every": 1}
    run_training(make_config(base_path(), {**path, "output_dir": str(tmp_path / "path")}))
    assert same(weights(tmp_path / "plain"), weights(tmp_path / "path"))
    lines = metrics(tmp_path / "path")
    assert [{k: v for k, v in line.items() if not k.startswith("heldout")} for line in lines] == metrics(
        tmp_path / "plain"
    )
    assert [line["heldout/accuracy/low"] < line["heldout/accuracy"] for line in lines] == [True] * 3
    with pytest.raises(DataError, match=r"validation\.pairs: 24 of the 1024 pairs are trained on as well"):
        run_training(make_config(base_path(), {**path, "validation.pairs": str(pairs_path()), "output_dir": "x"}))


@pytest.mark.parametrize(
    ("objective", "names"),
    [
        ({"name": "sft"}, {"loss"}),
        ({"name": "mapo"}, {"loss", *COMPARED}),
        ({"name": "kto"}, {"loss", *COMPARED}),
        ({"name": "inpo", "steps": 2}, {"loss", *COMPARED}),
        ({"name": "diffusion_dro"}, {"loss", *COMPARED}),
        ({"name": "inversion_dpo", "steps": 2, "substeps": 1, "guidance": 2.0}, {"loss", *COMPARED}),
    ],
    ids=lambda value: value["name"] if isinstance(value, dict) else "",
)
def test_objectives_are_measured_by_their_own_evidence(
    objective: dict[str, Any], names: set[str], make_config: MakeConfig
) -> None:
    run = moved(make_config(base_path(), {**FEW, "objective": objective}))
    values = points_of(run).values(run.objective, run.networks)
    found = estimates(values, points_of(run).source.table.prompts, 1000).metrics
    quarters = {f"heldout/{name}/q{q}" for name in names for q in (1, 2, 3, 4)} & found.keys()
    assert bool(quarters) == (objective["name"] != "inversion_dpo")
    assert found.keys() - quarters == {f"heldout/{name}{end}" for name in names for end in ("", "/low", "/high")}
    assert all(math.isfinite(value) for value in found.values())


def test_estimates_by_hand() -> None:
    """Two pairs of one prompt and one of another; a pair counts once, a margin of 0 half."""
    margins = [
        (0, 0, 100, 2.0),
        (0, 1, 600, -1.0),
        (1, 0, 100, 0.0),
        (1, 1, 600, 3.0),
        (2, 0, 100, -1.0),
        (2, 1, 600, -2),
    ]
    values = [PointValues(pair, point, t, -margin, margin) for pair, point, t, margin in margins]
    measured = estimates(values[::-1], ["a", "a", "b"], 1000)
    found = measured.metrics
    assert found["heldout/accuracy"] == pytest.approx((0.5 + 0.75 + 0) / 3)
    assert found["heldout/margin"] == -found["heldout/loss"] == pytest.approx(1 / 6)
    assert found["heldout/accuracy/q1"] == pytest.approx(0.5)
    assert found["heldout/margin/q3"] == 0.0
    spread = math.sqrt(5 / 3), math.sqrt(14 / 3)  # of 2, 0, -1 and of -1, 3, -2
    of_pairs = (2, -1), (0, 3), (-1, -2)
    scores = [[math.tanh(x / s) for x, s in zip(pair, spread, strict=True)] for pair in of_pairs]
    assert found["heldout/score"] == pytest.approx(sum(map(sum, scores)) / 6)
    assert measured.of_pairs["heldout/score"] == pytest.approx({i: sum(x) / 2 for i, x in enumerate(scores)})
    assert found["heldout/margin/low"] < 1 / 6 < found["heldout/margin/high"]
    broken = estimates([replace(values[0], loss=math.nan, margin=math.nan), *values[1:]], ["a", "a", "b"], 1000)
    assert all(math.isnan(broken.metrics[f"heldout/{name}"]) for name in ("loss", "accuracy", "margin", "score"))


def test_cached_reference_errors_and_latents_give_the_same(make_config: MakeConfig, tmp_path: Any) -> None:
    settings = {"training.max_train_steps": 2, "training.learning_rate": 1e-4, "validation.pairs_every": 1}
    cached = {"data.cache_dir": str(tmp_path / "cache"), "data.draws_per_pair": 1, "data.cache_reference_errors": True}
    runs = {"online": {"data.draws_per_pair": 1}, "cached": cached}
    for name, extra in runs.items():
        run_training(make_config(base_path(), {**FEW, **settings, **extra, "output_dir": str(tmp_path / name)}))
    online, from_cache = (metrics(tmp_path / name)[-1] for name in runs)
    names = {name for name in online if name.startswith("heldout")}
    scores = {name for name in names if "score" in name}  # margins of a policy that has hardly moved, at unit size
    for some, tolerance in ((names - scores, 1e-4), (scores, 5e-3)):
        assert {n: from_cache[n] for n in some} == pytest.approx({n: online[n] for n in some}, rel=1e-3, abs=tolerance)


def test_the_trainer_takes_held_out_pairs(tmp_path: Any) -> None:
    rows = load_pairs(pairs_path(), resolution=16, max_pairs=12, verify="none")
    train, heldout = (replace(rows, table=rows.table.part(part)) for part in (range(8), range(8, 12)))
    arguments = TrainingArguments(output_dir=str(tmp_path), max_train_steps=1, logging_steps=1, report_to="none")
    trainer = Trainer(base_path(), "dpo", train, arguments, eval_dataset=heldout, validation={"pairs_every": 1})
    assert 0 < trainer.train()["heldout/loss"] < 1
    with pytest.raises(ConfigError, match=r"eval_dataset and validation\.pairs are both given"):
        Trainer(base_path(), "dpo", train, arguments, eval_dataset=heldout, validation={"pairs": 0.1})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"validation.pairs": 1.5}, "validation.pairs: give a share of the training pairs, a number between 0 and 1"),
        ({"validation.pairs": True}, "validation.pairs: give a share"),
        ({"validation.pairs": 0.1, "validation.pairs_every": 15, "training.logging_steps": 10}, "not a multiple of"),
        ({"validation.early_stopping_patience": 2}, "early_stopping_patience needs held-out pairs"),
        ({"validation.load_best_model_at_end": True}, "load_best_model_at_end needs held-out pairs"),
        ({"validation.least_diversity": 0}, "least_diversity needs held-out pairs"),
        ({"validation.faithfulness": "clip"}, "validation.faithfulness needs held-out pairs"),
        ({"validation.least_faithfulness": -0.02}, "name one in validation.faithfulness"),
        ({"validation.faithfulness": "clip", "validation.least_faithfulness": 0.9}, "least_faithfulness"),
        ({"validation.faithfulness": "clip", "validation.least_faithfulness": float("-inf")}, "least_faithfulness"),
        (
            {"validation.pairs": 0.1, "validation.pairs_split": "test"},
            "validation.pairs_split: a share is of the pairs of",
        ),
        ({"validation.pairs": "x.parquet", "data.scores": "s.jsonl"}, "data.scores belong to the pairs of data.path"),
        ({"validation.pairs": 0.1, "validation.points_per_pair": 6}, "multiple of 4"),
        (
            {"validation.pairs": 0.1, "validation.load_best_model_at_end": True, "objective": {"name": "sft"}},
            "sft does not compare the images of a pair; use loss",
        ),
        ({"validation.pairs": 0.1, "objective": {"name": "spo"}}, "spo compares steps of the sampler"),
        (
            {"validation.pairs": "p.parquet", "source": {"name": "selfplay"}},
            "compares the policy with its own snapshots",
        ),
        (
            {"validation.pairs": 0.1, "source": {"name": "online_pairs", "scorer": "clip"}},
            "none can be held out; give the path",
        ),
    ],
)
def test_what_cannot_be_measured_is_refused(settings: dict[str, Any], message: str, make_config: MakeConfig) -> None:
    with pytest.raises(ConfigError, match=message):
        make_config(base_path(), settings)


def test_a_path_without_pairs_is_named(make_config: MakeConfig) -> None:
    with pytest.raises(DataError, match=r"validation\.pairs: there is no file or folder nowhere\.parquet"):
        run_training(make_config(base_path(), {**WORLD, "validation.pairs": "nowhere.parquet"}))
