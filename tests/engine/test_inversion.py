"""Inversion against closed forms, diffusers' schedulers and its own convergence order; rows that finish early."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import diffusers
import pytest
import torch
from torch import Tensor

from diffalign import NoiseSchedule
from diffalign.engine import ddim
from diffalign.engine.inversion import (
    Ascent,
    FixedPoint,
    Predict,
    Refinement,
    ReNoise,
    arrive,
    ascend,
    exact_ascent,
    merged,
    released_ascent,
    strided_ascent,
    transition_target,
)
from diffalign.engine.predictor import predictor
from diffalign.types import Conditioning
from tests.engine.test_ddim import flow_to, gaussian_eps
from tests.toy import SDXL_CONFIG, toy_batch, toy_models

EVERY_T = torch.arange(1000)
REFINED = [None, ReNoise(1), ReNoise(3), FixedPoint(1e-12)]


def sdxl(**changes: object) -> NoiseSchedule:
    return NoiseSchedule.from_config({**SDXL_CONFIG, **changes})


def rowwise(eps_fn: ddim.EpsFn) -> Predict:
    return lambda x, t, rows: eps_fn(x, t)


def mean_square(noise: Tensor) -> Tensor:
    return noise.square().mean((1, 2, 3))


def test_the_implied_noise_of_a_known_noise_is_that_noise_at_every_t() -> None:
    """|τ|² = 1 wherever the network answers with unit noise, t ≤ 2 and t ≥ 901 included."""
    s = sdxl()
    x0, noise = torch.randn(2, 1000, 2, 4, 4, dtype=torch.float64)
    noise = noise / mean_square(noise).sqrt()[:, None, None, None]
    xt = ddim.invert(s, lambda x, t: noise, x0, EVERY_T)
    found = s.implied_noise(x0, xt, EVERY_T)
    torch.testing.assert_close(found, noise, rtol=0, atol=1e-9)
    torch.testing.assert_close(mean_square(found), torch.ones(1000, dtype=torch.float64), rtol=0, atol=1e-9)


def test_the_released_grid_gets_the_noise_level_wrong() -> None:
    s = sdxl()
    x0, noise = torch.randn(2, 1000, 2, 4, 4, dtype=torch.float64)
    xt = arrive(s, lambda x, t, rows: noise[rows], x0, released_ascent(s, EVERY_T, 10))
    found = mean_square(s.implied_noise(x0, xt, EVERY_T))
    assert float(found.min()) < 0.2  # and no index error at t > 901
    assert torch.equal(xt[:2], x0[:2])  # nothing is below the first level


@pytest.mark.parametrize("data_std", [0.3, 1.0])
def test_the_noise_found_in_gaussian_data_is_the_closed_form(data_std: float) -> None:
    """For N(0, d²) data the flow gives τ = x_0 (√(ᾱd² + 1−ᾱ)/d − √ᾱ)/√(1−ᾱ): below unit variance unless √(1−ᾱ) ≫ d."""
    s = sdxl()
    t = torch.tensor([0, 1, 2, 30, 100, 300, 600, 901, 950, 999])
    x0 = torch.full((len(t), 1, 1, 1), data_std, dtype=torch.float64)
    exact = s.implied_noise(x0, flow_to(s, x0, t, data_std), t)
    errors = [
        (s.implied_noise(x0, ddim.invert(s, gaussian_eps(s, data_std), x0, t, stride), t) - exact).abs().flatten()
        for stride in (8, 4, 2, 1)
    ]
    assert float(errors[-1][3:].max()) < 0.02
    for coarse, fine in pairwise(errors):
        assert bool((fine[3:] < coarse[3:]).all())
    # One step of one timestep is all that fits below t = 0; Euler's error there is at most the flow's own noise.
    assert bool((errors[-1][:3] <= exact[:3].abs().flatten() * 1.01).all())


@pytest.mark.parametrize("refine", [ReNoise(1), FixedPoint(1e-12)])
def test_refined_inversion_converges_with_order_one_to_the_flow(refine: Refinement) -> None:
    s = sdxl(num_train_timesteps=20000, beta_start=4e-5, beta_end=6e-4)
    x0, t = torch.randn(2, 4, 2, 2, dtype=torch.float64), torch.tensor([19999, 8000])
    strides = torch.tensor([400, 200, 100, 50])
    exact = flow_to(s, x0, t, 0.7)
    errors = torch.stack(
        [(ddim.invert(s, gaussian_eps(s, 0.7), x0, t, int(h), refine) - exact).abs().max() for h in strides]
    )
    slopes = errors.log().diff() / strides.double().log().diff()
    assert slopes[-1] == pytest.approx(1.0, abs=0.15)


def walk_down(s: NoiseSchedule, ascent: Ascent, eps_fn: ddim.EpsFn, x: Tensor) -> Tensor:
    """DDIM sampling down the levels of an ascent that all rows take to its end."""
    to_one = replace(s, final_alpha_cumprod=ascent.clean)
    for k in reversed(range(ascent.high.shape[1])):
        high, low = ascent.high[:, k], ascent.low[:, k]
        x = ddim.step(to_one, eps_fn(x, high), x, high, low).prev
    return x


def test_fixed_point_inversion_is_undone_by_sampling() -> None:
    s = sdxl()
    ascent = exact_ascent(torch.tensor([999, 640]), torch.tensor([20, 20]))
    x0 = torch.ones(2, 4, 3, 3, dtype=torch.float64)
    eps_fn = gaussian_eps(s, 1.0)
    back = {
        name: walk_down(s, ascent, eps_fn, arrive(s, rowwise(eps_fn), x0, ascent, refine))
        for name, refine in {"plain": None, "exact": FixedPoint(1e-13, 500)}.items()
    }
    torch.testing.assert_close(back["exact"], x0, rtol=0, atol=1e-9)
    assert float((back["plain"] - x0).abs().max()) > 1e-3


def test_round_trip_is_diffusers_round_trip() -> None:
    """Up with DDIMInverseScheduler, down with DDIMScheduler, 50 steps: ours is the same to float32 of its table."""
    up = diffusers.DDIMInverseScheduler.from_config({**SDXL_CONFIG, "clip_sample": False})
    down = diffusers.DDIMScheduler.from_config({**SDXL_CONFIG, "clip_sample": False})
    up.set_timesteps(50)
    down.set_timesteps(50)
    s = NoiseSchedule.from_diffusers(down)
    eps_fn, x0 = gaussian_eps(s, 1.0), torch.randn(2, 4, 3, 3, dtype=torch.float64)
    theirs = x0
    for t in up.timesteps.tolist():
        theirs = up.step(eps_fn(theirs, torch.full((2,), t)), t, theirs).prev_sample
    whole = released_ascent(s, torch.full((2,), 1000), 50)
    assert whole.high[0].tolist() == up.timesteps.tolist()
    ours = arrive(s, rowwise(eps_fn), x0, whole)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)

    returned = theirs
    for t in down.timesteps.tolist():
        returned = down.step(eps_fn(returned, torch.full((2,), t)), t, returned).prev_sample
    their_error = (returned - x0).abs().max()
    our_error = (ddim.sample(s, eps_fn, ours, 50) - x0).abs().max()
    assert float(our_error) == pytest.approx(float(their_error), rel=1e-3)
    solved = arrive(s, rowwise(eps_fn), x0, whole, FixedPoint(1e-12, 200))
    assert float((ddim.sample(s, eps_fn, solved, 50) - x0).abs().max()) < 1e-3 * float(their_error)


def test_a_step_is_diffusers_inverse_step_for_noise_alone() -> None:
    """A velocity is turned into noise at the level asked at, here, and at the latent's own level there."""
    apart = {}
    for kind in ("epsilon", "v_prediction"):
        config = {**SDXL_CONFIG, "prediction_type": kind, "clip_sample": False}
        for steps in (10, 50, 250):
            up = diffusers.DDIMInverseScheduler.from_config(config)
            up.set_timesteps(steps)
            s = NoiseSchedule.from_diffusers(up)
            theirs = x0 = torch.ones(1, 1, 1, 1, dtype=torch.float64)

            def answer(x: Tensor, t: Tensor, rows: Tensor | None = None, s: NoiseSchedule = s) -> Tensor:
                eps = gaussian_eps(s, 0.5)(x, t)
                return eps if s.prediction_type == "epsilon" else s.v_from_eps(eps, x, t)

            for t in up.timesteps.tolist():
                theirs = up.step(answer(theirs, torch.full((1,), t)), t, theirs).prev_sample
            ours = arrive(s, answer, x0, released_ascent(s, torch.full((1,), 1000), steps))
            apart[kind, steps] = abs(float(theirs / ours) - 1)
    assert max(apart["epsilon", n] for n in (10, 50, 250)) < 1e-5
    assert apart["v_prediction", 10] > 3 * apart["v_prediction", 50] > 9 * apart["v_prediction", 250] > 1e-4, apart


