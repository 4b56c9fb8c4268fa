"""SPO against numbers computed by the authors' own code (tests/golden/README.md)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from diffalign import NoiseSchedule
from diffalign.engine import ddim
from diffalign.engine.measure import measure
from diffalign.objectives.spo import SPO
from diffalign.types import Conditioning, Evidence, PairBatch, Transitions
from tests.golden_spo import spo_case, spo_schedule


@pytest.mark.parametrize("name", ["f64_eta1", "f32_eta1", "f64_vpred", "f64_sample_pred"])
def test_log_density_of_a_step_and_its_slope(name: str) -> None:
    case = spo_case(f"logprob_{name}")
    given, out, s = case["inputs"], case["outputs"], spo_schedule(case)
    answer, x, t = given["model_output"].requires_grad_(), given["sample"], given["timestep"]
    t_prev = (t - 1000 // case["params"]["num_inference_steps"]).clamp(min=0)
    step = ddim.step(s, s.to_eps(answer, x, t), x, t, t_prev, case["params"]["eta"], x0=s.to_x0(answer, x, t))
    log_p = ddim.log_density(given["prev_sample"], step.mean, step.std)
    (slope,) = torch.autograd.grad(log_p.sum(), answer)
    single = x.dtype == torch.float32
    # 1e-7: the release evaluates log √2π in float32
    close = {"rtol": 1e-5, "atol": 1e-6} if single else {"rtol": 0, "atol": 1e-7}
    torch.testing.assert_close(log_p, out["log_prob"], check_dtype=False, **close)
    torch.testing.assert_close(slope, out["grad_model_output"], **(close if single else {"rtol": 0, "atol": 1e-9}))


def test_loss_of_densities() -> None:
    """Densities reach the score as errors: with w = 1, an error is a log-density with the opposite sign."""
    case = spo_case("loss_beta10_eps0.1")
    given, out = case["inputs"], case["outputs"]
    policy = -torch.stack([given["logp_win"], given["logp_lose"]])
    reference = -torch.stack([given["logp_ref_win"], given["logp_ref_lose"]])
    policy.requires_grad_()
    objective = SPO(beta=case["params"]["beta"], clip=case["params"]["eps"])
    score = objective.score(Evidence(policy, reference, weight=torch.ones(6, dtype=torch.float64)))
    score.loss.mean().backward()
    torch.testing.assert_close(score.loss, out["loss_per_row"], rtol=0, atol=1e-9)
    torch.testing.assert_close(score.loss.mean(), out["loss"], rtol=0, atol=1e-9)
    ratios = (torch.stack([score.metrics["rewards/chosen"], score.metrics["rewards/rejected"]]) / 10).exp()
    torch.testing.assert_close(ratios, torch.stack([out["ratio_win"], out["ratio_lose"]]), rtol=0, atol=1e-9)
    slopes = torch.stack([out["grad_logp_win"], out["grad_logp_lose"]])
    torch.testing.assert_close(-policy.grad, slopes, rtol=0, atol=1e-9)


@dataclass
class Recorded:
    """Networks that give the recorded answers, conditional before unconditional, chosen before rejected."""

    schedule: NoiseSchedule
    answers: dict[str, Tensor]

    def policy(self, xt: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        return self._answer("theta", xt)

    def reference(self, xt: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        return self._answer("ref", xt)

    def _answer(self, who: str, xt: Tensor) -> Tensor:
        rows = [self.answers[f"{who}_{prompt}_{side}"] for prompt in ("text", "uncond") for side in ("win", "lose")]
        assert torch.equal(xt, torch.cat([self.answers["x_t_win"], self.answers["x_t_lose"]] * 2))
        return torch.cat(rows)


@pytest.mark.parametrize("name", ["e2e_diff_xt_f64", "e2e_diff_xt_clipped_f64"])
def test_from_answers_to_loss_and_slopes(name: str) -> None:
    case = spo_case(name)
    given: dict[str, Any] = case["inputs"]
    out, params, t = case["outputs"], case["params"], given["timestep"]
    policy = [k for k in given if k.startswith("theta_")]
    for key in policy:
        given[key].requires_grad_()
    sides = [torch.stack([given[f"{which}_win"], given[f"{which}_lose"]]) for which in ("x_t", "x_next")]
    told = Conditioning(torch.zeros(1, len(t), 1, 1).expand(2, -1, -1, -1))
    batch = PairBatch(
        latents=sides[1],
        cond=told,
        keys=torch.arange(len(t)),
        uncond=told,
        transitions=Transitions(sides[0], sides[1], t, (t - 1000 // params["num_inference_steps"]).clamp(min=0)),
    )
    objective = SPO(params["beta"], params["eps"], params["guidance_scale"], params["eta"])
    models = Recorded(spo_schedule(case), given)
    evidence = measure(models, objective.probe(batch, models))
    score = objective.score(evidence)
    log_ratio = -(evidence.weight * evidence.margin)
    expected = [out[f"logp_{side}"] - out[f"logp_ref_{side}"] for side in ("win", "lose")]
    torch.testing.assert_close(log_ratio, torch.stack(expected), rtol=0, atol=1e-9)
    torch.testing.assert_close(score.loss.mean(), out["loss"], rtol=0, atol=1e-9)
    score.loss.mean().backward()
    for key in policy:
        torch.testing.assert_close(given[key].grad, out[f"grad_{key}"], rtol=0, atol=1e-9)
