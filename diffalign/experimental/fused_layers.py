"""diffusers' resnet blocks, transformers' first norm, last norm and GEGLU with forwards that call the fused functions.

`fuse` swaps a layer's class, as `fast_lora.py` does; a layer that is not of the plain kind has diffusers' own forward.

Imports diffusers; the package imports this module only when `model.fused_kernels` is set.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.activations import GEGLU
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn

from diffalign.experimental.fused_geglu import geglu
from diffalign.experimental.fused_norm import NHWC, group_norm_silu
from diffalign.models.loading.modules import UNet


class FusedResnetBlock2D(ResnetBlock2D):
    """A plain resnet block: two fused norms, NHWC from its input to its output."""

    def forward(self, input_tensor: Tensor, temb: Tensor | None, *args: Any, **kwargs: Any) -> Tensor:
        """ "n c h w" from "n c h w" and the embedded timestep "n d"; further arguments are diffusers'."""
        if args or kwargs:
            return super().forward(input_tensor, temb, *args, **kwargs)
        x = input_tensor.contiguous(memory_format=NHWC)
        hidden = self.conv1(_norm(self.norm1, x))
        if self.time_emb_proj is not None:
            if not self.skip_time_act:
                temb = self.nonlinearity(temb)
            temb = self.time_emb_proj(temb)[:, :, None, None]
        if temb is not None:
            hidden = hidden + temb
        hidden = self.conv2(_norm(self.norm2, hidden.contiguous(memory_format=NHWC)))
        if self.conv_shortcut is not None:
            x = self.conv_shortcut(x)
        return (x + hidden) / self.output_scale_factor


class FusedTransformer2DModel(Transformer2DModel):
    """Transformer blocks between images: places are rows already in NHWC, so both ends are views.

    diffusers' own end copies to NCHW, and whatever comes after would have to copy it back.
    """

    def _get_output_for_continuous_inputs(
        self, hidden_states: Tensor, residual: Tensor, batch_size: int, height: int, width: int, inner_dim: int
    ) -> Tensor:
        def image(rows: Tensor) -> Tensor:
            return rows.reshape(batch_size, height, width, inner_dim).permute(0, 3, 1, 2)

        if self.use_linear_projection:
            return image(self.proj_out(hidden_states)) + residual
        return self.proj_out(image(hidden_states)) + residual


class FusedNorm(nn.GroupNorm):
    """The norm before a transformer's projection: no SiLU, NHWC out, in the dtype that the projection computes in."""

    silu = False

    def forward(self, x: Tensor) -> Tensor:
        """ "n c h w" from "n c h w"."""
        return _norm(self, x.contiguous(memory_format=NHWC), self.silu)


class FusedLastNorm(FusedNorm):
    """A UNet's `conv_norm_out` and the SiLU after it, whose own module is `Done`."""

    silu = True


class Done(nn.SiLU):
    """A SiLU that the norm before it has computed."""

    def forward(self, x: Tensor) -> Tensor:
        """x itself."""
        return x


class FusedGEGLU(GEGLU):
    """h · gelu(g) of the projection, which may be a LoRA layer."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """ "… inner" from "… d"; further arguments are diffusers'."""
        if args or kwargs:
            return super().forward(hidden_states, *args, **kwargs)
        return geglu(self.proj(hidden_states))


def fuse(unet: UNet) -> dict[str, int]:
    """Swaps the classes of the UNet's plain layers in place; returns how many there were of each kind."""
    found = {"resnet blocks": 0, "transformers": 0, "last norms": 0, "GEGLU layers": 0}
    for layer in unet.modules():
        if type(layer) is ResnetBlock2D and _plain(layer):
            layer.__class__ = FusedResnetBlock2D
            found["resnet blocks"] += 1
        elif type(layer) is Transformer2DModel and layer.is_input_continuous and _affine(layer.norm):
            layer.__class__, layer.norm.__class__ = FusedTransformer2DModel, FusedNorm
            found["transformers"] += 1
        elif type(layer) is GEGLU:
            layer.__class__ = FusedGEGLU
            found["GEGLU layers"] += 1
    norm, act = getattr(unet, "conv_norm_out", None), getattr(unet, "conv_act", None)
    if _affine(norm) and type(act) is nn.SiLU:
        norm.__class__, unet.conv_act = FusedLastNorm, Done()
        found["last norms"] += 1
    return found


def _norm(norm: nn.GroupNorm, x: Tensor, silu: bool = True) -> Tensor:
    return group_norm_silu(x, norm.num_groups, norm.weight, norm.bias, norm.eps, silu=silu)


def _plain(block: ResnetBlock2D) -> bool:
    """The kind that SD's and SDXL's UNets have."""
    return (
        block.time_embedding_norm == "default"
        and type(block.nonlinearity) is nn.SiLU
        and block.dropout.p == 0
        and block.upsample is None
        and block.downsample is None
        and _affine(block.norm1)
        and _affine(block.norm2)
    )


def _affine(norm: Any) -> bool:
    return type(norm) is nn.GroupNorm and isinstance(norm.weight, torch.Tensor) and isinstance(norm.bias, torch.Tensor)