@pytest.mark.parametrize("refine", REFINED)
def test_mixed_t_in_one_batch_is_the_singletons(refine: Refinement | None) -> None:
    s = sdxl()
    t = torch.tensor([0, 2, 99, 100, 437, 905, 999])
    x0 = torch.randn(7, 4, 5, 5, dtype=torch.float64)
    added = 0.01 * torch.randn(10, 7, 4, 5, 5, dtype=torch.float64)
    predict = rowwise(gaussian_eps(s, 1.0))
    batch = arrive(s, predict, x0, strided_ascent(t, 100), refine, added)
    for i in range(7):
        one = slice(i, i + 1)
        alone = arrive(s, predict, x0[one], strided_ascent(t[one], 100), refine, added[:, one])
        torch.testing.assert_close(batch[one], alone, rtol=0, atol=1e-13)


def test_arrived_rows_drop_out_and_none_is_asked_in_vain() -> None:
    s, asked = sdxl(), []

    def predict(x: Tensor, t: Tensor, rows: Tensor) -> Tensor:
        asked.append((rows.tolist(), t.tolist()))
        return x

    ascent = strided_ascent(torch.tensor([250, 99, 999, 100]), 100)
    assert ascent.steps.tolist() == [3, 1, 10, 2]
    arrive(s, predict, torch.randn(4, 1, 2, 2), ascent)
    assert len(asked) == 10
    assert sum(len(rows) for rows, _ in asked) == 3 + 1 + 10 + 2
    assert asked[0] == ([0, 1, 2, 3], [82, 99, 99, 49])
    assert asked[1][0] == [0, 2, 3]
    assert asked[-1] == ([2], [999])


