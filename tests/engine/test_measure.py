"""Errors at points, numbers of forwards, and the two-pass chunked gradient against the direct one."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from diffalign.engine.measure import ask_reference, errors, measure, measure_and_backward
from diffalign.objectives import DiffusionDPO
from diffalign.objectives.base import shared_noise
from diffalign.types import Conditioning, Evidence, Probe, Score
from tests.toy import ToyModels, toy_batch, toy_models


def many_points(models: ToyModels, points: int, pairs: int = 3, dtype: torch.dtype = torch.float64) -> Probe:
    """A probe with a point axis, each point with its own t and noise."""
    probes = [shared_noise(toy_batch(pairs, dtype, seed=s), models.schedule) for s in range(points)]
    return replace(
        probes[0],
        xt=torch.stack([p.xt for p in probes], 2),
        t=torch.stack([p.t for p in probes], 1),
        target=torch.stack([p.target for p in probes], 2),
        weight=torch.rand(pairs, points, dtype=torch.float64),
    )


def weighted_dpo(evidence: Evidence) -> Score:
    """A score over points: DPO on the weighted mean of the margins."""
    mean = (evidence.weight * evidence.margin).mean(-1)
    return DiffusionDPO(beta=50.0).score(Evidence(policy=mean, reference=torch.zeros_like(mean)))


def gradients(models: ToyModels) -> list[torch.Tensor]:
    return [p.grad for p in models.net.parameters()]


def test_errors_are_the_mean_squared_difference_by_hand() -> None:
    models = toy_models(apart=0.1)
    probe = shared_noise(toy_batch(2), models.schedule)
    evidence = measure(models, probe)
    for side in range(2):
        for pair in range(2):
            cond = probe.cond.select(side=slice(side, side + 1), pair=slice(pair, pair + 1)).flatten()
            out = models.net(probe.xt[side, pair][None], probe.t[pair][None], cond)[0]
            expected = ((out - probe.target[side, pair]) ** 2).sum() / out.numel()
            torch.testing.assert_close(evidence.policy[side, pair], expected)
    assert evidence.policy.requires_grad
    assert not evidence.reference.requires_grad


def test_one_forward_of_each_network_and_none_of_an_unneeded_reference() -> None:
    models = toy_models()
    measure(models, shared_noise(toy_batch(), models.schedule))
    assert (models.policy_calls, models.reference_calls) == (1, 1)
    evidence = measure(models, shared_noise(toy_batch(), models.schedule, needs_reference=False))
    assert (models.policy_calls, models.reference_calls) == (2, 1)
    assert evidence.reference is None
    with pytest.raises(ValueError, match="no reference errors"):
        _ = evidence.margin


def test_equal_weights_give_a_margin_of_exactly_zero() -> None:
    for dtype in (torch.float32, torch.float64):
        models = toy_models(dtype)
        evidence = measure(models, shared_noise(toy_batch(4, dtype), models.schedule))
        assert torch.equal(evidence.margin, torch.zeros_like(evidence.margin))


def test_losses_are_float32_or_better_whatever_the_network_answers() -> None:
    models = toy_models(torch.float32)
    probe = shared_noise(toy_batch(2, torch.float32), models.schedule)
    assert errors(lambda x, t, c: models.net(x, t, c).bfloat16(), probe).dtype == torch.float32


@pytest.mark.parametrize("chunk", [1, 2, 3, 4])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_two_pass_gradient_is_the_direct_gradient(chunk: int, dtype: torch.dtype, tolerance: float) -> None:
    direct, chunked = toy_models(dtype, apart=0.05), toy_models(dtype, apart=0.05)
    probe = many_points(direct, 7, dtype=dtype)
    _, expected = measure_and_backward(direct, probe, weighted_dpo, scale=0.25)
    split = replace(probe, points_per_forward=chunk)
    _, got = measure_and_backward(chunked, split, weighted_dpo, scale=0.25)
    torch.testing.assert_close(got.loss, expected.loss, rtol=0, atol=tolerance)
    for a, b in zip(gradients(chunked), gradients(direct), strict=True):
        assert float((a - b).abs().max()) <= tolerance * float(b.abs().max().clamp(min=1))


def test_two_pass_asks_each_point_twice_and_the_reference_once() -> None:
    models = toy_models()
    measure_and_backward(models, replace(many_points(models, 6), points_per_forward=2), weighted_dpo)
    assert (models.policy_calls, models.reference_calls) == (6, 3)


def test_two_pass_keeps_the_memory_of_one_chunk() -> None:
    def peak_saved(points: int) -> int:
        models, kept, peak = toy_models(), 0, 0

        def pack(x: torch.Tensor) -> torch.Tensor:
            nonlocal kept, peak
            kept += x.numel() * x.element_size()
            peak = max(peak, kept)
            return x

        def released(loss: torch.Tensor) -> None:
            nonlocal kept
            loss.backward()
            kept = 0

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            measure_and_backward(
                models, replace(many_points(models, points), points_per_forward=2), weighted_dpo, backward=released
            )
        return peak

    assert peak_saved(40) <= 1.05 * peak_saved(8)


def test_only_the_last_chunk_synchronises() -> None:
    models, quiet = toy_models(), 0
    order: list[str] = []

    @contextmanager
    def no_sync():
        nonlocal quiet
        quiet += 1
        order.append("quiet")
        yield

    def backward(loss: torch.Tensor) -> None:
        order.append("backward")
        loss.backward()

    measure_and_backward(
        models,
        replace(many_points(models, 6), points_per_forward=2),
        weighted_dpo,
        backward=backward,
        no_sync=no_sync,
    )
    assert order == ["quiet", "backward", "quiet", "backward", "backward"]


def test_guidance_is_two_answers_combined() -> None:
    models = toy_models()
    batch = toy_batch(2)
    null = batch.cond.map(torch.zeros_like)
    plain = shared_noise(batch, models.schedule)
    guided = replace(plain, guidance=3.0, uncond=null)
    flat = plain.xt.flatten(0, 1)
    t = plain.t.repeat(2)
    c, u = models.net(flat, t, plain.cond.flatten()), models.net(flat, t, null.flatten())
    expected = ((u + 3.0 * (c - u) - plain.target.flatten(0, 1)) ** 2).mean((1, 2, 3)).view(2, 2)
    torch.testing.assert_close(errors(models.policy, guided), expected)
    with pytest.raises(ValueError, match="null prompt"):
        errors(models.policy, replace(plain, guidance=3.0))


def shared_point(models: ToyModels, points: int | None, dtype: torch.dtype) -> Probe:
    """A guided probe whose sides share x_t and conditioning, as expanded views, but not their targets."""
    if points is None:
        probe = shared_noise(toy_batch(3, dtype), models.schedule)
    else:
        probe = many_points(models, points, dtype=dtype)
    target = torch.stack([probe.target[0], probe.target[1].roll(1, 0)])
    uncond = probe.cond.map(lambda x: torch.full_like(x[:1], 0.3).expand(x.shape))
    return replace(probe, xt=probe.xt[:1].expand(probe.xt.shape), target=target, guidance=4.0, uncond=uncond)


@pytest.mark.parametrize(("points", "per_forward"), [(None, None), (5, None), (5, 2)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
def test_sides_that_ask_the_same_are_asked_once(
    points: int | None, per_forward: int | None, dtype: torch.dtype, tolerance: float
) -> None:
    """Half the rows in as many calls; errors, loss and gradients are those of the sides asked one by one."""
    found = []
    for clone in (False, True):
        models, rows = toy_models(dtype, apart=0.05), []
        models.net.register_forward_pre_hook(lambda _, args, rows=rows: rows.append(len(args[0])))
        models.frozen.register_forward_pre_hook(lambda _, args, rows=rows: rows.append(len(args[0])))
        probe = replace(shared_point(models, points, dtype), points_per_forward=per_forward)
        if clone:
            probe = replace(probe, xt=probe.xt.clone())
        score = DiffusionDPO(beta=50.0).score if points is None else weighted_dpo
        evidence, scored = measure_and_backward(models, probe, score)
        found.append((evidence, scored, gradients(models), rows))
    once, twice = found
    assert [2 * n for n in once[3]] == twice[3]
    for a, b in ((once[0].policy, twice[0].policy), (once[0].reference, twice[0].reference)):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(once[1].loss, twice[1].loss, rtol=tolerance, atol=10 * tolerance)
    for a, b in zip(once[2], twice[2], strict=True):
        assert float((a - b).abs().max()) <= 10 * tolerance * float(b.abs().max().clamp(min=1))


@pytest.mark.parametrize("which", ["cond", "uncond"])
def test_sides_told_different_things_are_asked_apart(which: str) -> None:
    models = toy_models()
    probe = shared_point(models, None, torch.float64)
    sides = getattr(probe, which).map(lambda x: torch.stack([x[0], x[1] + 1]))
    seen = errors(models.policy, replace(probe, **{which: sides}))
    expected = errors(models.policy, replace(probe, xt=probe.xt.clone(), **{which: sides}))
    assert torch.equal(seen, expected)


def test_v_prediction_is_measured_in_its_own_space() -> None:
    models = toy_models(prediction_type="v_prediction")
    batch = toy_batch(2)
    probe = shared_noise(batch, models.schedule)
    noise = models.schedule.implied_noise(batch.latents, probe.xt, probe.t.expand(2, 2))
    t = probe.t.expand(2, 2)
    torch.testing.assert_close(probe.target, models.schedule.v_from_eps(noise, probe.xt, t), rtol=0, atol=1e-9)


def test_a_reference_asked_for_several_micro_batches_receives_all_that_each_alone_would() -> None:
    """Prompts, pooled text, time ids and users come along; the errors are those of each micro-batch by itself."""
    models = toy_models()
    told: list[Conditioning] = []
    inner = models.frozen.forward

    def listen(xt: torch.Tensor, t: torch.Tensor, cond: Conditioning) -> torch.Tensor:
        told.append(cond)
        return inner(xt, t, cond) + cond.user.mean(1)[:, None, None, None]

    models.frozen.forward = listen  # type: ignore[method-assign]
    probes = []
    for seed in (0, 1):
        batch = toy_batch(2, seed=seed)
        g = torch.Generator().manual_seed(seed)
        extra = {name: torch.randn(1, 2, 3, generator=g).expand(2, -1, -1) for name in ("pooled", "time_ids", "user")}
        probes.append(shared_noise(replace(batch, cond=replace(batch.cond, **extra)), models.schedule))
    alone = [errors(models.reference, probe) for probe in probes]
    told.clear()
    together = ask_reference(models, probes)
    assert len(told) == 1
    for name in ("prompt_embeds", "pooled", "time_ids", "user"):
        assert getattr(told[0], name).shape[0] == 8
    for probe, expected in zip(together, alone, strict=True):
        torch.testing.assert_close(probe.reference, expected)
