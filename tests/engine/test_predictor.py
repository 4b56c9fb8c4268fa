"""The clean latent that a noisy one is heading for, against the authors' scheduler."""

from __future__ import annotations

import torch
from diffusers import DDIMScheduler

from diffalign.engine.predictor import predict_x0
from diffalign.engine.schedule import NoiseSchedule
from diffalign.types import Conditioning
from tests.golden_spo import spo_parts
from tests.toy import SDXL_CONFIG


def test_predicted_x0_is_the_authors() -> None:
    params, inputs, outputs = spo_parts("spm_data_pred_x0")
    schedule = NoiseSchedule.from_diffusers(DDIMScheduler(**params["scheduler"]))
    t = inputs["timestep"]
    xt = schedule.add_noise(inputs["x0"], inputs["noise"], t)
    torch.testing.assert_close(xt, outputs["x_t"], rtol=0, atol=1e-9)
    cond = Conditioning(torch.zeros(len(t), 1, 1))
    x0 = predict_x0(lambda x, t, c: inputs["model_output"], schedule, xt, t, cond)
    torch.testing.assert_close(x0, outputs["pred_original_sample"], rtol=0, atol=1e-9)


def test_guidance_goes_from_the_null_prompt_past_the_conditional() -> None:
    schedule = NoiseSchedule.from_config({**SDXL_CONFIG, "num_train_timesteps": 10})
    xt, t = torch.ones(2, 1, 1, 1), torch.tensor([3, 7])

    def network(x: torch.Tensor, t: torch.Tensor, cond: Conditioning) -> torch.Tensor:
        return cond.prompt_embeds[..., None].expand_as(x)

    cond, null = Conditioning(torch.full((2, 1, 1), 3.0)), Conditioning(torch.ones(2, 1, 1))
    x0 = predict_x0(network, schedule, xt, t, cond, 5.0, null)
    torch.testing.assert_close(x0, schedule.predict_x0(torch.full_like(xt, 1 + 5 * 2), xt, t))
