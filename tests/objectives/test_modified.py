"""Modifiers: the safeguard and its guarantee, terms of the chosen image, weights and densities of timesteps."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diffalign.config.schema import Config, load_config
from diffalign.engine.measure import ask_reference, measure, measure_and_backward
from diffalign.objectives import KTO, OBJECTIVES, SFT, SPO, DiffusionDPO, InPO, InversionDPO, MaPO
from diffalign.objectives.base import Objective, ask, require_terms, shared_points
from diffalign.objectives.modified import Modified, modified, plain_objective
from diffalign.objectives.timesteps import TimestepDensity, min_snr
from diffalign.types import CHOSEN, REJECTED, Evidence, PairBatch, Probe, Terms
from tests.toy import single, toy_batch, toy_models

ROOT = Path(__file__).parents[2]
GUARDED = [name for name, cls in OBJECTIVES.items() if cls().takes_safeguard]
DRAWN = [name for name, cls in OBJECTIVES.items() if shared_points(cls()) is not None]


def predicted(policy: Tensor, target: Tensor, mask: Tensor | None = None) -> Probe:
    """A probe whose x_t are the policy's predictions, "side pair c h w"."""
    t = torch.zeros(policy.shape[1], dtype=torch.int64)
    cond = toy_batch(policy.shape[1]).cond
    needs: Any = {"needs_reference": False, "needs_alignment": True}
    return Probe(policy, t, target, cond, terms=Terms(mask=mask), **needs)


def echoing() -> Any:
    models = toy_models()
    models.policy = models.reference = lambda xt, t, cond: xt  # type: ignore[method-assign]
    return models


def test_the_safeguard_by_hand() -> None:
    """e_c = (1, 0), e_r = (2, 1): |e_c|^2 = 1, <e_c, e_r> = 2; mu = .5 leaves .25 of the rejected side's gradient."""
    e = torch.tensor([[1.0, 0.0], [2.0, 1.0]], dtype=torch.float64).view(2, 1, 1, 1, 2)
    seen = measure(echoing(), predicted(e, torch.zeros_like(e)))
    assert seen.alignment is not None
    assert seen.alignment.flatten().tolist() == [0.5, 1.0]  # means over two places
    policy = seen.policy.detach().requires_grad_()
    score = modified(DiffusionDPO(beta=20.0), safeguard_mu=0.5).score(
        replace(seen, policy=policy, reference=seen.policy)
    )
    assert score.metrics["safeguard"].tolist() == [0.25]
    assert float(score.loss.detach()) == math.log(2)  # the value is not changed
    (slope,) = torch.autograd.grad(score.loss.sum(), policy)
    assert slope.flatten().tolist() == [5.0, -1.25]  # beta/2 · σ(0)
    away = measure(echoing(), predicted(e * torch.tensor([1.0, -1.0]).view(2, 1, 1, 1, 1), torch.zeros_like(e)))
    assert modified(DiffusionDPO(), safeguard_mu=0.9).score(replace(away, reference=away.policy)).metrics[
        "safeguard"
    ].tolist() == [1.0]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("mu", [0.0, 0.6, 1.0])
def test_a_step_in_the_space_of_predictions_lowers_the_chosen_error(mu: float, masked: bool) -> None:
    """Both sides' gradients, added as one change of both predictions: dA <= -mu |dA/dprediction|^2, pair by pair.

    Without the safeguard some pairs of these break it.
    """
    g = torch.Generator().manual_seed(3)
    target = torch.randn(1, 64, 2, 3, 3, generator=g, dtype=torch.float64).expand(2, -1, -1, -1, -1)
    e = torch.randn(2, 64, 2, 3, 3, generator=g, dtype=torch.float64)
    e[REJECTED] = 1.2 * e[CHOSEN] + 0.5 * e[REJECTED]
    mask = torch.rand(64, 3, 3, generator=g, dtype=torch.float64) if masked else None
    broken = {}
    for safeguard in (mu, None):
        policy = (target + e).requires_grad_()
        seen = measure(echoing(), predicted(policy, target, mask))
        seen = replace(seen, reference=seen.policy.detach())
        loss = modified(DiffusionDPO(beta=3.0), safeguard_mu=safeguard).score(seen).loss.sum()
        (ascent,) = torch.autograd.grad(loss, policy, retain_graph=True)
        (of_chosen,) = torch.autograd.grad(seen.policy[CHOSEN].sum(), policy)
        own, step = of_chosen[CHOSEN].flatten(1), -ascent.sum(0).flatten(1)
        half = 1.5 / 2  # beta/2 · σ(0): DPO's factor on both sides
        change = (own * step).sum(1)
        broken[safeguard] = change > -mu * half * own.square().sum(1) + 1e-12
    assert not broken[mu].any()
    assert broken[None].any() or mu == 0.0


