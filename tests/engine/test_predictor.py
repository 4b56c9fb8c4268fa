"""Guidance, and the clean latent that a prediction implies, against the scheduler of SPO's authors."""

from __future__ import annotations

import torch
from diffusers import DDIMScheduler

from diffalign.engine.measure import guided
from diffalign.engine.schedule import NoiseSchedule
from diffalign.types import Conditioning
from tests.golden_spo import spo_parts


def test_predicted_x0_is_the_authors() -> None:
    params, inputs, outputs = spo_parts("spm_data_pred_x0")
    schedule = NoiseSchedule.from_diffusers(DDIMScheduler(**params["scheduler"]))
    t = inputs["timestep"]
    xt = schedule.add_noise(inputs["x0"], inputs["noise"], t)
    torch.testing.assert_close(xt, outputs["x_t"], rtol=0, atol=1e-9)
    x0 = schedule.to_x0(inputs["model_output"], xt, t)
    torch.testing.assert_close(x0, outputs["pred_original_sample"], rtol=0, atol=1e-9)


def test_guidance_extrapolates_from_the_null_prompt() -> None:
    xt, t = torch.ones(2, 1, 1, 1), torch.tensor([3, 7])

    def network(x: torch.Tensor, t: torch.Tensor, cond: Conditioning) -> torch.Tensor:
        return cond.prompt_embeds[..., None].expand_as(x)

    cond, null = Conditioning(torch.full((2, 1, 1), 3.0)), Conditioning(torch.ones(2, 1, 1))
    assert guided(network, xt, t, cond, 5.0, null).tolist() == torch.full_like(xt, 1 + 5 * 2).tolist()
    assert guided(network, xt, t, cond, 1.0, null).tolist() == torch.full_like(xt, 3).tolist()
