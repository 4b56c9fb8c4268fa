"""What SDXL tuning keeps in memory, counted on `meta` tensors: no GPU, no weights, no figure that is a guess.

    python benchmarks/memory.py --out runs/memory            # minutes on one core; writes memory.json and memory.md

Weights, gradients and optimiser states follow from the number of parameters; activations are the storages alive after
the policy's forward of one picture (`diffalign.training.kept`), in bfloat16, with attention in one fused kernel.
Not in these sums: the allocator's fragments, kernels' workspaces, the backward's own temporaries, CUDA's context. So a
card needs more than this; how much more is to be measured on one.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffalign.models.lora import add_lora
from diffalign.models.memory import set_checkpointing
from diffalign.training.kept import Kept
from diffalign.training.plan import OPTIMIZER_BYTES
from diffalign.training.run import environment

GB = 1e9
SDXL_UNET: dict[str, Any] = {  # as stabilityai published it
    "sample_size": 128,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "attention_head_dim": (5, 10, 20),
    "block_out_channels": (320, 640, 1280),
    "cross_attention_dim": 2048,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "projection_class_embeddings_input_dim": 2816,
    "transformer_layers_per_block": (1, 2, 10),
    "use_linear_projection": True,
}
# Name -> tuning, optimizer, checkpointing, kept reference errors.
PRESETS: dict[str, tuple[str, str, str, bool]] = {
    "LoRA, full checkpointing": ("lora", "adamw", "full", False),
    "LoRA, no checkpointing": ("lora", "adamw", "none", False),
    "all weights, adafactor, full checkpointing": ("full", "adafactor", "full", False),
    "all weights, adamw_8bit, full checkpointing": ("full", "adamw_8bit", "full", False),
    "all weights, adamw_bf16, kept reference errors, full checkpointing": ("full", "adamw_bf16", "full", True),
    "all weights, adamw_bf16, full checkpointing": ("full", "adamw_bf16", "full", False),
    "all weights, adamw, full checkpointing": ("full", "adamw", "full", False),
    "all weights, adamw, kept reference errors, selective checkpointing": ("full", "adamw", "selective", True),
    "all weights, adamw, selective checkpointing": ("full", "adamw", "selective", False),
    "all weights, adamw, no checkpointing": ("full", "adamw", "none", False),
}


class FusedAttention:
    """Attention with one operation for the product, as a fused kernel has it; `meta` knows only the plain form."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """As diffusers' AttnProcessor2_0 for the UNets of SD and SDXL."""
        told = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        heads = [
            x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for x in (attn.to_q(hidden_states), attn.to_k(told), attn.to_v(told))
        ]
        out = torch.ops.aten._scaled_dot_product_flash_attention(*heads)[0]
        return attn.to_out[1](attn.to_out[0](out.transpose(1, 2).flatten(-2)))


def sdxl(method: str, rank: int) -> nn.Module:
    """SDXL's UNet without weights, bfloat16, trainable as the method says."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(**SDXL_UNET)
    if method == "lora":
        unet.requires_grad_(False)
        add_lora(unet, rank)
    unet.set_attn_processor(FusedAttention())
    return unet.to(torch.bfloat16).train()


def activations(unet: nn.Module, checkpointing: str, resolution: int) -> int:
    """Bytes kept for the backward pass of one picture."""
    side = resolution // 8

    def blank(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.bfloat16, device="meta")

    added = {"text_embeds": blank(1, 1280), "time_ids": blank(1, 6)}
    t = torch.empty(1, dtype=torch.int64, device="meta")
    set_checkpointing(unet, checkpointing)  # type: ignore[arg-type]
    with Kept() as kept:
        out = unet(blank(1, 4, side, side), t, blank(1, 77, 2048), added_cond_kwargs=added, return_dict=False)[0]
    del out
    return kept.bytes


def line(name: str, kept: dict[str, int], trained: int, frozen: int) -> dict[str, Any]:
    """Bytes of a preset on one device; a pair is two pictures."""
    method, optimizer, checkpointing, errors_kept = PRESETS[name]
    weight = 2 if optimizer == "adamw_bf16" else 4
    reference = 2 * trained if method == "full" and not errors_kept else 0
    parts = {
        "weights": weight * trained + 2 * frozen,
        "casts": 2 * trained if method == "full" and weight == 4 else 0,
        "reference": reference,
        "gradients": weight * trained,
        "optimizer": int(OPTIMIZER_BYTES[optimizer] * trained),
        "activations of a pair": 2 * kept[f"{method} {checkpointing}"],
    }
    return {"preset": name, **parts, "sum": sum(parts.values())}


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line of this script."""
    p = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--resolution", type=int, default=1024)
    p.add_argument("--rank", type=int, default=16)
    a = p.parse_args(arguments)
    kept: dict[str, int] = {}
    sizes: dict[str, tuple[int, int]] = {}
    for method in ("lora", "full"):
        unet = sdxl(method, a.rank)
        numbers = [(x.numel(), x.requires_grad) for x in unet.parameters()]
        sizes[method] = sum(n for n, t in numbers if t), sum(n for n, t in numbers if not t)
        for checkpointing in ("none", "selective", "full"):
            kept[f"{method} {checkpointing}"] = activations(unet, checkpointing, a.resolution)
    lines = [line(name, kept, *sizes[preset[0]]) for name, preset in PRESETS.items()]
    a.out.mkdir(parents=True, exist_ok=True)
    found = {"resolution": a.resolution, "rank": a.rank, "activations of a picture": kept, "presets": lines}
    (a.out / "memory.json").write_text(json.dumps({**found, "environment": environment()}, indent=2) + "\n")
    head = list(lines[0])
    rows = [[each["preset"], *(f"{each[key] / GB:.2f}" for key in head[1:])] for each in lines]
    pictures = [[name, f"{size / GB:.2f}"] for name, size in kept.items()]
    text = table(["activations of one picture", "GB"], pictures) + "\n" + table([*head[:-1], "sum, GB"], rows)
    (a.out / "memory.md").write_text(text)
    print(text)


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows]) + "\n"


if __name__ == "__main__":
    main()
