"""SPO's source on tiny pipelines: it records the policy's own steps, in any batch and process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diffalign.config.schema import Config, ConfigError
from diffalign.engine import ddim
from diffalign.engine.measure import errors, guided
from diffalign.engine.random import normal, pair_key
from diffalign.engine.schedule import NoiseSchedule
from diffalign.objectives import SPO
from diffalign.sources import BranchingRollout, Context, SourceError
from diffalign.sources.chains import Chains
from diffalign.sources.rounds import Place, Rollout
from diffalign.training.run import run_training
from diffalign.types import PairBatch
from tests.sources.judges import Brightness
from tests.training.test_run import metrics, same, weights

MakeContext = Callable[..., Context]
MakeConfig = Callable[..., Config]
PROMPTS = ["a red circle", "a blue square", "a photo", "the large square", "a small circle"]
BRIGHTNESS = "tests.sources.judges:Brightness"
SHORT: dict[str, Any] = {"sampling_steps": 5, "plain_steps": 2, "threshold": 0.0, "prompts_per_round": 4}


class Told(Brightness):
    """Brightness that listens to t."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, int]] = []

    def score(self, images, prompts, t):
        assert t.dtype == torch.int64
        self.calls.append((int(t[0]), len(images)))
        assert len(set(t.tolist())) == 1
        return super().score(images, prompts)


class BrokenLate(Brightness):
    """Not a number for the last image of the second pool."""

    name = "broken"

    def __init__(self) -> None:
        self.calls = 0

    def score(self, images, prompts):
        self.calls += 1
        scores = super().score(images, prompts)
        return torch.where(torch.arange(len(images)) < len(images) - (self.calls == 2), scores, torch.nan)


def places(context: Context, numbers: range) -> list[Place]:
    rows = [number % len(PROMPTS) for number in numbers]
    table = context.table
    return [Place(n, row, table.ids[row], table.prompts[row]) for n, row in zip(numbers, rows, strict=True)]


def drawn(context: Context, batch: PairBatch, i: int, candidates: int) -> Tensor:
    """All normal draws "member c h w" of the step that pair i of a batch records, from its id alone."""
    id_, place, index = batch.ids[i].split("/")
    key = torch.tensor([pair_key(context.spec.run_seed, id_, int(place))])
    return normal(key, f"step {index}", (candidates, *context.latent_shape))[0]


@pytest.mark.parametrize(
    ("family", "kind", "rule"),
    [("sd", "epsilon", {}), ("sdxl", "v_prediction", {}), ("sdxl", None, {"rule": "inner_steps", "inner_steps": 1})],
)
def test_a_recorded_step_is_the_policys_own_with_its_own_noise(
    family: str, kind: str | None, rule: dict[str, Any], make_context: MakeContext
) -> None:
    context = make_context(family, PROMPTS, with_uncond=True, train_batch_size=4, kind=kind)
    source = BranchingRollout(BRIGHTNESS, num_candidates=3, **SHORT, **rule).build(context)
    s = context.networks.schedule
    for batch in islice(source.batches(), 3):
        moves = batch.transitions
        for side in range(2):
            x, after, t, t_prev = moves.noisy[side], moves.clean[side], moves.t, moves.t_prev
            cond, null = batch.cond.map(lambda v, side=side: v[side]), batch.uncond.map(lambda v, side=side: v[side])
            with torch.no_grad():
                answer = guided(context.networks.policy, x, t, cond, 5.0, null)
            step = ddim.step(s, s.to_eps(answer, x, t), x, t, t_prev, 1.0, x0=s.to_x0(answer, x, t))
            z = (after - step.mean) / step.std[:, None, None, None]
            for i in range(batch.pairs):
                away = (drawn(context, batch, i, 3) - z[i]).abs().amax((1, 2, 3))
                assert float(away.min()) < 2e-3  # x_t is float32 and σ small at the last step
        assert bool((batch.scores[0] > batch.scores[1]).all())
        assert bool((moves.t_prev < moves.t).all())


@pytest.mark.parametrize(("rule", "sides"), [({}, 1), ({"rule": "inner_steps", "inner_steps": 1}, 2)])
def test_sides_of_a_shared_x_t_cost_one_row(rule: dict[str, Any], sides: int, make_context: MakeContext) -> None:
    context = make_context("sdxl", PROMPTS, with_uncond=True)
    batch = next(BranchingRollout(BRIGHTNESS, num_candidates=2, **SHORT, **rule).build(context).batches()).to("cpu")
    rows: list[int] = []
    context.unet.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    errors(context.networks.policy, SPO().probe(batch, context.networks))
    assert rows == [2 * batch.pairs * sides]  # twice for guidance


