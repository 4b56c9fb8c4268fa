"""InPO, SmPO and Inversion-DPO: by hand, at the start, per pair, and their cost."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diffalign.engine.inversion import strided_ascent
from diffalign.engine.measure import Network, measure, measure_and_backward
from diffalign.engine.random import integers
from diffalign.errors import DiffalignError
from diffalign.models.adapters.lora import add_lora
from diffalign.models.loading.base import load_base
from diffalign.models.policy.networks import Networks
from diffalign.models.policy.reference import FrozenCopy, LoraOff
from diffalign.objectives.base import Objective
from diffalign.objectives.dpo import DiffusionDPO
from diffalign.objectives.inpo import InPO, ascent_to
from diffalign.objectives.inversion_dpo import InversionDPO
from diffalign.objectives.smpo import SmPO
from diffalign.types import Conditioning, Evidence, PairBatch
from tests.toy import ToyModels, single, toy_batch, toy_models


def as_released(**settings: Any) -> InversionDPO:
    """With the release's settings but for its form, unless changed."""
    release = {"steps": 80, "guidance": 2.0, "weighting": "inverse_alpha", "substeps": 1}
    return InversionDPO(**(release | settings))


LOG2 = float(torch.tensor(2.0).log())
OBJECTIVES: dict[str, Objective] = {
    "inversion_dpo": InversionDPO(beta=50.0),
    "inpo": InPO(beta=50.0),
    "inpo by reference": InPO(beta=50.0, inverter="reference", eta=0.0),
    "inpo released": InPO(beta=50.0, grid="released"),
    "smpo": SmPO(beta=50.0, score_low=0.0, score_high=1.0),
    "smpo fixed point": SmPO(beta=50.0, score_low=0.0, score_high=1.0, refinements=4, tolerance=1e-6),
    "residual": as_released(beta=50.0, steps=6),
    "residual, own trajectory": as_released(beta=50.0, steps=6, trajectory="policy", guidance=1.0),
    "residual, substeps": as_released(beta=50.0, steps=6, substeps=3, points_per_step=4),
    "residual, some points": as_released(beta=50.0, steps=6, points_per_step=2, weighting="uniform"),
    "released": as_released(beta=50.0, steps=6, form="released"),
    "released, own trajectory": as_released(beta=50.0, steps=6, form="released", trajectory="policy"),
    "flipped": as_released(beta=50.0, steps=6, form="released_flipped", normalise=True, grid="released"),
}
DEGENERATE = {name for name in OBJECTIVES if "released" in getattr(OBJECTIVES[name], "form", "")}


def losses_and_gradients(name: str, batch: PairBatch, apart: float = 0.02) -> tuple[list[float], list[Tensor]]:
    objective, models = OBJECTIVES[name], toy_models(apart=apart)
    score = objective.score(measure(models, objective.probe(batch, models)))
    score.loss.mean().backward()
    return score.loss.tolist(), [p.grad for p in models.net.parameters()]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_equal_weights_start(name: str) -> None:
    """Log 2 to the last bit; a gradient that is not zero, but for the released forms of Inversion-DPO: exactly zero.

    In those the policy is measured by its squared distance from the reference, which has its minimum there.
    """
    objective, models = OBJECTIVES[name], toy_models(torch.float32)
    probe = objective.probe(toy_batch(4, torch.float32), models)
    _, score = measure_and_backward(models, probe, objective.score)
    assert score.loss.tolist() == [LOG2] * 4
    assert score.logit.tolist() == [0.0] * 4
    gradient = sum(float(p.grad.abs().sum()) for p in models.net.parameters())
    assert gradient == 0.0 if name in DEGENERATE else gradient > 0


