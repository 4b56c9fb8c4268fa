"""HPSv3's released structure by rule, and the arithmetic of its language model and head in plain torch.

Names and sizes: MizzenAI/HPSv3 with transformers 4.45.2, the config of Qwen/Qwen2-VL-7B-Instruct and 151,658 tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as fn


@dataclass(frozen=True)
class Sizes:
    width: int = 3584
    inner: int = 18944
    layers: int = 28
    heads: int = 28
    shared: int = 4  # heads of keys and values
    words: int = 151_658
    eye: int = 1280
    eye_layers: int = 32
    eye_heads: int = 16
    head: tuple[int, int] = (1024, 16)


def config(size: Sizes):
    """transformers' config of these sizes, with the constants of Qwen2-VL-7B-Instruct."""
    from transformers import Qwen2VLConfig

    rotary = {"type": "mrope", "mrope_section": [16, 24, 24], "rope_theta": 1e6}
    if size.width != 3584:
        third = size.width // size.heads // 2
        rotary["mrope_section"] = [third - 2, 1, 1]
    text = {
        "hidden_size": size.width,
        "intermediate_size": size.inner,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.shared,
        "vocab_size": size.words,
        "rms_norm_eps": 1e-6,
        "rope_parameters": rotary,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    vision = {"depth": size.eye_layers, "embed_dim": size.eye, "hidden_size": size.width, "num_heads": size.eye_heads}
    return Qwen2VLConfig(vision_config=vision, text_config=text)


def shapes(size: Sizes, text: str = "model.", eye: str = "visual.") -> dict[str, tuple[int, ...]]:
    """Every tensor of `HPSv3.safetensors`."""
    found: dict[str, tuple[int, ...]] = {}

    def linear(name: str, inputs: int, outputs: int) -> None:
        found[f"{name}.weight"], found[f"{name}.bias"] = (outputs, inputs), (outputs,)

    e, d, pair = size.eye, size.width, size.width // size.heads * size.shared
    found[f"{eye}patch_embed.proj.weight"] = (e, 3, 2, 14, 14)
    for block in (f"{eye}blocks.{i}" for i in range(size.eye_layers)):
        for norm in ("norm1", "norm2"):
            found[f"{block}.{norm}.weight"] = found[f"{block}.{norm}.bias"] = (e,)
        linear(f"{block}.attn.qkv", e, 3 * e)
        linear(f"{block}.attn.proj", e, e)
        linear(f"{block}.mlp.fc1", e, 4 * e)
        linear(f"{block}.mlp.fc2", 4 * e, e)
    found[f"{eye}merger.ln_q.weight"] = found[f"{eye}merger.ln_q.bias"] = (e,)
    linear(f"{eye}merger.mlp.0", 4 * e, 4 * e)
    linear(f"{eye}merger.mlp.2", 4 * e, d)
    found[f"{text}embed_tokens.weight"] = found["lm_head.weight"] = (size.words, d)
    for layer in (f"{text}layers.{i}" for i in range(size.layers)):
        linear(f"{layer}.self_attn.q_proj", d, d)
        linear(f"{layer}.self_attn.k_proj", d, pair)
        linear(f"{layer}.self_attn.v_proj", d, pair)
        found[f"{layer}.self_attn.o_proj.weight"] = (d, d)
        found[f"{layer}.mlp.gate_proj.weight"] = found[f"{layer}.mlp.up_proj.weight"] = (size.inner, d)
        found[f"{layer}.mlp.down_proj.weight"] = (d, size.inner)
        found[f"{layer}.input_layernorm.weight"] = found[f"{layer}.post_attention_layernorm.weight"] = (d,)
    found[f"{text}norm.weight"] = (d,)
    for number, (inputs, outputs) in {0: (d, size.head[0]), 3: size.head, 5: (size.head[1], 2)}.items():
        linear(f"rm_head.{number}", inputs, outputs)
    return found


def mu_sigma(state, size: Sizes, embedded, place):
    """The head's two numbers at `place` of one sequence of embeddings "length d", all positions in a row."""

    def norm(name, x):
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * state[f"model.{name}.weight"]

    def linear(name, x):
        return fn.linear(x, state[f"model.{name}.weight"], state.get(f"model.{name}.bias"))

    wide = size.width // size.heads
    position = torch.arange(len(embedded), dtype=embedded.dtype)[:, None, None]
    angle = position / 1e6 ** (torch.arange(0, wide, 2, dtype=embedded.dtype) / wide)

    def rotated(x):  # "length heads wide"
        turned = torch.complex(*x.chunk(2, -1)) * torch.polar(torch.ones_like(angle), angle)
        return torch.cat([turned.real, turned.imag], -1)

    x, later = embedded, torch.ones(len(embedded), len(embedded)).triu(1).bool()
    for layer in (f"layers.{i}" for i in range(size.layers)):
        h = norm(f"{layer}.input_layernorm", x)
        q, k, v = (linear(f"{layer}.self_attn.{name}_proj", h).unflatten(-1, (-1, wide)) for name in "qkv")
        k, v = (part.repeat_interleave(size.heads // size.shared, 1) for part in (rotated(k), v))
        scores = torch.einsum("ihd,jhd->hij", rotated(q), k) / wide**0.5
        read = torch.einsum("hij,jhd->ihd", scores.masked_fill(later, float("-inf")).softmax(-1), v)
        x = x + linear(f"{layer}.self_attn.o_proj", read.flatten(1))
        h = norm(f"{layer}.post_attention_layernorm", x)
        gate = fn.silu(linear(f"{layer}.mlp.gate_proj", h))
        x = x + linear(f"{layer}.mlp.down_proj", gate * linear(f"{layer}.mlp.up_proj", h))
    x = norm("norm", x)[place]
    for number in (0, 3):
        x = fn.linear(x, state[f"rm_head.{number}.weight"], state[f"rm_head.{number}.bias"]).relu()
    return fn.linear(x, state["rm_head.5.weight"], state["rm_head.5.bias"])