def test_a_pool_is_judged_in_one_call_and_the_judge_told_t(make_context: MakeContext) -> None:
    context, judge = make_context("sd", PROMPTS), Told()
    forwards: list[int] = []

    def counted(_: object, args: tuple[Tensor, ...]) -> None:
        assert not torch.is_grad_enabled()
        forwards.append(len(args[0]))

    context.unet.register_forward_pre_hook(counted)
    chains = Chains(BranchingRollout(BRIGHTNESS, num_candidates=3, **SHORT), context, judge)
    rolled = chains.roll(0, places(context, range(2)))
    grid = context.networks.schedule.timesteps(5).tolist()
    assert judge.calls == [(grid[3], 6), (grid[4], 6), (0, 6)]
    assert forwards == [4, 4, 4, 12, 12]  # two prompts, guided; from the first branching on three siblings each
    assert rolled.metrics["rollout/valid"].tolist() == [1.0] * 6
    assert len(rolled.records) == 6
    assert len(rolled.metrics["rollout/score"]) == 4  # the last pool's best and worst, of two prompts
    assert rolled.metrics["rollout/gap"].min() > 0
    nothing = chains.roll(1, [])
    assert nothing.records is None
    assert nothing.metrics == {}


class NoisyJudge:
    """Judges x_t by its mean, and keeps what it was shown."""

    name = "noisy"

    def __init__(self) -> None:
        self.calls: list[tuple[int, int]] = []
        self.seen: list[Tensor] = []

    def check_latents(self, family: str, channels: int, schedule: NoiseSchedule) -> None:
        assert (family, channels, schedule.num_train_timesteps) == ("sd", 4, 1000)

    def score_latents(self, latents: Tensor, prompts: list[str], t: Tensor) -> Tensor:
        assert len(prompts) == len(t) == len(latents)
        self.calls.append((int(t[0]), len(latents)))
        self.seen.append(latents)
        return latents.mean((1, 2, 3))


def test_a_judge_of_noisy_latents_decodes_nothing_and_costs_one_forward_a_step(make_context: MakeContext) -> None:
    context, judge = make_context("sd", PROMPTS), NoisyJudge()
    forwards: list[int] = []
    context.unet.register_forward_pre_hook(lambda _, args: forwards.append(len(args[0])))
    context.encoder.decode = None  # never called
    settings = BranchingRollout("", num_candidates=3, **{**SHORT, "plain_steps": 1}, threshold_max=0.2)
    chains = Chains(settings, context, judge)
    rolled = chains.roll(0, places(context, range(2)))
    grid = context.networks.schedule.timesteps(5).tolist()
    assert judge.calls == [(t, 6) for t in (*grid[2:], 0)]  # the level that the candidates have reached
    assert forwards == [4] * 5  # two prompts, guided, at every step for the one member that goes on
    found = rolled.records
    for i in range(len(found)):  # chosen and rejected are the best and the worst of what was judged at that step
        seen = judge.seen[int(found.index[i]) - 1].unflatten(0, (3, 2))[:, int(found.place[i])]
        means = seen.mean((1, 2, 3))
        after = found.transitions.clean[:, i]
        assert torch.equal(after, seen[[int(means.argmax()), int(means.argmin())]])
        assert torch.equal(after, found.latents[:, i])
    limits = torch.tensor(chains.branching.thresholds, dtype=torch.float64)
    assert (float(limits.min()), float(limits.max())) == (0.0, 0.2)
    valid, gap = (
        rolled.metrics["rollout/valid"].unflatten(0, (4, 2)),
        rolled.metrics["rollout/gap"].unflatten(0, (4, 2)),
    )
    assert torch.equal(valid.bool(), torch.tanh(gap / 2) > limits[1:, None])


def records(context: Context, batch_size: int, numbers: range) -> Rollout:
    settings = BranchingRollout(BRIGHTNESS, num_candidates=2, generation_batch_size=batch_size, **SHORT)
    return Chains(settings, context, Brightness()).roll(0, places(context, numbers))


def test_the_batch_and_the_process_change_no_pair(make_context: MakeContext) -> None:
    context = make_context("sd", PROMPTS)
    whole = records(context, 40, range(4)).records
    parts = [records(context, 2, part).records for part in (range(0, 4, 2), range(1, 4, 2))]
    order = sorted(range(len(whole)), key=lambda i: (int(whole.place[i]), int(whole.index[i])))
    rows = [(int(p.place[i]), int(p.index[i]), p, i) for p in parts for i in range(len(p))]
    assert [row[:2] for row in sorted(rows, key=lambda r: r[:2])] == [
        (int(whole.place[i]), int(whole.index[i])) for i in order
    ]
    for i, (_, _, part, j) in zip(order, sorted(rows, key=lambda r: r[:2]), strict=True):
        found, expected = (r.select(pair=slice(k, k + 1)) for r, k in ((part, j), (whole, i)))
        assert torch.equal(found.transitions.t, expected.transitions.t)
        assert torch.equal(found.seeds, expected.seeds)
        for x, y in zip(found.pair_first().values(), expected.pair_first().values(), strict=True):
            # x̂_0 at the noisiest levels magnifies the rounding of a batch of another size
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-3)


