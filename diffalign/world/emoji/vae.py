"""The emoji world's autoencoder: linear, fitted in closed form, 3x64x64 pixels to 12x16x16 latents, a diffusers class.

Encoder: the 12 leading principal components of 4x4 patches of renders, each divided by the square root of its standard
deviation. Components of unit variance would give every detail the weight of the large forms; components as they are
would leave the details far below the noise of most timesteps. Decoder: the least-squares fit of a patch from the
latents of its 3x3 neighbourhood, which hides the seams of the patches. Renders come back with a PSNR of 34 dB.

It is written into `AutoencoderDC` because `StableDiffusionXLPipeline.from_pretrained` must load the base where only
diffusers is imported: blocks with zero weights pass their input through, and the norm and the ReLU at the end of the
decoder are made harmless as in `diffalign.world.vae`.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from diffusers import AutoencoderDC
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from diffalign.world.emoji.captions import combinations
from diffalign.world.emoji.render import render
from diffalign.world.vae import CONSTANT, LIFT

CHANNELS = 12  # of the latents
PATCH = 48  # numbers of a 4x4 patch
CONSTANTS = 4  # channels of the decoder's norm that hold a constant
RENDERS = 4096  # that the fit is made on
WHITENING = 0.5  # power of a component's standard deviation that it is divided by
RIDGE = 1e-3


def fitted_vae() -> AutoencoderDC:
    """The autoencoder fitted to renders of the training combinations, float32, in eval mode."""
    encode, shift, kernel, bias = _fit()
    vae = _empty()
    encoder, decoder = vae.encoder, vae.decoder
    with torch.no_grad():
        encoder.conv_out.weight[..., 1, 1] = encode
        encoder.conv_out.bias[:] = -encode @ shift
        decoder.conv_in.weight[:PATCH] = kernel
        decoder.conv_in.bias[:PATCH] = bias
    return vae.eval().requires_grad_(False)


@cache
def _fit() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The encoder's map and mean patch, the decoder's kernel and bias; about 10 seconds, once a process."""
    patches = _patches(training_pixels(RENDERS, seed=0))
    encode, shift = _components(patches)
    latents = torch.einsum("lp,nphw->nlhw", encode, patches - shift[:, None, None])
    return (encode, shift, *_neighbourhood_fit(latents, patches))


def training_pixels(n: int, seed: int) -> Tensor:
    """Renders "n 3 64 64" of random training combinations, in [-1, 1]."""
    rng = np.random.default_rng(seed)
    known = combinations("train")
    images = render([known[i] for i in rng.integers(0, len(known), n)], rng)
    return to_pixels(images)


def to_pixels(images: NDArray[np.uint8]) -> Tensor:
    """Pixels "n 3 64 64" in [-1, 1] of images uint8 "n 64 64 3"."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_latents(vae: AutoencoderDC, pixels: Tensor) -> Tensor:
    """Scaled latents "n 12 16 16" of pixels "n 3 64 64" in [-1, 1]."""
    return vae.encode(pixels).latent * vae.config.scaling_factor


def _empty() -> AutoencoderDC:
    """The autoencoder with everything but the two fitted maps in place."""
    vae = AutoencoderDC(
        latent_channels=CHANNELS,
        encoder_block_out_channels=(3, 12, PATCH),
        decoder_block_out_channels=(3, 12 + CONSTANTS, PATCH + 4 * CONSTANTS),
        encoder_block_types="ResBlock",
        decoder_block_types="ResBlock",
        encoder_layers_per_block=(0, 1, 0),
        decoder_layers_per_block=(0, 1, 0),
        encoder_qkv_multiscales=((), (), ()),
        decoder_qkv_multiscales=((), (), ()),
        encoder_out_shortcut=False,
        decoder_in_shortcut=False,
        scaling_factor=1.0,
    )
    # Pipelines of the Stable Diffusion family read the downsampling factor off the length of this entry.
    vae.register_to_config(block_out_channels=(3, 12, PATCH))
    for weight in vae.parameters():
        torch.nn.init.zeros_(weight)
    encoder, decoder = vae.encoder, vae.decoder
    divisor = CONSTANT * (CONSTANTS / (12 + CONSTANTS)) ** 0.5
    with torch.no_grad():
        _set_identity(encoder.conv_in.conv.weight, 3)
        decoder.conv_in.bias[PATCH:] = CONSTANT
        decoder.norm_out.weight[:12] = divisor
        decoder.norm_out.bias[:12] = LIFT
        _set_identity(decoder.conv_out.conv.weight, 12)
        decoder.conv_out.conv.bias[:] = -LIFT
    return vae


def _patches(pixels: Tensor) -> Tensor:
    """Patches "n 48 16 16" in the order in which the encoder's two unshuffles leave them."""
    return functional.pixel_unshuffle(functional.pixel_unshuffle(pixels, 2), 2)


def _components(patches: Tensor) -> tuple[Tensor, Tensor]:
    """The encoder's map "12 48", scaled so that latents have std 1 over all, and the mean patch [48]."""
    rows = patches.permute(0, 2, 3, 1).reshape(-1, PATCH).double()
    shift = rows.mean(0)
    covariance = (rows - shift).T @ (rows - shift) / len(rows)
    variance, vectors = torch.linalg.eigh(covariance)
    variance, vectors = variance.flip(0)[:CHANNELS], vectors.flip(1)[:, :CHANNELS]
    vectors = vectors * vectors.sum(0).sign()  # eigenvectors have no sign of their own
    scale = variance.pow(-WHITENING / 2)
    scale = scale / (variance * scale.square()).mean().sqrt()
    return (scale[:, None] * vectors.T).float(), shift.float()


def _neighbourhood_fit(latents: Tensor, patches: Tensor) -> tuple[Tensor, Tensor]:
    """Kernel "48 12 3 3" and bias [48] that map latents to patches with the least squared error."""
    size = CHANNELS * 9
    gram, target = torch.zeros(size + 1, size + 1).double(), torch.zeros(size + 1, PATCH).double()
    for part, wanted in zip(latents.split(256), patches.split(256)):
        seen = functional.unfold(part, 3, padding=1).transpose(1, 2).reshape(-1, size).double()
        seen = torch.cat([seen, torch.ones_like(seen[:, :1])], dim=1)
        gram += seen.T @ seen
        target += seen.T @ wanted.permute(0, 2, 3, 1).reshape(-1, PATCH).double()
    gram.diagonal().add_(RIDGE * len(latents))
    solution = torch.linalg.solve(gram, target).float()
    return solution[:-1].T.reshape(PATCH, CHANNELS, 3, 3), solution[-1]


def _set_identity(kernel: Tensor, channels: int) -> None:
    """A 3x3 kernel "out in 3 3" that passes the first `channels` channels through."""
    index = torch.arange(channels)
    kernel[index, index, 1, 1] = 1.0