def test_refinements_cost_what_they_say() -> None:
    s, rows_asked = sdxl(), 0

    def predict(x: Tensor, t: Tensor, rows: Tensor) -> Tensor:
        nonlocal rows_asked
        rows_asked += len(rows)
        return 0.1 * x

    ascent = strided_ascent(torch.tensor([250, 999]), 200)
    for refine, expected in ((ReNoise(1), 2 * 7), (ReNoise(3), 4 * 7), (FixedPoint(0.0, 2), 3 * 7)):
        rows_asked = 0
        arrive(s, predict, torch.randn(2, 1, 2, 2), ascent, refine)
        assert rows_asked == expected


def test_fixed_point_rows_stop_one_by_one() -> None:
    """A row whose prediction does not depend on x is done after one iteration; the others go on."""
    s, asked = sdxl(), []
    slope = torch.tensor([0.0, 0.5])

    def predict(x: Tensor, t: Tensor, rows: Tensor) -> Tensor:
        asked.append(rows.tolist())
        return slope[rows, None, None, None] * x

    ascent = exact_ascent(torch.tensor([400, 400]), torch.tensor([1, 1]))
    (rise,) = ascend(s, predict, torch.ones(2, 1, 2, 2, dtype=torch.float64), ascent, FixedPoint(1e-6, 100))
    assert asked[:3] == [[0, 1], [0, 1], [1]]
    assert len(asked) < 100
    assert rise.residual is not None
    assert rise.residual.max() <= 1e-6
    torch.testing.assert_close(predict(rise.after, rise.high, rise.rows), rise.eps, rtol=0, atol=1e-6)