def everything(name: str) -> dict[str, Any]:
    """All modifiers that an objective takes."""
    cls = OBJECTIVES[name]
    given: dict[str, Any] = {"distance_weight": 3.0}
    given |= {"safeguard_mu": 0.7} if name in GUARDED else {}
    if name in DRAWN:
        given |= {"snr_gamma": 5.0, "loss_power": 0.5, "logit_std": 1.0}
        given |= {"sft_weight": 0.5} if name != "sft" else {}
        given |= {"beta_power": 1.0} if cls.scale_field == "beta" and cls.takes_margin and cls.needs_reference else {}
    return given


@pytest.mark.parametrize("name", OBJECTIVES)
def test_batch_is_its_singletons_with_all_modifiers(name: str) -> None:
    objective, batch = modified(OBJECTIVES[name](), **everything(name)), toy_batch(2)

    def run(part: PairBatch) -> tuple[list[float], Tensor]:
        models = toy_models(apart=0.05)
        _, score = measure_and_backward(models, ask(objective, part, models), objective.score)
        return score.loss.tolist(), torch.cat([p.grad.flatten() for p in models.net.parameters()])

    losses, gradient = run(batch)
    alone = [run(single(batch, i)) for i in range(2)]
    assert losses == pytest.approx([x for part, _ in alone for x in part], rel=1e-12)
    mean = torch.stack([g for _, g in alone]).mean(0)
    torch.testing.assert_close(gradient, mean, rtol=1e-9, atol=1e-9 * float(mean.abs().max()))


def test_two_passes_give_the_gradient_of_one() -> None:
    objective = modified(InversionDPO(steps=5, points_per_forward=2), safeguard_mu=0.5, distance_weight=2.0)
    g = torch.Generator().manual_seed(2)
    batch = replace(toy_batch(3), terms=Terms(mask=torch.rand(3, 6, 6, generator=g, dtype=torch.float64)))
    found = []
    for size in (2, None):
        models = toy_models(apart=0.05)
        probe = replace(ask(objective, batch, models), points_per_forward=size)
        models.policy_calls = models.reference_calls = 0
        evidence, score = measure_and_backward(models, probe, objective.score)
        assert (models.policy_calls, models.reference_calls) == ((6, 3) if size else (1, 1))
        assert evidence.distance is not None
        assert not evidence.distance.requires_grad
        found.append((score.loss, torch.cat([p.grad.flatten() for p in models.net.parameters()])))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-12, atol=0)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-9, atol=1e-12)


