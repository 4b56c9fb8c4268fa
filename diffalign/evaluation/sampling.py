"""Images from a pipeline for given (prompt, seed): the one place that samples.

The starting noise of an image is drawn on the CPU from a generator of its own, seeded by its prompt and seed,
and the samplers draw nothing. So an image depends neither on its neighbours in the batch nor on device count
(up to the rounding of kernels, which may differ with the batch size), and two models that sample the same
(prompt, seed) start from the same noise. Prompts get different noise for the same seed, so that they are
independent when an interval is clustered by prompt.

Left out: stochastic samplers (η > 0), guidance rescale, non-square images.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor, nn

from diffalign.data.transforms import to_images
from diffalign.engine.random import initial_noise
from diffalign.engine.scheduler_config import check_class
from diffalign.errors import DiffalignError
from diffalign.models.loading.family import check_resolution
from diffalign.models.text.pipeline import pipeline_embeddings
from diffalign.models.text.spec import TextSpec, text_spec_of

SCHEDULERS = {
    "ddim": "DDIMScheduler",
    "euler": "EulerDiscreteScheduler",
    "dpmsolver": "DPMSolverMultistepScheduler",
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def best_device() -> str:
    """cuda where there is one, else cpu."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class Sampling:
    """How images are sampled, apart from model, prompts and seeds; names as in diffusers.

    Raises DiffalignError for a value that no image can be sampled with.
    """

    num_inference_steps: int = 30
    guidance_scale: float = 5.0  # of classifier-free guidance; at most 1: none
    scheduler: str = "ddim"  # a name of SCHEDULERS
    resolution: int | None = None  # pixels per side; None: what the model was made for
    negative_prompt: str = ""
    batch_size: int | None = None  # images at a time; None: by resolution. No image depends on it
    dtype: str = "float32"  # a name of DTYPES
    device: str = field(default_factory=best_device)
    vae: str | None = None  # another VAE, e.g. an fp16-safe one
    prediction_type: str | None = None  # in place of the scheduler config's
    merge_lora: Mapping[str, float] | None = None  # LoRAs that are part of the base, each with its weight
    scheduler_config: Mapping[str, Any] | None = None  # other settings in place of the scheduler config's
    max_token_length: int | None = None  # these four as in `TextSpec`
    chunk_layout: str = "kohya"
    clip_skip: int = 0
    prompt_weights: str | None = None

    def __post_init__(self) -> None:
        for name, value, known in (("scheduler", self.scheduler, SCHEDULERS), ("dtype", self.dtype, DTYPES)):
            if value not in known:
                raise DiffalignError(f"{name} '{value}' is unknown; allowed: {', '.join(known)}")
        if self.num_inference_steps < 1:
            raise DiffalignError(f"num_inference_steps is {self.num_inference_steps}; at least 1 is needed")
        _ = self.text

    @property
    def text(self) -> TextSpec:
        """How prompts become embeddings."""
        return text_spec_of(self)

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype that the pipeline is loaded in."""
        return DTYPES[self.dtype]

    def recorded(self) -> dict[str, Any]:
        """What an image depends on, under the keys of manifests."""
        return {
            "steps": self.num_inference_steps,
            "guidance": float(self.guidance_scale),
            "scheduler": self.scheduler,
            "resolution": self.resolution,
            "negative_prompt": self.negative_prompt,
            "dtype": self.dtype,
            "prediction_type": self.prediction_type,
            "scheduler_config": dict(sorted(self.scheduler_config.items())) if self.scheduler_config else None,
            "text": self.text.recorded or None,
        }


class Guidance(Protocol):
    """Another way to compute the branches of classifier-free guidance than diffusers' own, which asks one network."""

    def on(self, pipe: Any) -> AbstractContextManager[None]:
        """Within the block, the pipeline is guided this way."""
        ...


def make_scheduler(pipe: Any, name: str) -> Any:
    """A diffusers scheduler of kind `name` with the betas, spacing and prediction type of the pipeline's own.

    Raises DiffalignError where those do not say what its noise is (EDM, flow matching).
    """
    import diffusers

    check_class(type(pipe.scheduler).__name__)
    config = dict(pipe.scheduler.config)
    # DDIMScheduler clips x_0 by default, which is wrong for latents; configs written by other schedulers
    # do not say.
    config.setdefault("clip_sample", False)
    return getattr(diffusers, SCHEDULERS[name]).from_config(config)


