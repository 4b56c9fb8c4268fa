"""MPS's released structure by rule, and the arithmetic of its layers restated head by head.

Names and sizes: Kwai-Kolors/MPS, trainer/models: CLIP-H of transformers 4.27, Cross_model(1024, layer_num=4, heads=16).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Sizes:
    text: int = 1024
    text_layers: int = 24
    words: int = 49408
    context: int = 77
    vision: int = 1280
    vision_layers: int = 32
    patch: int = 14
    image: int = 224
    joint: int = 1024  # CLIP's projection, and the width of MPS's own layers
    layers: int = 4
    heads: int = 16  # of those; each is `head` wide
    head: int = 64


TINY = Sizes(
    text=24, text_layers=2, words=54, context=20, vision=32, vision_layers=2, patch=8, image=32, joint=16, layers=2,
    heads=3, head=8,
)  # fmt: skip


def shapes(size: Sizes) -> dict[str, tuple[int, ...]]:
    """Every tensor of the released module's state dict."""
    found: dict[str, tuple[int, ...]] = {"model.logit_scale": ()}

    def linear(name: str, inputs: int, outputs: int) -> None:
        found[f"{name}.weight"], found[f"{name}.bias"] = (outputs, inputs), (outputs,)

    def norm(name: str, width: int) -> None:
        found[f"{name}.weight"] = found[f"{name}.bias"] = (width,)

    patches = (size.image // size.patch) ** 2 + 1
    text, vision = "model.text_model", "model.vision_model"
    found[f"{text}.embeddings.position_ids"] = (1, size.context)
    found[f"{text}.embeddings.token_embedding.weight"] = (size.words, size.text)
    found[f"{text}.embeddings.position_embedding.weight"] = (size.context, size.text)
    found[f"{vision}.embeddings.class_embedding"] = (size.vision,)
    found[f"{vision}.embeddings.position_ids"] = (1, patches)
    found[f"{vision}.embeddings.patch_embedding.weight"] = (size.vision, 3, size.patch, size.patch)
    found[f"{vision}.embeddings.position_embedding.weight"] = (patches, size.vision)
    norm(f"{vision}.pre_layrnorm", size.vision)
    norm(f"{vision}.post_layernorm", size.vision)
    norm(f"{text}.final_layer_norm", size.text)
    for tower, width, depth in ((text, size.text, size.text_layers), (vision, size.vision, size.vision_layers)):
        for layer in (f"{tower}.encoder.layers.{i}" for i in range(depth)):
            for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
                linear(f"{layer}.self_attn.{part}", width, width)
            linear(f"{layer}.mlp.fc1", width, 4 * width)
            linear(f"{layer}.mlp.fc2", 4 * width, width)
            norm(f"{layer}.layer_norm1", width)
            norm(f"{layer}.layer_norm2", width)
    found["model.visual_projection.weight"] = (size.joint, size.vision)
    found["model.text_projection.weight"] = (size.joint, size.text)
    d, inner = size.joint, size.heads * size.head
    for layer in (f"cross_model.layers.{i}" for i in range(size.layers)):
        for part in (0, 1):
            norm(f"{layer}.{part}.fn.norm", d)
        found[f"{layer}.0.fn.to_q.weight"] = (inner, d)
        found[f"{layer}.0.fn.to_kv.weight"] = (2 * size.head, d)
        found[f"{layer}.0.fn.to_out.weight"] = (d, inner)
        found[f"{layer}.0.fn.ff.0.weight"] = (8 * d, d)
        found[f"{layer}.0.fn.ff.2.weight"] = (d, 4 * d)
        found[f"{layer}.1.fn.rotary_emb.inv_freq"] = (size.head // 2,)
        found[f"{layer}.1.fn.fused_attn_ff_proj.weight"] = (inner + 2 * size.head + 8 * d, d)
        found[f"{layer}.1.fn.attn_out.weight"] = (d, inner)
        found[f"{layer}.1.fn.ff_out.1.weight"] = (d, 4 * d)
    return found


def read_image(state, size: Sizes, image, words, allowed):
    """The image tokens of one image "i d" after the layers, head by head; rotations as complex products."""

    def weight(layer, part, name):
        return state[f"cross_model.layers.{layer}.{part}.fn.{name}"]

    def norm(layer, part, x):
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return scaled * weight(layer, part, "norm.weight") + weight(layer, part, "norm.bias")

    def gated(x):
        value, gate = x[:, : x.shape[1] // 2], x[:, x.shape[1] // 2 :]
        return value * gate / (1 + (-gate).exp())

    def rotated(x):
        place = torch.arange(len(x), dtype=x.dtype)[:, None]
        rate = 1 / 10000 ** (torch.arange(0, size.head, 2, dtype=x.dtype) / size.head)
        turned = torch.complex(*x.chunk(2, -1)) * torch.polar(torch.ones_like(place * rate), place * rate)
        return torch.cat([turned.real, turned.imag], -1)

    def heads(queries, key, value, columns):
        out = []
        for query in queries.split(size.head, -1):
            scores = (query @ key.T / size.head**0.5)[:, columns].exp()
            out.append(scores / scores.sum(-1, keepdim=True) @ value[columns])
        return torch.cat(out, -1)

    inner, every = size.heads * size.head, torch.ones(len(image), dtype=torch.bool)
    for layer in range(size.layers):
        x = norm(layer, 0, image)
        key, value = (words @ weight(layer, 0, "to_kv.weight").T).split(size.head, -1)
        read = heads(x @ weight(layer, 0, "to_q.weight").T, key, value, allowed)
        fed = gated(x @ weight(layer, 0, "ff.0.weight").T) @ weight(layer, 0, "ff.2.weight").T
        image = image + read @ weight(layer, 0, "to_out.weight").T + fed
        x = norm(layer, 1, image) @ weight(layer, 1, "fused_attn_ff_proj.weight").T
        query, key, value, rest = x.split([inner, size.head, size.head, x.shape[1] - inner - 2 * size.head], -1)
        query = torch.cat([rotated(part) for part in query.split(size.head, -1)], -1)
        mixed = heads(query, rotated(key), value, every)
        image = (
            image + mixed @ weight(layer, 1, "attn_out.weight").T + gated(rest) @ weight(layer, 1, "ff_out.1.weight").T
        )
    return image
