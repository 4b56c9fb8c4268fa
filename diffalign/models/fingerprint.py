"""Hashes of networks in memory: what a cache of their answers is a cache of."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch import nn

from diffalign.engine.schedule import NoiseSchedule


def network_fingerprint(unet: nn.Module, schedule: NoiseSchedule) -> str:
    """SHA-256 of all that decides a network's predictions as noise: weights as they compute, config, schedule.

    Reads every weight once (seconds for SDXL).
    """
    digest = hashlib.sha256()
    facts = [schedule.prediction_type, schedule.timestep_spacing, schedule.steps_offset, schedule.final_alpha_cumprod]
    digest.update(json.dumps(facts).encode())
    digest.update(schedule.alphas_cumprod.numpy().tobytes())
    hash_module(digest, unet)
    return digest.hexdigest()


def hash_module(digest: Any, module: nn.Module) -> None:
    """Feeds config, names, dtypes, shapes and weights of a module to a hash."""
    config = {k: v for k, v in dict(_config(module)).items() if not k.startswith("_")}
    digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in module.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())


def _config(module: nn.Module) -> Any:
    config = module.config
    if not hasattr(config, "to_diff_dict"):
        return config
    # transformers: only what differs from the class's defaults, less the version that happened to read it
    return {k: v for k, v in config.to_diff_dict().items() if k not in ("transformers_version", "dtype")}