def test_a_second_visit_to_a_prompt_draws_anew(make_context: MakeContext) -> None:
    context = make_context("sd", PROMPTS)
    first, again = (records(context, 4, range(n, n + 1)).records for n in (0, len(PROMPTS)))
    assert torch.equal(first.prompt, again.prompt)
    assert not torch.equal(first.transitions.noisy, again.transitions.noisy)


def test_faults_are_named(make_context: MakeContext) -> None:
    context, settings = make_context("sd", PROMPTS), BranchingRollout(BRIGHTNESS, **SHORT)
    t = context.networks.schedule.timesteps(5).tolist()[4]
    with pytest.raises(SourceError, match=rf"'broken' gave nan to the image of prompt 'a blue square' at t = {t}"):
        Chains(settings, context, BrokenLate()).roll(0, places(context, range(2)))
    with pytest.raises(SourceError, match=r"proportion_empty_prompts = 0\.1"):
        settings.build(make_context("sd", PROMPTS, prompt_dropout=0.1))
    context.networks.schedule = replace(context.networks.schedule, steps_offset=0)  # its grid has t = 0 in it
    late = BranchingRollout(BRIGHTNESS, sampling_steps=5, plain_steps=4)
    with pytest.raises(SourceError, match="a chain on this model's schedule has 4 steps"):
        late.build(context)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rule": "sometimes"}, "rule = 'sometimes'"),
        ({"inner_steps": 1}, "inner_steps = 1"),
        ({"plain_steps": 20}, "plain_steps = 20"),
        ({"eta": 0.0}, "eta = 0.0"),
        ({"guidance_scale": 0.5}, "guidance_scale = 0.5"),
        ({"threshold": 1.0}, "threshold = 1.0"),
        ({"num_candidates": 1}, "num_candidates = 1"),
        ({"threshold_max": 0.3}, r"threshold_max = 0.3: must be above threshold = 0.3"),
        ({"threshold_max": 1.0}, r"threshold_max = 1.0: .*below 1"),
        ({"threshold_max": 0.5, "rule": "inner_steps"}, "threshold_max = 0.5: with rule inner_steps"),
    ],
)
def test_faulty_settings_are_named(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        BranchingRollout(BRIGHTNESS, **change)


def overrides(tmp_path: Path, **source: Any) -> dict[str, Any]:
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    settings = {**SHORT, "num_candidates": 2, "prompts_per_round": 3, **source}
    return {
        "tuning.method": "lora",
        "objective": {"name": "spo"},
        "source": {"name": "rollout", "scorer": BRIGHTNESS, **settings},
        "data.path": str(tmp_path / "prompts.txt"),
        "training.learning_rate": 1e-4,
    }


def test_source_and_objective_must_agree(make_config: MakeConfig, tiny_sd: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"source.eta = 0.5 and objective.eta = 1.0"):
        make_config(tiny_sd, overrides(tmp_path, eta=0.5))
    with pytest.raises(ConfigError, match="objective spo only"):
        make_config(tiny_sd, {**overrides(tmp_path), "objective": {"name": "dpo"}})


@pytest.mark.parametrize("judge", ["images", "latents"])
def test_a_resumed_run_is_the_uninterrupted_one(
    judge: str, make_config: MakeConfig, tiny_sdxl: Path, judge_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    """Stopped in the middle of a round, whose files are then read again."""
    lpo = {"scorer": f"latent-judge={judge_folder('sdxl')}"} if judge == "latents" else {}
    shared = {**overrides(tmp_path, **lpo), "training.checkpointing_steps": 3, "training.train_batch_size": 2}
    whole = make_config(tiny_sdxl, {**shared, "output_dir": str(tmp_path / "whole"), "training.max_train_steps": 6})
    run_training(whole)
    lines = metrics(whole.output_dir)
    assert lines[0]["loss"] == pytest.approx(0.6931472, abs=1e-6)
    assert lines[0]["rollout/valid"] == 1.0
    assert lines[0]["grad_norm"] > 0
    assert lines[-1]["loss"] != lines[0]["loss"]
    for stop in (3, 6):
        changes = {"output_dir": str(tmp_path / "half"), "training.max_train_steps": stop}
        run_training(make_config(tiny_sdxl, {**shared, **changes, "training.resume_from_checkpoint": "latest"}))
    assert same(weights(tmp_path / "half"), weights(whole.output_dir))
