"""The memory of a training run, counted from its config on `meta` tensors, without a GPU or weights.

    python -m benchmarks.memory --out runs/memory                # the presets of training_configs/sdxl/memory; a minute
    python -m benchmarks.memory my.yaml --out runs/memory        # any config with cached latents, SDXL's sizes

Weights, gradients and optimiser states follow from the parameters. Activations are what the policy's forward of a
micro-batch stores for its backward (`diffalign.training.inspect.activation_memory`). "backward" is what the peak of
the backward needs in addition, including a checkpoint's second forward (`benchmarks.peak`). The UNet computes as under
CUDA's autocast to bfloat16: norms in float32, with copies of their inputs. Attention is one fused kernel, and each
image has its own keys and values. Not counted: CUDA's context, fragmentation of the allocator, workspaces of kernels,
and the second copy of one gradient where weights are float32. So a card needs more; `python -m benchmarks.memory_run`
measures it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.counts import meta_unet
from benchmarks.peak import Peak
from diffalign.config.schema import Config, ConfigError, load_config
from diffalign.experimental.fusing import fuse_kernels
from diffalign.models.adapters.core_methods import LoRA
from diffalign.models.adapters.methods import Start
from diffalign.models.kernels.checkpointing import set_checkpointing
from diffalign.models.kernels.quantized import Kind
from diffalign.training.inspect.activation_memory import SavedForBackward
from diffalign.training.inspect.memory_plan import OPTIMIZER_BYTES
from diffalign.training.inspect.meta_forward import FusedAttention, cast_as_autocast, half_inputs, unet_inputs
from diffalign.training.run import environment
from tests.gpu_models import SDXL_UNET

GB = 1e9
GIB = 2**30
PRESETS = Path(__file__).parent.parent / "training_configs" / "sdxl" / "memory"
VAE_FACTOR = 8  # pixels to a latent's place


def autocast_unet(unet_config: dict[str, Any], lora_rank: int | None, quantized: Kind | None = None) -> nn.Module:
    """A UNet without weights that casts as CUDA's autocast to bfloat16 does: `meta` has none."""
    if quantized is None:
        unet = meta_unet(unet_config, lora_rank)
    else:
        unet = meta_unet(unet_config, None).requires_grad_(False)
        LoRA(rank=lora_rank or LoRA.rank, quantize_base=quantized).prepare(unet, Start())
    unet.set_attn_processor(FusedAttention())
    return cast_as_autocast(unet)


def activations(unet: nn.Module, checkpointing: str, pictures: int, side: int) -> tuple[int, int]:
    """Bytes left for the backward pass of so many pictures, and at the peak of forward and backward.

    Gradients are there before, as in every micro-step but the first.
    """
    set_checkpointing(unet, checkpointing)  # type: ignore[arg-type]
    inputs = half_inputs(unet_inputs(unet, pictures, side))
    for p in unet.parameters():
        p.grad = torch.empty_like(p) if p.requires_grad else None
    with SavedForBackward() as kept:
        out = unet(**inputs)[0]
    del out
    with Peak() as peak:
        out = unet(**inputs)[0].float()
        loss = out.square().mean()
        del out
        loss.backward()
    return kept.bytes, peak.bytes


def _sizes(unet: nn.Module) -> dict[str, int]:
    """Numbers of parameters: trained and frozen, those that autocast computes in half precision and others."""
    sizes = dict.fromkeys(("trained half", "trained other", "frozen half", "frozen other"), 0)
    for p in unet.parameters():
        kind = "half" if p.dtype == torch.bfloat16 else "other"
        sizes[f"{'trained' if p.requires_grad else 'frozen'} {kind}"] += p.numel()
    return sizes


