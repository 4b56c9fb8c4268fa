"""The transformer that MPS puts on CLIP's tokens: image tokens read the words of the prompt, then each other.

Layers are pre-norm and residual, with one key and value for all heads (multi-query) and a SwiGLU beside each attention:

    x += attend(norm(x), words) W_o + swiglu(norm(x))       only words that the condition allows
    x += attend(norm(x), norm(x)) W_o + swiglu(norm(x))     rotary positions; all inputs by one map

Names of tensors are those of the release without `cross_model.layers.`; sizes are read off the tensors.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, linear, scaled_dot_product_attention, silu

ROTARY_BASE = 10000.0
READ = ("norm.weight", "norm.bias", "to_q.weight", "to_kv.weight", "to_out.weight", "ff.0.weight", "ff.2.weight")
SELF = ("norm.weight", "norm.bias", "fused_attn_ff_proj.weight", "attn_out.weight", "ff_out.1.weight")


class MpsLayers(nn.Module):
    """The layers of a release, frozen, from their tensors named "LAYER.{0,1}.fn.NAME"."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        """Raises KeyError naming a tensor that is missing."""
        super().__init__()
        self.depth = 1 + max((int(key.split(".")[0]) for key in state), default=-1)
        for key in expected(self.depth):
            self.register_buffer(key.replace(".", "_"), state[key])

    def weight(self, layer: int, part: int, name: str) -> Tensor:
        """A tensor by the released name."""
        return self.get_buffer(f"{layer}_{part}_fn_{name}".replace(".", "_"))

    def forward(self, image: Tensor, words: Tensor, allowed: Tensor) -> Tensor:
        """Image tokens "n i d" after reading words "n j d" where `allowed` (bool "n j")."""
        for layer in range(self.depth):
            image = image + self._read(layer, image, words, allowed)
            image = image + self._mix(layer, image)
        return image

    def _read(self, layer: int, image: Tensor, words: Tensor, allowed: Tensor) -> Tensor:
        w = {name: self.weight(layer, 0, name) for name in READ}
        x = layer_norm(image, image.shape[-1:], w["norm.weight"], w["norm.bias"])
        key, value = linear(words, w["to_kv.weight"]).chunk(2, -1)
        read = _attend(linear(x, w["to_q.weight"]), key, value, allowed[:, None, None])
        return linear(read, w["to_out.weight"]) + linear(_swiglu(linear(x, w["ff.0.weight"])), w["ff.2.weight"])

    def _mix(self, layer: int, image: Tensor) -> Tensor:
        w = {name: self.weight(layer, 1, name) for name in SELF}
        x = layer_norm(image, image.shape[-1:], w["norm.weight"], w["norm.bias"])
        inner = w["attn_out.weight"].shape[1]
        fused = w["fused_attn_ff_proj.weight"].shape[0]
        head = (fused - inner - 2 * w["ff_out.1.weight"].shape[1]) // 2
        query, key, value, gated = linear(x, w["fused_attn_ff_proj.weight"]).split(
            (inner, head, head, fused - inner - 2 * head), -1
        )
        query, key = _rotate(query.unflatten(-1, (-1, head)), 1).flatten(-2), _rotate(key, 1)
        mixed = _attend(query, key, value)
        return linear(mixed, w["attn_out.weight"]) + linear(_swiglu(gated), w["ff_out.1.weight"])


def expected(depth: int) -> list[str]:
    """The names of all tensors of so many layers."""
    return [f"{i}.{part}.fn.{name}" for i in range(depth) for part, names in enumerate((READ, SELF)) for name in names]


def _attend(query: Tensor, key: Tensor, value: Tensor, allowed: Tensor | None = None) -> Tensor:
    """Queries "n i (heads d)" on one key and value "n j d" for all heads; "n i (heads d)"."""
    heads = query.unflatten(-1, (-1, key.shape[-1])).transpose(1, 2)
    keys, values = (x[:, None].expand(-1, heads.shape[1], -1, -1) for x in (key, value))
    return scaled_dot_product_attention(heads, keys, values, attn_mask=allowed).transpose(1, 2).flatten(-2)


def _swiglu(x: Tensor) -> Tensor:
    value, gate = x.chunk(2, -1)
    return value * silu(gate)


def _rotate(x: Tensor, axis: int) -> Tensor:
    """Rotary positions along `axis`; the halves of the last axis are the two coordinates of each rotation."""
    half = x.shape[-1] // 2
    rate = ROTARY_BASE ** (-torch.arange(half, device=x.device, dtype=x.dtype) / half)
    angle = torch.arange(x.shape[axis], device=x.device, dtype=x.dtype)[:, None] * rate
    angle = angle.reshape(*angle.shape[:1], *[1] * (x.ndim - 3), half)
    left, right = x[..., :half], x[..., half:]
    return torch.cat([left * angle.cos() - right * angle.sin(), right * angle.cos() + left * angle.sin()], -1)