def test_products_where_the_sides_share_their_inputs_are_those_asked_apart() -> None:
    models, batch = toy_models(apart=0.1), toy_batch(3)
    objective = modified(DiffusionDPO(), safeguard_mu=0.5, distance_weight=1.0)
    probe = ask(objective, replace(batch, latents=batch.latents[:1].expand(batch.latents.shape)), models)
    probe = replace(probe, target=torch.stack([probe.target[0], probe.target[1].roll(1, 0)]))
    shared = replace(probe, xt=probe.xt[:1].expand(probe.xt.shape))
    one, two = measure(models, shared), measure(models, replace(probe, xt=probe.xt.clone()))
    for name in ("policy", "distance", "alignment"):
        torch.testing.assert_close(getattr(one, name), getattr(two, name), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("zero_snr", [False, True])
def test_inner_products_from_predictions(kind: str, zero_snr: bool) -> None:
    """<e_policy, e_reference> = (E_policy + E_reference - distance) / 2, and <e_c, e_r>, place by place."""
    if zero_snr and kind == "epsilon":
        return  # no noise can be predicted from pure noise: such bases do not exist
    models = toy_models(apart=0.2, prediction_type=kind, rescale_betas_zero_snr=zero_snr)
    objective = modified(DiffusionDPO(timesteps=(999,) if zero_snr else None), safeguard_mu=0.5, distance_weight=1.0)
    probe = ask(objective, toy_batch(2), models)
    seen = measure(models, probe)
    e = {}
    for who, net in (("policy", models.net), ("reference", models.frozen)):
        flat = net(probe.xt.flatten(0, 1), probe.t.repeat(2), probe.cond.flatten())
        e[who] = (flat.view_as(probe.target) - probe.target).flatten(2)
    assert seen.reference is not None
    assert seen.distance is not None
    inner = (seen.policy + seen.reference - seen.distance) / 2
    torch.testing.assert_close(inner, (e["policy"] * e["reference"]).mean(-1), rtol=1e-9, atol=1e-12)
    expected = (e["policy"][:1] * e["policy"]).mean(-1)
    torch.testing.assert_close(seen.alignment, expected, rtol=1e-9, atol=1e-12)
    assert seen.distance.requires_grad
    assert seen.alignment is not None
    assert not seen.alignment.requires_grad


def test_nothing_is_computed_that_no_loss_asks_for() -> None:
    models = toy_models()
    seen = measure(models, ask(DiffusionDPO(), toy_batch(), models))
    assert seen.distance is None
    assert seen.alignment is None
    probe = ask(DiffusionDPO(), toy_batch(), models)
    assert (probe.weight, probe.scale, probe.reference_answer) == (None, None, None)


def test_errors_alone_do_not_serve_the_distance() -> None:
    models = toy_models(apart=0.1)
    objective = modified(DiffusionDPO(), distance_weight=1.0)
    probe = ask(objective, toy_batch(), models)
    with pytest.raises(ValueError, match="distance between policy and reference, and only the reference's errors"):
        measure(models, replace(probe, reference=torch.zeros(2, 4, dtype=torch.float64)))
    probes = [ask(objective, toy_batch(2, seed=s), models) for s in range(2)]
    for alone, together in zip(probes, ask_reference(models, probes), strict=True):
        torch.testing.assert_close(measure(models, together).distance, measure(models, alone).distance)


def test_terms_and_weights_are_added_as_they_say() -> None:
    models, batch = toy_models(apart=0.1), toy_batch()
    plain = DiffusionDPO(beta=50.0)
    objective = modified(plain, sft_weight=0.5, distance_weight=2.0, loss_power=1.0)
    seen = measure(models, ask(objective, batch, models))
    t = ask(plain, batch, models).t
    assert seen.t is not None
    assert torch.equal(seen.t, t)  # no density: the points of the objective
    weight = (t.double() + 1) / 1000 / (1001 / 2000)
    assert seen.distance is not None
    expected = weight * plain.score(seen).loss + 0.5 * seen.policy[0] + 2.0 * seen.distance[0]
    torch.testing.assert_close(objective.score(seen).loss, expected, rtol=1e-12, atol=0)
    scaled = modified(plain, beta_power=1.0)
    seen = measure(models, ask(scaled, batch, models))
    each = [DiffusionDPO(beta=50.0 * float(w)).score(seen.select(pair=slice(i, i + 1))) for i, w in enumerate(weight)]
    torch.testing.assert_close(scaled.score(seen).loss, torch.cat([s.loss for s in each]), rtol=1e-9, atol=0)


def test_min_snr_by_hand() -> None:
    """The minimum of SNR and gamma, over SNR for noise and over SNR + 1 for velocity, as in diffusers' scripts."""
    t = torch.tensor([0, 100, 500, 999])
    for kind in ("epsilon", "v_prediction", "sample"):
        schedule = toy_models(prediction_type=kind).schedule
        for i, at in enumerate(t.tolist()):
            bar = float(schedule.alphas_cumprod[at])
            snr = bar / (1 - bar)
            expected = min(snr, 5.0) / {"epsilon": snr, "v_prediction": snr + 1, "sample": 1}[kind]
            assert float(min_snr(schedule, t, 5.0)[i]) == pytest.approx(expected, rel=1e-12)
    zero = toy_models(prediction_type="v_prediction", rescale_betas_zero_snr=True).schedule
    assert float(min_snr(zero, torch.tensor([999]), 5.0)) == 0.0


def test_densities_are_those_of_their_distributions() -> None:
    u = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    edges = torch.arange(1, 10, dtype=torch.float64) / 10
    power = TimestepDensity(power=2.0).places(u, 10)
    share = torch.stack([(power < k).double().mean() for k in range(1, 10)])
    torch.testing.assert_close(share, edges**3, rtol=0, atol=1e-4)
    normal = TimestepDensity(logit_mean=0.5, logit_std=1.5).places(u, 10)
    share = torch.stack([(normal < k).double().mean() for k in range(1, 10)])
    expected = torch.distributions.Normal(0.5, 1.5).cdf(torch.logit(edges))
    torch.testing.assert_close(share.float(), expected.float(), rtol=0, atol=1e-4)
    assert TimestepDensity(logit_std=1.0).places(torch.zeros(1, dtype=torch.float64), 10).tolist() == [0]


def test_a_density_moves_the_points_and_their_identity() -> None:
    models, plain = toy_models(), DiffusionDPO(timesteps=(249, 499, 749, 999))
    dense = modified(plain, sampling_power=30.0)
    assert ask(dense, toy_batch(32), models).t.float().mean() > 950
    assert set(ask(modified(plain, logit_std=1.0), toy_batch(64), models).t.tolist()) == {249, 499, 749, 999}
    assert dense.drawn not in (plain.drawn, modified(plain, sampling_power=2.0).drawn)
    assert modified(plain, safeguard_mu=0.5).drawn == plain.drawn


def test_without_modifiers_nothing_changes() -> None:
    plain = DiffusionDPO()
    assert modified(plain) is plain
    assert modified(plain, sft_weight=0.0, safeguard_mu=None) is plain
    found = load_config(ROOT / "training_configs/world/dpo.yaml")
    assert isinstance(found, Config)
    assert found.objective == DiffusionDPO(beta=2000.0)
    assert found.resolved()["objective"] == {"name": "dpo", "beta": 2000.0, "timesteps": None}


def test_a_config_sets_them_among_the_objectives_settings() -> None:
    path, changes = ROOT / "training_configs/world/dpo.yaml", ["objective.safeguard_mu=0.9", "objective.sft_weight=1"]
    found = load_config(path, changes)
    assert isinstance(found, Config)
    assert found.objective == modified(DiffusionDPO(beta=2000.0), safeguard_mu=0.9, sft_weight=1.0)
    assert found.objective.beta == 2000.0
    plain = found.resolved()["objective"]
    assert plain == {"name": "dpo", "beta": 2000.0, "timesteps": None, "safeguard_mu": 0.9, "sft_weight": 1.0}
    assert plain_objective(found.objective) == DiffusionDPO(beta=2000.0)
    for change, words in (
        (["objective.safegard_mu=1"], "safegard_mu: dpo has no such setting; did you mean 'safeguard_mu'"),
        (["objective.name=kto", "objective.safeguard_mu=1"], "safeguard_mu: kto with these settings"),
        (["objective.snr_gamma=five"], "snr_gamma: a number is required"),
    ):
        with pytest.raises(ValueError, match=words):
            load_config(path, change)


def test_a_mask_that_swaps_sides_is_refused_where_they_have_roles() -> None:
    require_terms(modified(DiffusionDPO(), loss_power=1.0), margin=True, signs=True)
    with pytest.raises(ValueError, match="mask below 0"):
        require_terms(modified(DiffusionDPO(), safeguard_mu=0.5), margin=False, signs=True)


@pytest.mark.parametrize(
    ("objective", "given", "words"),
    [
        (DiffusionDPO(), {"safeguard_mu": 1.5}, r"safeguard_mu = 1.5: must be in \[0, 1\]"),
        (DiffusionDPO(), {"sft_weight": -1.0}, "sft_weight = -1.0"),
        (DiffusionDPO(), {"snr_gamma": 0.0}, "snr_gamma = 0.0"),
        (DiffusionDPO(), {"sampling_power": -1.0}, "sampling_power = -1.0: must be above -1"),
        (DiffusionDPO(), {"logit_mean": 1.0}, "logit_mean = 1.0: needs logit_std"),
        (DiffusionDPO(), {"logit_std": 1.0, "sampling_power": 1.0}, "t has one density"),
        (DiffusionDPO(), {"beta_power": 1e6}, "beta_power = 1000000.0"),
        (MaPO(), {"safeguard_mu": 0.5}, "safeguard_mu: mapo"),
        (SPO(), {"safeguard_mu": 0.5}, "safeguard_mu: spo"),
        (InversionDPO(form="released", substeps=1), {"safeguard_mu": 0.5}, "safeguard_mu: inversion_dpo"),
        (InPO(), {"loss_power": 1.0, "logit_std": 1.0}, "loss_power, logit_std: inpo does not draw one timestep"),
        (KTO(), {"beta_power": 1.0}, "beta_power: kto has no beta in front"),
        (SFT(), {"sft_weight": 1.0}, "sft_weight: the loss of sft"),
        (modified(DiffusionDPO(), sft_weight=1.0), {"sft_weight": 1.0}, "modified once"),
    ],
)
def test_what_does_not_fit_is_named(objective: Objective, given: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        modified(objective, **given)


def test_evidence_without_what_a_modifier_needs_is_refused() -> None:
    errors = torch.full((2, 1), 0.5)
    with pytest.raises(ValueError, match="safeguard_mu: this evidence was measured without"):
        modified(DiffusionDPO(), safeguard_mu=0.5).score(Evidence(errors, errors))
    assert isinstance(modified(DiffusionDPO(), safeguard_mu=0.5), Modified)