@pytest.mark.parametrize("name", OBJECTIVES)
def test_batch_is_its_singletons(name: str) -> None:
    """Different t in one batch: losses one by one, and the gradient is the mean of the singletons' gradients."""
    batch = toy_batch(4)
    together, gradient = losses_and_gradients(name, batch)
    alone = [losses_and_gradients(name, single(batch, i)) for i in range(4)]
    assert together == pytest.approx([loss for losses, _ in alone for loss in losses], rel=1e-9)
    for i, got in enumerate(gradient):
        mean = torch.stack([g[i] for _, g in alone]).mean(0)
        torch.testing.assert_close(got, mean, rtol=1e-8, atol=1e-8 * float(got.abs().max()))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_swapped_sides_negate_the_logit(name: str) -> None:
    objective, models = OBJECTIVES[name], toy_models(apart=0.1)
    seen = measure(models, objective.probe(toy_batch(), models))
    reference = None if seen.reference is None else seen.reference.flip(0)
    swapped = replace(seen, policy=seen.policy.flip(0), reference=reference)
    torch.testing.assert_close(objective.score(swapped).logit, -objective.score(seen).logit, rtol=0, atol=0)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_probes_are_repeatable_and_without_graph(name: str) -> None:
    objective, models, batch = OBJECTIVES[name], toy_models(apart=0.1), toy_batch()
    probe, again = objective.probe(batch, models), objective.probe(batch, models)
    assert torch.equal(probe.xt, again.xt)
    assert torch.equal(probe.target, again.target)
    assert not probe.xt.requires_grad
    assert not probe.target.requires_grad
    assert probe.t.dtype == torch.int64


def column(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)[:, None]


def test_inpo_by_hand() -> None:
    score = InPO(beta=20.0).score(Evidence(column(0.4, 0.5), column(0.5, 0.5)))
    assert float(score.loss) == pytest.approx(math.log(1 + math.exp(-1)))


def test_smpo_by_hand() -> None:
    objective = SmPO(beta=20.0, score_low=0.0, score_high=1.0)
    batch = replace(toy_batch(1), scores=column(math.log(3), 0.0))
    assert float(objective.weight(batch)) == pytest.approx(5.0)
    score = objective.score(Evidence(column(0.4, 0.5), column(0.5, 0.5), weight=objective.weight(batch)))
    assert float(score.logit) == pytest.approx(5.0)
    assert float(score.metrics["rewards/margins"]) == pytest.approx(1.0)


@pytest.mark.parametrize(("points", "weight"), [(0.5, 0.15), (1, 0.30), (2, 0.60), (3.3, 1.0), (5, 1.49)])
def test_smpo_weights_of_pickscore_gaps(points: float, weight: float) -> None:
    batch = replace(toy_batch(1), scores=column(0.20 + points / 100, 0.20))
    assert float(SmPO().weight(batch)) == pytest.approx(weight, abs=0.015)


def test_smpo_needs_scores() -> None:
    models, batch = toy_models(), toy_batch()
    with pytest.raises(ValueError, match=r"the data have none.*chosen_score"):
        SmPO().probe(replace(batch, scores=None), models)
    holey = replace(batch, scores=batch.scores.index_fill(1, torch.tensor([2]), math.nan), ids=tuple("abcd"))
    with pytest.raises(ValueError, match=r"lack one: c; score or remove them"):
        SmPO().probe(holey, models)
    with pytest.raises(ValueError, match="no weight"):
        SmPO().score(Evidence(column(1.0, 1.0), column(1.0, 1.0)))


