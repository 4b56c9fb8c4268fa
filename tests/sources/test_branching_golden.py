"""SPO's branching chain against the released code: schedule, pools, comparison and both samplers as whole control
flows with recorded draws (tests/golden/README.md)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from diffalign.engine import ddim
from diffalign.sources.branching import Branching, Calls, branching_chain, branchings, chain_levels, compare_candidates
from tests.golden_spo import spo_case, spo_schedule

EXACT = {"rtol": 0, "atol": 1e-9}
SAMPLERS = {
    "sampler_sd15_n4": "every_step",
    "sampler_sdxl_n2_inner3": "inner_steps",
    "sampler_sdxl_n2_inner0_quirk": "inner_steps",
}


def test_schedule_of_the_sampler() -> None:
    case = spo_case("ddim_schedule_table_20_steps_eta1")
    s, out = spo_schedule(case), case["outputs"]
    levels = chain_levels(s, 20)
    assert levels.tolist() == [*case["inputs"]["timesteps"].tolist(), 0]
    assert levels[1:].tolist() == case["inputs"]["prev_timesteps"].tolist()
    t, t_prev = levels[:-1], levels[1:]
    torch.testing.assert_close(s.alpha_bar(t), out["alphas_cumprod_t"], **EXACT)
    torch.testing.assert_close(s.alpha_bar(t_prev), out["alphas_cumprod_prev"], **EXACT)
    torch.testing.assert_close(ddim.variance(s, t, t_prev).sqrt(), out["std"], **EXACT)
    _, q = ddim.mean_of_prediction(s, t, t_prev, 1.0)
    torch.testing.assert_close(q, out["mean_eps_coef"], **EXACT)
    torch.testing.assert_close(q**2 / (2 * out["std"] ** 2), out["pair_weight"], **EXACT)


@pytest.mark.parametrize("name", ["pool_f64_n4_t751", "pool_f64_n1_t1"])
def test_pool_of_one_mean(name: str) -> None:
    """A chain of one branching step, cut from the sampling grid."""
    case = spo_case(name)
    given, out, n = case["inputs"], case["outputs"], case["params"]["num_sample_per_step"]
    seen: list[Tensor] = []
    calls = Calls(
        lambda x, t, rows: given["model_output"],
        lambda latents, t: seen.append(latents) or latents.flatten(2).sum(2),
        lambda i, members: given["noise"].reshape(n, *given["sample"].shape),
        lambda i, members: pytest.fail("nothing is continued"),
    )
    levels = torch.stack([given["timestep"], out["prev_timestep"]])
    branching = Branching(levels, (0,), num_candidates=n, eta=1.0, threshold=0.0)
    (verdict,) = branching_chain(spo_schedule(case), given["sample"], calls, branching)
    torch.testing.assert_close(seen[0], out["prev_sample"].reshape(seen[0].shape), **EXACT)
    torch.testing.assert_close(verdict.path[0, :, 0], given["sample"], **EXACT)
    t = given["timestep"].expand(len(given["sample"]))
    x0 = spo_schedule(case).predict_x0(given["model_output"], given["sample"], t)
    torch.testing.assert_close(x0, out["pred_original_sample"], **EXACT)


def test_comparison_rule() -> None:
    case = spo_case("compare_threshold_0.3")
    chosen, rejected, valid, _ = compare_candidates(case["inputs"]["scores"], case["params"]["threshold"])
    assert torch.equal(valid, case["outputs"]["valid"])
    differ = slice(1, None)  # the first pool is all ties
    assert torch.equal(chosen[differ], case["outputs"]["indices"][0, differ])
    assert torch.equal(rejected[differ], case["outputs"]["indices"][1, differ])


class Replayed:
    """The stub networks and the recorded draws of a sampler case."""

    def __init__(self, case: dict[str, Any]) -> None:
        self.given, self.params, self.schedule = case["inputs"], case["params"], spo_schedule(case)
        self.draws, self.indices = list(self.given["noise_draws"]), list(self.given["random_index_draws"])
        self.batch_sizes: list[int] = []
        self.judged: list[int] = []
        self.scores: list[Tensor] = []

    def told(self, prefix: str) -> Tensor:
        embeds = self.given[f"{prefix}prompt_embeds"].mean((1, 2))
        pooled = self.given.get("pooled" if not prefix else "negative_pooled")
        if pooled is None:
            return embeds
        return embeds + pooled.mean(1) + 0.001 * (4 + 4 + 0 + 0 + 4 + 4) / 6

    def predict(self, x: Tensor, t: Tensor, rows: Tensor) -> Tensor:
        self.batch_sizes.append(2 * len(x))
        a_bar = self.schedule.alpha_bar(t)[:, None, None, None]

        def eps(m: Tensor) -> Tensor:
            return 0.95 * (1 - a_bar).sqrt() * x + 0.1 * torch.sin(3 * x) + 0.05 * m[rows][:, None, None, None]

        null, text = eps(self.told("negative_")), eps(self.told(""))
        return null + self.params["guidance_scale"] * (text - null)

    def judge(self, latents: Tensor, t: int) -> Tensor:
        ids = self.given["preference_input_ids"].double().mean(1)
        seen = (latents / 0.5 * self.given["pattern"]).sum((2, 3, 4))
        score = 20 + 0.05 * ids + self.params["score_scale"] * seen + 0.001 * t
        self.judged.append(t)
        self.scores.append(score)
        return score

    def noise(self, i: int, members: int) -> Tensor:
        draw = self.draws.pop(0)
        return draw.reshape(members, -1, *draw.shape[-3:])

    def pick(self, i: int, members: int) -> Tensor:
        return self.indices.pop(0)


@pytest.mark.parametrize("name", SAMPLERS)
def test_whole_sampler(name: str) -> None:
    case = spo_case(name)
    replayed, params, out = Replayed(case), case["params"], case["outputs"]
    steps, n = params["num_inference_steps"], params["num_samples_each_step"]
    inner = params.get("num_inner_step", 0)
    branching = Branching(
        levels=chain_levels(replayed.schedule, steps),
        at=branchings(SAMPLERS[name], params["divert_start_step"], steps, inner),
        num_candidates=n,
        eta=params["eta"],
        threshold=params["threshold"],
    )
    calls = Calls(replayed.predict, replayed.judge, replayed.noise, replayed.pick)
    verdicts = branching_chain(replayed.schedule, case["inputs"]["x_T"], calls, branching)
    timesteps, current, following, prompts = [], [], [], []
    for verdict in verdicts:
        for k, t in enumerate(verdict.levels[:-1].tolist()):
            for prompt in verdict.valid.nonzero().flatten().tolist():
                timesteps.append(t)
                current.append(verdict.path[:, prompt, k])
                following.append(verdict.path[:, prompt, k + 1])
                prompts.append(case["inputs"]["prompt_embeds"][prompt])
    assert replayed.draws == []
    assert replayed.indices == []
    assert replayed.batch_sizes == out["unet_batch_sizes"]
    assert replayed.judged == out["score_timesteps"]
    for got, expected in zip(replayed.scores, out["scores"], strict=True):
        torch.testing.assert_close(got, expected, **EXACT)
    assert timesteps == out["timesteps"].flatten().tolist()
    shared = current if out["current_latents"].shape[1] == 2 else [x[:1] for x in current]
    torch.testing.assert_close(torch.stack(shared), out["current_latents"], **EXACT)
    torch.testing.assert_close(torch.stack(following), out["next_latents"], **EXACT)
    assert torch.equal(torch.stack(prompts)[:, None], out["prompt_embeds"])