def held(config: Config, unet_config: dict[str, Any]) -> tuple[nn.Module, dict[str, int]]:
    """The UNet of a run without its weights, and what the run holds from its first update on: bytes by their purpose.

    Raises ConfigError for what is not counted here.
    """
    training, method = config.training, config.tuning.method
    if config.data.cache_dir is None or config.validation.prompts:
        raise ConfigError("counted are runs without VAE and text encoders: data.cache_dir and no validation.prompts")
    if method not in ("lora", "full") or training.mixed_precision != "bf16" or training.ema_decay or config.source:
        raise ConfigError("counted are bf16 runs of LoRA or of all weights, without EMA and without a source")
    if getattr(config.objective, "points_per_forward", 1) != 1:
        raise ConfigError("objective.points_per_forward: one point of a pair in a forward is counted here, set it to 1")
    codes = getattr(config.tuning, "quantize_base", None)
    unet = autocast_unet(unet_config, config.tuning.rank if method == "lora" else None, codes)
    if config.model.fused_kernels:
        fuse_kernels(unet.to(memory_format=torch.channels_last), "meta")
    n = _sizes(unet)
    half = 2 if training.bf16_weights else 4  # of a trained weight that autocast computes in half precision
    trained = half * n["trained half"] + 4 * n["trained other"]
    asked = config.objective.needs_reference and not config.data.cache_reference_errors
    return unet, {
        "weights": trained + 2 * n["frozen half"] + 4 * n["frozen other"] + sum(x.nbytes for x in unet.buffers()),
        "casts": 0 if training.bf16_weights else 2 * n["trained half"],
        "reference": 2 * n["trained half"] + 4 * n["trained other"] if asked and method == "full" else 0,
        "gradients": trained,
        "states": int(OPTIMIZER_BYTES[training.optimizer] * (n["trained half"] + n["trained other"])),
    }


def count(config: Config, unet_config: dict[str, Any]) -> dict[str, int]:
    """Bytes of a run on one device by what they are for. Raises ConfigError for what is not counted here."""
    unet, parts = held(config, unet_config)
    pictures, side = 2 * config.training.train_batch_size, (config.data.resolution or 1024) // VAE_FACTOR
    kept, peak = activations(unet, config.model.gradient_checkpointing, pictures, side)
    parts |= {"activations": kept, "backward": peak - kept}
    return {**parts, "sum": sum(parts.values())}


def card_of(name: str) -> int | None:
    """GB of the card that a preset's name ends in."""
    last = name.rpartition("_")[2]
    return int(last.removesuffix("gb")) if last.endswith("gb") and last[:-2].isdigit() else None


def presets(paths: Sequence[Path] = ()) -> dict[str, Path]:
    """Name -> file of the packaged presets, smallest card first; or of the files given."""
    found = list(paths) or sorted(PRESETS.glob("*.yaml"), key=lambda path: card_of(path.stem) or 0)
    return {path.stem: path for path in found}


def line(name: str, config: Config, unet_config: dict[str, Any]) -> dict[str, Any]:
    """A preset's row: its settings, its bytes ("states" are the optimiser's), the share of its card that is left."""
    parts, card = count(config, unet_config), card_of(name)
    return {
        "preset": name,
        "optimizer": config.training.optimizer,
        "checkpointing": config.model.gradient_checkpointing,
        "pairs": config.training.train_batch_size,
        **parts,
        "room": None if card is None else 1 - parts["sum"] / (card * GIB),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line of this module."""
    p = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    p.add_argument("configs", nargs="*", type=Path, help="default: the presets of training_configs/sdxl/memory")
    p.add_argument("--out", type=Path, required=True)
    a = p.parse_args(arguments)
    lines = [line(name, _run_config(path), SDXL_UNET) for name, path in presets(a.configs).items()]
    pictures = {
        f"{method} {checkpointing}": activations(autocast_unet(SDXL_UNET, rank), checkpointing, 1, 128)
        for method, rank in (("lora", 8), ("full", None))
        for checkpointing in ("none", "selective", "full")
    }
    a.out.mkdir(parents=True, exist_ok=True)
    found = {"activations of a picture of 1024 px, kept and at the peak": pictures, "presets": lines}
    (a.out / "memory.json").write_text(json.dumps({**found, "environment": environment()}, indent=2) + "\n")
    text = (
        table(
            ["one picture of 1024 px", "kept for the backward, GB", "at the peak, GB"],
            [[name, *(f"{size / GB:.2f}" for size in sizes)] for name, sizes in pictures.items()],
        )
        + "\n"
        + preset_table(lines)
    )
    (a.out / "memory.md").write_text(text)
    print(text)


def _run_config(path: Path) -> Config:
    config = load_config(path)
    if not isinstance(config, Config):
        raise ConfigError(f"{path}: a preference model's run is not counted here")
    return config


def preset_table(lines: Sequence[dict[str, Any]]) -> str:
    """Rows of presets, bytes in GB of 10^9, the room left on the card in percent of its GiB."""
    head = list(lines[0])

    def cell(key: str, value: Any) -> str:
        if value is None:
            return ""
        if key == "room":
            return f"{value:.0%}"
        return str(value) if key in ("preset", "optimizer", "checkpointing", "pairs") else f"{value / GB:.2f}"

    rows = [[cell(key, each[key]) for key in head] for each in lines]
    return table([{"sum": "sum, GB", "room": "left of the card"}.get(key, key) for key in head], rows)


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows]) + "\n"


if __name__ == "__main__":
    main()