def default_resolution(pipe: Any) -> int:
    """Pixels per side that the network was made for."""
    return int(pipe.unet.config.sample_size) * int(pipe.vae_scale_factor)


def default_batch(resolution: int) -> int:
    """A batch that fits small machines: 64 tiny images, 16 at 512 pixels, 4 at 1024."""
    return max(1, min(64, 16 * 512**2 // resolution**2))


@torch.no_grad()
def sample_images(
    pipe: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    sampling: Sampling,
    *,
    guidance: Guidance | None = None,
    autocast: torch.dtype | None = None,
) -> list[Image.Image]:
    """Image i shows `prompts[i]` from `seeds[i]`; both lists have the same length.

    `pipe` is a StableDiffusionPipeline, StableDiffusionXLPipeline or one that is called like them; its device, dtype,
    VAE and prediction type count, not those of `sampling`. It is left as it was found: scheduler, training flags,
    progress bar, and no global random state is read or written. `guidance` computes the two branches of
    classifier-free guidance; None: the pipeline's network computes both. `autocast` is the dtype that the network
    computes in, as in training; the VAE decodes in its own dtype (SDXL's overflows in float16). Raises DiffalignError
    naming prompt and seed when an image comes out as NaN.
    """
    size = sampling.resolution or default_resolution(pipe)
    check_resolution(pipe.unet, pipe.vae_scale_factor, size, "resolution")
    batch = sampling.batch_size or default_batch(size)
    images: list[Image.Image] = []
    branches = nullcontext() if guidance is None else guidance.on(pipe)
    precision = nullcontext() if autocast is None else _unet_in(pipe, autocast)
    with _ready(pipe, make_scheduler(pipe, sampling.scheduler)), branches, precision:
        for start in range(0, len(prompts), batch):
            some, own = prompts[start : start + batch], seeds[start : start + batch]
            latent = size // pipe.vae_scale_factor
            guided = sampling.guidance_scale > 1
            embeds = pipeline_embeddings(pipe, some, sampling.text, sampling.negative_prompt, guided=guided)
            noise = initial_noise(some, own, (pipe.unet.config.in_channels, latent, latent))
            pixels = pipe(
                **embeds,
                latents=noise.to(embeds["prompt_embeds"]),
                height=size,
                width=size,
                num_inference_steps=sampling.num_inference_steps,
                guidance_scale=sampling.guidance_scale,
                output_type="pt",
            ).images
            images += to_images(pixels, some, own)
    return images


@contextmanager
def _ready(pipe: Any, scheduler: Any) -> Iterator[None]:
    """The pipeline in eval mode, silent and with another scheduler; restored on the way out."""
    modules = [m for part in pipe.components.values() if isinstance(part, nn.Module) for m in part.modules()]
    training = [module for module in modules if module.training]
    previous, bar = pipe.scheduler, dict(getattr(pipe, "_progress_bar_config", {}))
    for module in training:
        module.training = False
    pipe.scheduler = scheduler
    pipe.set_progress_bar_config(**{**bar, "disable": True})
    try:
        yield
    finally:
        pipe.scheduler = previous
        pipe.set_progress_bar_config(**bar)
        for module in training:
            module.training = True


@contextmanager
def _unet_in(pipe: Any, dtype: torch.dtype) -> Iterator[None]:
    """The network under autocast, the VAE outside it."""
    device, vae = pipe.unet.device.type, pipe.vae
    decode = vae.decode

    def decode_in_own_dtype(latents: Tensor, *args: Any, **settings: Any) -> Any:
        with torch.autocast(device, enabled=False):
            return decode(latents.to(next(vae.parameters()).dtype), *args, **settings)

    vae.decode = decode_in_own_dtype
    try:
        with torch.autocast(device, dtype):
            yield
    finally:
        del vae.decode  # the instance's own, which hid the class's
