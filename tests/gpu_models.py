"""Random weights in SDXL's real size, for tests that need a GPU, with the UNet config that Stability AI published."""

from __future__ import annotations

import torch

from diffalign.engine.schedule import NoiseSchedule
from diffalign.models.loading.base import Base
from diffalign.models.loading.sdxl import StableDiffusionXL
from diffalign.types import Conditioning

SDXL_UNET = {
    "sample_size": 128,
    "in_channels": 4,
    "out_channels": 4,
    "act_fn": "silu",
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "attention_head_dim": (5, 10, 20),
    "block_out_channels": (320, 640, 1280),
    "cross_attention_dim": 2048,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 2,
    "projection_class_embeddings_input_dim": 2816,
    "transformer_layers_per_block": (1, 2, 10),
    "use_linear_projection": True,
}
SDXL_SCHEDULER = {
    "_class_name": "EulerDiscreteScheduler",
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
    "timestep_spacing": "leading",
    "steps_offset": 1,
}


def sdxl_base(seed: int = 0, device: torch.device | str = "cuda") -> Base:
    """An SDXL base without VAE and text encoders: 2.57 billion random float32 weights, frozen, on `device`."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(seed)
    with torch.device(device):
        unet = UNet2DConditionModel(**SDXL_UNET)
    return Base(
        family=StableDiffusionXL(),
        unet=unet.requires_grad_(False).eval(),
        schedule=NoiseSchedule.from_config(SDXL_SCHEDULER),
        scheduler_config=dict(SDXL_SCHEDULER),
        vae=None,
        text=None,
        source="random SDXL",
    )


def sdxl_point(
    n: int, resolution: int = 1024, seed: int = 0, device: torch.device | str = "cuda"
) -> tuple[torch.Tensor, torch.Tensor, Conditioning]:
    """Random x_t, t and flat conditioning for n samples; never zeros, which some kernels are fast at."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device)

    side = resolution // 8
    geometry = torch.tensor([resolution, resolution, 0, 0, resolution, resolution], dtype=torch.float32)
    cond = Conditioning(normal(n, 77, 2048), normal(n, 1280), geometry.expand(n, 6).to(device))
    return normal(n, 4, side, side), torch.randint(0, 1000, (n,), generator=generator).to(device), cond