def test_a_trajectory_is_a_chain_without_graph() -> None:
    models, batch = toy_models(), toy_batch(3)
    predict = predictor(models.policy, batch.cond.flatten())
    x0 = batch.latents.flatten(0, 1)
    ascent = exact_ascent(torch.full((6,), 999), torch.full((6,), 8))
    rises = list(ascend(models.schedule, predict, x0, ascent))
    assert [r.high[0].item() for r in rises] == [124, 249, 374, 499, 624, 749, 874, 999]
    assert torch.equal(rises[0].before, x0)
    for one, following in pairwise(rises):
        assert torch.equal(one.after, following.before)
    assert not any(r.after.requires_grad for r in rises)
    assert float(rises[0].alpha_bar[0][0]) == 1.0
    assert models.policy_calls == 8


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("refine", [None, ReNoise(1)])
def test_prediction_types_invert_alike(prediction_type: str, refine: Refinement | None) -> None:
    s = sdxl(prediction_type=prediction_type)
    in_noise, t = gaussian_eps(s, 0.8), torch.tensor([3, 450, 999])

    def predict(x: Tensor, t: Tensor, rows: Tensor) -> Tensor:
        eps = in_noise(x, t)
        return s.target(s.predict_x0(eps, x, t), eps, t)

    x0 = torch.randn(3, 4, 3, 3, dtype=torch.float64)
    found = arrive(s, predict, x0, strided_ascent(t, 100), refine)
    torch.testing.assert_close(found, ddim.invert(s, in_noise, x0, t, 100, refine), rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("prediction_type", "zero_snr"),
    [("epsilon", False), ("v_prediction", False), ("v_prediction", True), ("sample", False), ("sample", True)],
)
def test_the_transition_target_leads_back(prediction_type: str, zero_snr: bool) -> None:
    s = sdxl(prediction_type=prediction_type, rescale_betas_zero_snr=zero_snr)
    to_one = replace(s, final_alpha_cumprod=1.0)
    answer = torch.randn(4, 2, 4, 3, 3, dtype=torch.float64)
    ascent = exact_ascent(torch.full((2,), 999), torch.full((2,), 4))
    for rise in ascend(s, lambda x, t, rows: answer[3 - int(t[0]) // 250], torch.randn_like(answer[0]), ascent):
        target = transition_target(s, rise.before, rise.after, *rise.alpha_bar, rise.high)
        eps, x0 = s.to_eps(target, rise.after, rise.high), s.to_x0(target, rise.after, rise.high)
        low = ascent.low[rise.rows, rise.index]
        back = ddim.step(to_one, eps, rise.after, rise.high, low, x0=x0).prev
        torch.testing.assert_close(back, rise.before, rtol=0, atol=1e-9)
        noise = ddim.transition_noise(to_one, rise.after, rise.before, rise.high, low)
        torch.testing.assert_close(noise, rise.eps, rtol=0, atol=1e-8)


def test_merged_steps_are_one_transition_with_the_mean_noise_of_its_path() -> None:
    """x/√ᾱ moves by ε times the change of σ = √(1/ᾱ − 1), so the whole moves by the σ-weighted mean of the ε."""
    s, eps_fn = sdxl(), gaussian_eps(sdxl(), 0.8)
    x0 = torch.randn(2, 4, 3, 3, dtype=torch.float64)
    ascent = exact_ascent(torch.tensor([999, 999]), torch.tensor([12, 12]))
    rises = list(ascend(s, rowwise(eps_fn), x0, replace(ascent, steps=torch.tensor([12, 8]))))
    coarse = list(merged(rises, 4))
    assert [r.index for r in coarse] == [0, 1, 2]
    assert [r.rows.tolist() for r in coarse] == [[0, 1], [0, 1], [0]]
    assert [r.high[0].item() for r in coarse] == [332, 665, 999]
    assert torch.equal(coarse[1].before, coarse[0].after)
    part = rises[4:8]
    sigma = [(1 / a - 1).sqrt() for a in (part[0].alpha_bar[0], *(r.alpha_bar[1] for r in part))]
    widths = torch.stack(sigma).diff(dim=0)[:, 0]
    mean = sum(w * r.eps[0] for w, r in zip(widths, part, strict=True)) / widths.sum()
    torch.testing.assert_close(coarse[1].eps[0], mean)
    assert [id(r) for r in merged(rises, 1)] == [id(r) for r in rises]


def test_added_noise_is_the_sampling_steps() -> None:
    """σ² of the step from as far above the level just reached, as the released grid has it; none above T − 1."""
    s = sdxl()
    released = released_ascent(s, torch.tensor([1000]), 10)
    std = ddim.inversion_std(s, released, eta=0.1)
    above = (released.high + 100).clamp(max=999)
    torch.testing.assert_close(std, ddim.variance(s, above, released.high, 0.1).sqrt())
    assert float(ddim.inversion_std(s, strided_ascent(torch.tensor([999]), 100), 0.1)[0, -1]) == 0.0
    now, then = s.alphas_cumprod[401], s.alphas_cumprod[501]
    assert float(std[0, 4] ** 2) == pytest.approx(float(0.01 * (1 - now) / (1 - then) * (1 - then / now)))

    x0, predict = torch.zeros(1, 2, 100, 100, dtype=torch.float64), rowwise(lambda x, t: torch.zeros_like(x))
    z = torch.randn(10, *x0.shape, dtype=torch.float64)
    (first, *_) = ascend(s, predict, x0, released, added=std.T[..., None, None, None] * z)
    torch.testing.assert_close(first.after, std[0, 0] * z[0])


def test_guidance_combines_two_answers_of_the_surviving_rows() -> None:
    models = toy_models()
    batch = toy_batch(2)
    cond, null = batch.cond.flatten(), batch.cond.map(torch.zeros_like).flatten()
    x, t, rows = torch.randn(2, 4, 6, 6, dtype=torch.float64), torch.tensor([5, 900]), torch.tensor([3, 1])

    def alone(told: Conditioning) -> Tensor:
        return models.net(x, t, told.map(lambda e: e[rows]))

    guided = predictor(models.policy, cond, 2.5, null)(x, t, rows)
    assert models.policy_calls == 1
    torch.testing.assert_close(guided, alone(null) + 2.5 * (alone(cond) - alone(null)))
    torch.testing.assert_close(predictor(models.policy, cond)(x, t, rows), alone(cond))
    with pytest.raises(ValueError, match="null prompt"):
        predictor(models.policy, cond, 2.5)


def test_half_precision_latents_are_inverted_in_float32() -> None:
    s = sdxl()
    assert (
        ddim.invert(s, lambda x, t: x, torch.randn(1, 4, 2, 2).bfloat16(), torch.tensor([500])).dtype == torch.float32
    )


@pytest.mark.parametrize(
    ("t", "steps"), [(torch.tensor([5, -1]), torch.tensor([1, 1])), (torch.tensor([5]), torch.tensor([7]))]
)
def test_impossible_grids_are_named(t: Tensor, steps: Tensor) -> None:
    with pytest.raises(ValueError, match=r"between 1 and t \+ 1 steps"):
        exact_ascent(t, steps)
    with pytest.raises(ValueError, match="stride = 0"):
        strided_ascent(torch.tensor([5]), 0)
