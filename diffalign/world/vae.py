"""The world's autoencoder: an exact 2x2 pixel-unshuffle, 3x16x16 pixels to 12x8x8 latents, as a plain diffusers class.

`StableDiffusionXLPipeline.from_pretrained` must load the world's base where only diffusers is imported, and diffusers
(0.42) refuses classes of other packages. Its `AutoencoderDC` downsamples by pixel-unshuffle, and with no blocks and
weights set by hand nothing else is left: the encoder is exact to the bit. The decoder ends in an RMS norm and a ReLU;
a constant channel far larger than the pixels makes the norm a division by that constant, and a bias carries the pixels
past the ReLU, so decoding is exact to float32 rounding (1e-6) for values in [-2, 2] and clips beyond (images are
clipped to [-1, 1] anyway).
`AutoencoderKL` and `AutoencoderTiny` cannot do this: they upsample by repeating pixels, after which no convolution can
tell the four pixels of a cell apart.
"""

from __future__ import annotations

import torch
from diffusers import AutoencoderDC
from torch import Tensor

CELL = 12  # latent channels: 3 colours x 2 x 2 pixels
CONSTANT = 8192.0  # in the norm's constant channels; float16 holds it exactly
LIFT = 2.0  # added before the ReLU, taken off after it
SCALING = 1.75  # 1 / std of the pixels of training renders, rounded


def pixel_unshuffle_vae() -> AutoencoderDC:
    """The autoencoder, float32, in eval mode, weights in place."""
    constants = 4  # channels; with 16 in all the norm divides by CONSTANT / 2
    vae = AutoencoderDC(
        latent_channels=CELL,
        encoder_block_out_channels=(3, CELL),
        decoder_block_out_channels=(3, CELL + constants),
        encoder_layers_per_block=(0, 0),
        decoder_layers_per_block=(0, 0),
        encoder_qkv_multiscales=((), ()),
        decoder_qkv_multiscales=((), ()),
        encoder_out_shortcut=False,
        decoder_in_shortcut=False,
        scaling_factor=SCALING,
    )
    # Pipelines of the Stable Diffusion family read the downsampling factor off the length of this entry.
    vae.register_to_config(block_out_channels=(3, CELL))
    for weight in vae.parameters():
        torch.nn.init.zeros_(weight)
    encoder, decoder = vae.encoder, vae.decoder
    data, divisor = slice(0, CELL), CONSTANT * (constants / (CELL + constants)) ** 0.5
    with torch.no_grad():
        _set_identity(encoder.conv_in.conv.weight, 3)
        _set_identity(encoder.conv_out.weight, CELL)
        _set_identity(decoder.conv_in.weight, CELL)
        decoder.conv_in.bias[CELL:] = CONSTANT
        decoder.norm_out.weight[data] = divisor
        decoder.norm_out.bias[data] = LIFT
        _set_identity(decoder.conv_out.conv.weight, CELL)
        decoder.conv_out.conv.bias[:] = -LIFT
    return vae.eval().requires_grad_(False)


def to_latents(vae: AutoencoderDC, pixels: Tensor) -> Tensor:
    """Scaled latents "n 12 8 8" of pixels "n 3 16 16" in [-1, 1]; std about 1 over training renders."""
    return vae.encode(pixels).latent * vae.config.scaling_factor


def _set_identity(kernel: Tensor, channels: int) -> None:
    """A 3x3 kernel "out in 3 3" that passes the first `channels` channels through."""
    index = torch.arange(channels)
    kernel[index, index, 1, 1] = 1.0
