from __future__ import annotations

import pytest


@pytest.fixture(scope="session")
def tiny(tiny_sd, tiny_sdxl):
    """Folders of random-weight pipelines by family, as a user would type them."""
    return {"sd": str(tiny_sd), "sdxl": str(tiny_sdxl)}


@pytest.fixture(scope="session")
def tuned(tiny_sdxl, tmp_path_factory):
    """A training output with a full UNet: the SDXL base's, moved a little."""
    import torch
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(tiny_sdxl, subfolder="unet")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    folder = tmp_path_factory.mktemp("run")
    unet.save_pretrained(folder / "unet")
    return str(folder)
