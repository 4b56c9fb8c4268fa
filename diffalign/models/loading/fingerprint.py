"""Hashes of networks in memory and of weight files, which identify caches and checkpoints."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from diffalign.engine.schedule import NoiseSchedule
from diffalign.models.loading.modules import UNet

SAMPLED = 1024  # values of each tensor in an outline


def network_fingerprint(unet: UNet, schedule: NoiseSchedule) -> str:
    """SHA-256 of all that determines a network's predicted noise: weights in their compute dtype, config, schedule.

    Reads every weight once (seconds for SDXL).
    """
    digest = hashlib.sha256()
    facts = [schedule.prediction_type, schedule.timestep_spacing, schedule.steps_offset, schedule.final_alpha_cumprod]
    digest.update(json.dumps(facts).encode())
    digest.update(schedule.alphas_cumprod.numpy().tobytes())
    hash_module(digest, unet)
    return digest.hexdigest()


def outline(module: nn.Module) -> str:
    """SHA-256 of names, shapes and about a thousand values of each tensor, which any training changes.

    Takes milliseconds. It may miss a change of single values. The config is left out: another version of a library
    writes it with other keys.
    """
    return _outline(module.state_dict().items())


def outline_files(path: Path) -> str:
    """The same of a .safetensors file, or of all those in a folder."""
    digest = hashlib.sha256()
    for file in sorted(path.glob("*.safetensors")) if path.is_dir() else [path]:
        with safe_open(file, "pt") as opened:
            names = sorted(opened.keys())
            digest.update(_outline((name, opened.get_tensor(name)) for name in names).encode())
    return digest.hexdigest()


def _outline(tensors: Iterable[tuple[str, Tensor]]) -> str:
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        flat = tensor.detach().flatten()
        digest.update(flat[:: max(1, flat.numel() // SAMPLED)].cpu().double().numpy().tobytes())
    return digest.hexdigest()


def hash_module(digest: Any, module: nn.Module) -> None:
    """Updates a hash with the config, names, dtypes, shapes and weights of a module."""
    config = {k: v for k, v in dict(_config(module)).items() if not k.startswith("_")}
    digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in module.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())


def _config(module: nn.Module) -> Any:
    config: Any = module.config
    if not hasattr(config, "to_diff_dict"):
        return config
    # transformers: the values that differ from the class's defaults, without the version of the library
    return {k: v for k, v in config.to_diff_dict().items() if k not in ("transformers_version", "dtype")}
