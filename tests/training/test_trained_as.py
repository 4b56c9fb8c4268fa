"""Noise and null prompts in training that differ from those in sampling, as in some releases."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from diffalign.config.sections import ModelSection
from diffalign.errors import DiffalignError
from diffalign.models.loading.base import load_base
from diffalign.training.build import trained_as


def section(**settings: bool) -> ModelSection:
    return ModelSection(pretrained_model_name_or_path="x", **settings)


def test_a_base_is_trained_on_the_noise_that_is_set_and_sampled_with_its_own(tiny_sdxl: Path) -> None:
    base = load_base(str(tiny_sdxl))
    assert trained_as(base, section()) is base
    turbo = trained_as(base, section(rescale_betas_zero_snr=True))
    assert float(base.schedule.alphas_cumprod[-1]) > 0
    assert float(turbo.schedule.alphas_cumprod[-1]) == 0
    assert turbo.scheduler_config == base.scheduler_config
    # the release's own statements (train.py: enforce_zero_terminal_snr), in float64
    root = base.schedule.alphas_cumprod.sqrt()
    root = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
    torch.testing.assert_close(turbo.schedule.alphas_cumprod, root**2, rtol=0, atol=1e-12)


@pytest.mark.parametrize("zeros", [True, False])
def test_the_null_prompt_of_training_can_be_set(tiny_sdxl: Path, zeros: bool) -> None:
    base = load_base(str(tiny_sdxl))
    made = trained_as(base, section(force_zeros_for_empty_prompt=zeros))
    assert made.text is not None
    embeds = made.family.encode_prompts(made.text, ["", "a red circle"]).prompt_embeds
    assert bool((embeds[0] == 0).all()) is zeros
    assert bool((embeds[1] != 0).any())


def test_a_base_without_a_null_prompt_of_zeros_says_so(tiny_sd: Path) -> None:
    base = load_base(str(tiny_sd), vae_and_text=False)
    with pytest.raises(DiffalignError, match=r"force_zeros_for_empty_prompt = True.*only SDXL.*leave the key out"):
        trained_as(base, section(force_zeros_for_empty_prompt=True))