@dataclass
class Retold:
    """Toy networks that answer in another prediction type, and are otherwise the same functions."""

    toy: ToyModels
    prediction_type: str

    def __post_init__(self) -> None:
        self.schedule = replace(self.toy.schedule, prediction_type=self.prediction_type)

    def policy(self, xt: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        return self._told(self.toy.policy(xt, t, cond), xt, t)

    def reference(self, xt: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        return self._told(self.toy.reference(xt, t, cond), xt, t)

    def _told(self, eps: Tensor, xt: Tensor, t: Tensor) -> Tensor:
        return self.schedule.target(self.schedule.predict_x0(eps, xt, t), eps, t)


@pytest.mark.parametrize("objective", [InPO(), SmPO(score_low=0.0, score_high=1.0)])
def test_v_prediction_inverts_to_the_same_points_and_asks_for_v(objective: InPO | SmPO) -> None:
    toy, batch = toy_models(apart=0.1), toy_batch()
    other = Retold(toy, "v_prediction")
    expected, got = objective.probe(batch, toy), objective.probe(batch, other)
    torch.testing.assert_close(got.xt, expected.xt, rtol=0, atol=1e-9)
    t = got.t.expand(2, -1)
    torch.testing.assert_close(got.target, other.schedule.v_from_eps(expected.target, got.xt, t), rtol=0, atol=1e-8)


@pytest.mark.parametrize("objective", [InPO(), InPO(eta=0.0), SmPO(score_low=0.0, score_high=1.0)])
def test_the_target_explains_the_inverted_latent(objective: InPO | SmPO) -> None:
    models, batch = toy_models(), toy_batch(16)
    probe = objective.probe(batch, models)
    assert torch.equal(probe.t, integers(batch.keys, "t", 0, 1000))
    t = probe.t.expand(2, -1)
    torch.testing.assert_close(models.schedule.add_noise(batch.latents, probe.target, t), probe.xt, rtol=0, atol=1e-9)
    assert not torch.equal(probe.target[0], probe.target[1])


def test_inpo_noise_is_independent_of_the_batch_and_of_the_sides() -> None:
    models, batch = toy_models(), toy_batch(8)
    moved = InPO(eta=0.5).probe(batch, models).xt - InPO(eta=0.0).probe(batch, models).xt
    assert float(moved.abs().max()) > 0
    flat = moved.flatten(2).transpose(0, 1)  # pair side (c h w)
    correlation = torch.stack([torch.corrcoef(sides)[0, 1] for sides in flat])
    assert float(correlation.mean().abs()) < 0.2


class Spy:
    """Counts rows, not calls: what a forward costs."""

    def __init__(self, models: ToyModels) -> None:
        self.schedule = models.schedule
        self.rows = {"policy": 0, "reference": 0}
        self._models = models

    def policy(self, xt: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        return self._count("policy", self._models.policy, xt, t, cond)

    def reference(self, xt: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        return self._count("reference", self._models.reference, xt, t, cond)

    def _count(self, name: str, network: Network, xt: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        assert len(xt) == len(t) == len(cond.prompt_embeds)
        self.rows[name] += len(xt)
        return network(xt, t, cond)


def test_inpo_costs_its_inversion_and_one_forward_of_each() -> None:
    """Per pair and image: the steps of its own t, one reference forward, one policy forward; nothing hidden."""
    batch, objective = toy_batch(64), InPO(steps=10)
    spy = Spy(toy_models())
    measure(spy, objective.probe(batch, spy))
    steps = strided_ascent(integers(batch.keys, "t", 0, 1000), 100).steps
    assert spy.rows == {"policy": 2 * int(steps.sum()) + 2 * 64, "reference": 2 * 64}
    assert sum(spy.rows.values()) / 64 <= 2 * float(steps.double().mean()) + 2 + 2 * 2

    by_reference = Spy(toy_models())
    measure(by_reference, InPO(steps=10, inverter="reference").probe(batch, by_reference))
    assert by_reference.rows == {"policy": 2 * 64, "reference": 2 * int(steps.sum()) + 2 * 64}


def test_smpo_costs_two_predictions_a_step() -> None:
    batch, spy = toy_batch(64), Spy(toy_models())
    measure(spy, SmPO(steps=5).probe(batch, spy))
    steps = strided_ascent(integers(batch.keys, "t", 0, 1000), 200).steps
    assert spy.rows == {"policy": 2 * 2 * int(steps.sum()) + 2 * 64, "reference": 2 * 64}


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: InPO(steps=0), "steps = 0"),
        (lambda: InPO(eta=1.5), "eta = 1.5"),
        (lambda: InPO(grid="coarse"), "exact, released"),
        (lambda: InPO(inverter="ema"), "policy and reference"),
        (lambda: SmPO(score_low=2.0), "score_low = 2.0"),
        (lambda: SmPO(refinements=-1), "refinements = -1"),
        (lambda: SmPO(tolerance=0.0), "tolerance = 0.0"),
        (lambda: as_released(form="both"), "residual, released and released_flipped"),
        (lambda: as_released(weighting="snr"), "inverse_alpha and uniform"),
        (lambda: as_released(substeps=2, form="released"), "exactly 1 unless form: residual"),
        (lambda: InversionDPO(normalise=True), "every w is 1"),
        (lambda: as_released(points_per_step=81), "1 … steps = 80"),
        (lambda: as_released(points_per_forward=0), "points_per_forward = 0"),
    ],
)
def test_faulty_settings_are_named(make: object, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()


def test_every_objective_states_its_paper_and_defaults() -> None:
    for cls in (InPO, SmPO, InversionDPO):
        objective = cls()
        assert "arXiv" in objective.paper
        assert objective.needs_reference
        assert {f.name for f in fields(objective)} >= {"beta", "steps", "grid"}


@pytest.mark.parametrize("tuning", ["lora", "full"])
@pytest.mark.parametrize("name", ["inpo", "smpo", "residual"])
def test_real_networks_start_at_log_2_and_move(tiny_sdxl: Path, name: str, tuning: str) -> None:
    """SDXL's structure, LoRA switched off or a frozen copy as reference, mixed t in one batch."""
    base = load_base(str(tiny_sdxl), vae_and_text=False)
    unet = base.unet
    if tuning == "lora":
        add_lora(unet, rank=2, alpha=4)
    else:
        unet.requires_grad_(True)
    reference = (LoraOff if tuning == "lora" else FrozenCopy)(unet)
    networks = Networks(unet, family=base.family, schedule=base.schedule, reference=reference)
    config, g = unet.config, torch.Generator().manual_seed(0)
    pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    cond = Conditioning(
        prompt_embeds=torch.randn(1, 3, 7, config.cross_attention_dim, generator=g).expand(2, -1, -1, -1),
        pooled=torch.randn(1, 3, pooled, generator=g).expand(2, -1, -1),
        time_ids=torch.full((2, 3, 6), 64.0),
    )
    batch = replace(
        toy_batch(3, torch.float32),
        latents=torch.randn(2, 3, config.in_channels, 8, 8, generator=g),
        cond=cond,
        uncond=cond.map(torch.zeros_like),
    )
    objective = OBJECTIVES[name]
    probe = objective.probe(batch, networks)
    assert len(set(probe.t.flatten().tolist())) >= 3
    score = objective.score(measure(networks, probe))
    assert score.loss.tolist() == [LOG2] * 3
    score.loss.mean().backward()
    assert sum(float(p.grad.abs().sum()) for p in unet.parameters() if p.grad is not None) > 0


@pytest.mark.parametrize("steps", [1, 7, 10, 300, 999, 1000])
def test_inversion_takes_the_steps_that_are_set(steps: int) -> None:
    """300 of 1,000 were 250; where steps divide T nothing has changed."""
    s = toy_models().schedule
    t = torch.tensor([999, 0, 437])
    ascent = ascent_to(s, t, steps, "exact")
    assert ascent.steps.tolist() == 2 * [steps, 1, math.ceil(438 * steps / 1000)]
    widths = (ascent.high - ascent.low)[0, :steps]
    assert int(widths.sum()) == 1000
    assert int(widths.max() - widths.min()) <= 1
    if 1000 % steps == 0:
        assert torch.equal(ascent.high, strided_ascent(t.repeat(2), 1000 // steps).high)


@pytest.mark.parametrize(
    ("objective", "words"),
    [
        (InPO(steps=1001), "steps = 1001: .* 1000 timesteps.*at most 1000"),
        (SmPO(steps=2000), "steps = 2000: .* 1000 timesteps"),
        (InversionDPO(steps=200, substeps=8), "steps · substeps = 1600: .* 1000 timesteps"),
        (DiffusionDPO(timesteps=(249, 1000)), r"timesteps = \[249, 1000\]: .* 0 … 999"),
    ],
)
def test_settings_that_the_schedule_has_no_room_for_are_refused_first(objective: Objective, words: str) -> None:
    with pytest.raises(DiffalignError, match=words):
        objective.check_schedule(toy_models().schedule)


def test_an_infinite_weight_is_refused_first() -> None:
    schedule = toy_models(rescale_betas_zero_snr=True).schedule
    with pytest.raises(DiffalignError, match="weighting: uniform"):
        InversionDPO(weighting="inverse_alpha").check_schedule(schedule)
