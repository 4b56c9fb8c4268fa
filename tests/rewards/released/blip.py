"""ImageReward's released structure by rule, and its arithmetic in plain torch from a state dict of that layout.

Names and sizes: THUDM/ImageReward, models/BLIP (ViT-L/16 at 224, a BERT of 12 layers with cross-attention).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as fn


@dataclass(frozen=True)
class Sizes:
    vision: int = 1024
    vision_layers: int = 24
    vision_heads: int = 16
    image: int = 224
    patch: int = 16
    text: int = 768
    text_layers: int = 12
    text_heads: int = 12
    words: int = 30524
    positions: int = 512
    projection: int = 256


TINY = Sizes(
    vision=24, vision_layers=2, vision_heads=3, image=32, patch=8, text=16, text_layers=2, text_heads=2, words=60
)


def shapes(size: Sizes) -> dict[str, tuple[int, ...]]:
    """Every tensor of `ImageReward.pt`."""
    found: dict[str, tuple[int, ...]] = {}

    def linear(name: str, inputs: int, outputs: int) -> None:
        found[f"{name}.weight"], found[f"{name}.bias"] = (outputs, inputs), (outputs,)

    def norm(name: str, width: int) -> None:
        found[f"{name}.weight"] = found[f"{name}.bias"] = (width,)

    v, t = size.vision, size.text
    eye = "blip.visual_encoder"
    found[f"{eye}.cls_token"] = (1, 1, v)
    found[f"{eye}.pos_embed"] = (1, (size.image // size.patch) ** 2 + 1, v)
    found[f"{eye}.patch_embed.proj.weight"] = (v, 3, size.patch, size.patch)
    found[f"{eye}.patch_embed.proj.bias"] = (v,)
    for block in (f"{eye}.blocks.{i}" for i in range(size.vision_layers)):
        norm(f"{block}.norm1", v)
        linear(f"{block}.attn.qkv", v, 3 * v)
        linear(f"{block}.attn.proj", v, v)
        norm(f"{block}.norm2", v)
        linear(f"{block}.mlp.fc1", v, 4 * v)
        linear(f"{block}.mlp.fc2", 4 * v, v)
    norm(f"{eye}.norm", v)
    words = "blip.text_encoder.embeddings"
    found[f"{words}.position_ids"] = (1, size.positions)
    found[f"{words}.word_embeddings.weight"] = (size.words, t)
    found[f"{words}.position_embeddings.weight"] = (size.positions, t)
    norm(f"{words}.LayerNorm", t)
    for layer in (f"blip.text_encoder.encoder.layer.{i}" for i in range(size.text_layers)):
        for kind, source in (("attention", t), ("crossattention", v)):
            linear(f"{layer}.{kind}.self.query", t, t)
            linear(f"{layer}.{kind}.self.key", source, t)
            linear(f"{layer}.{kind}.self.value", source, t)
            linear(f"{layer}.{kind}.output.dense", t, t)
            norm(f"{layer}.{kind}.output.LayerNorm", t)
        linear(f"{layer}.intermediate.dense", t, 4 * t)
        linear(f"{layer}.output.dense", 4 * t, t)
        norm(f"{layer}.output.LayerNorm", t)
    linear("blip.vision_proj", v, size.projection)
    linear("blip.text_proj", t, size.projection)
    for number, (inputs, outputs) in {0: (t, 1024), 2: (1024, 128), 4: (128, 64), 6: (64, 16), 7: (16, 1)}.items():
        linear(f"mlp.layers.{number}", inputs, outputs)
    return found


def reward(state, size: Sizes, pixels, tokens, mask):
    """Standardised rewards [n], without a module: linear maps, layer norms and softmax over named tensors."""

    def linear(name, x):
        return fn.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    def norm(name, x, eps):
        return fn.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps)

    def attend(q, k, v, heads, allowed=None):
        q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
        scores = q @ k.mT / q.shape[-1] ** 0.5
        if allowed is not None:
            scores = scores - 10000.0 * (1 - allowed[:, None, None].to(scores))
        return (scores.softmax(-1) @ v).transpose(1, 2).flatten(-2)

    eye = "blip.visual_encoder"
    kernel = state[f"{eye}.patch_embed.proj.weight"]
    x = fn.conv2d(pixels, kernel, state[f"{eye}.patch_embed.proj.bias"], stride=size.patch).flatten(2).mT
    x = torch.cat([state[f"{eye}.cls_token"].expand(len(x), -1, -1), x], 1) + state[f"{eye}.pos_embed"]
    for block in (f"{eye}.blocks.{i}" for i in range(size.vision_layers)):
        q, k, v = linear(f"{block}.attn.qkv", norm(f"{block}.norm1", x, 1e-6)).chunk(3, -1)
        x = x + linear(f"{block}.attn.proj", attend(q, k, v, size.vision_heads))
        x = x + linear(f"{block}.mlp.fc2", fn.gelu(linear(f"{block}.mlp.fc1", norm(f"{block}.norm2", x, 1e-6))))
    image = norm(f"{eye}.norm", x, 1e-6)

    words = "blip.text_encoder.embeddings"
    x = state[f"{words}.word_embeddings.weight"][tokens]
    x = norm(f"{words}.LayerNorm", x + state[f"{words}.position_embeddings.weight"][: tokens.shape[1]], 1e-12)
    for layer in (f"blip.text_encoder.encoder.layer.{i}" for i in range(size.text_layers)):
        for kind, source, allowed in (("attention", None, mask), ("crossattention", image, None)):
            given = x if source is None else source
            part = f"{layer}.{kind}"
            q = linear(f"{part}.self.query", x)
            k, v = linear(f"{part}.self.key", given), linear(f"{part}.self.value", given)
            read = linear(f"{part}.output.dense", attend(q, k, v, size.text_heads, allowed))
            x = norm(f"{part}.output.LayerNorm", read + x, 1e-12)
        inner = linear(f"{layer}.output.dense", fn.gelu(linear(f"{layer}.intermediate.dense", x)))
        x = norm(f"{layer}.output.LayerNorm", inner + x, 1e-12)
    x = x[:, 0]
    for number in (0, 2, 4, 6, 7):
        x = linear(f"mlp.layers.{number}", x)
    return (x[:, 0] - 0.16717362830052426) / 1.0333394966054072
