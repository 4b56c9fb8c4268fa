"""Pictures made during training: a grid on disk for each validation, and the list for the tracker."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from diffalign.evaluation.grid import comparison_grid
from diffalign.evaluation.sampling import Sampling, sample_images


def validation_pictures(
    pipe: Any,
    prompts: tuple[str, ...],
    *,
    step: int,
    folder: Path,
    seed: int,
    sampling: Sampling,
    autocast: torch.dtype | None = None,
) -> list[Image.Image]:
    """One picture of each prompt from the pipeline as it is, written as `folder`/step-000100.png and returned.

    The seed is the same at every step, so that a row of grids shows what training changed. `autocast` is the dtype
    that the network is trained in; the VAE decodes in its own (SDXL's overflows in float16).
    """
    with _as_trained(pipe, autocast):
        images = sample_images(pipe, prompts, [seed] * len(prompts), sampling)
    folder.mkdir(parents=True, exist_ok=True)
    comparison_grid(prompts, {f"step {step}": images}).save(folder / f"step-{step:06d}.png")
    return images


@contextmanager
def _as_trained(pipe: Any, dtype: torch.dtype | None) -> Iterator[None]:
    """The network under autocast, the VAE outside it."""
    if dtype is None:
        yield
        return
    device, vae = pipe.unet.device.type, pipe.vae
    decode = vae.decode

    def decode_in_own_dtype(latents: torch.Tensor, *args: Any, **settings: Any) -> Any:
        with torch.autocast(device, enabled=False):
            return decode(latents.to(next(vae.parameters()).dtype), *args, **settings)

    vae.decode = decode_in_own_dtype
    try:
        with torch.autocast(device, dtype):
            yield
    finally:
        del vae.decode  # the instance's own, which hid the class's
