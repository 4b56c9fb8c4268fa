"""Sharding as `accelerate launch` asks for it (a section `fsdp_config` with `fsdp_version: 2`), or a refusal by name.

accelerate prepares FSDP2 only for a model together with its optimiser, and never on a CPU; the reference would stay
whole. So the settings are accelerate's, and `models/policy/sharding.py` applies PyTorch's `fully_shard`. Settings that
would be without effect there are refused.
"""

from __future__ import annotations

import logging
import os
from typing import Any

import torch

from diffalign.config.schema import AnyConfig, Config
from diffalign.errors import DiffalignError
from diffalign.training.distributed.launcher_settings import LAUNCH_CONFIGS, shards

log = logging.getLogger(__name__)

# what a variable that accelerate sets may be besides absent, and what to do where it is something else
_SETTINGS = {
    "FSDP_RESHARD_AFTER_FORWARD": (
        ("true",),
        "fsdp_reshard_after_forward: weights that stay gathered after the forward without grad of a reference would "
        "miss the next update; set true",
    ),
    "FSDP_OFFLOAD_PARAMS": (
        ("false",),
        "fsdp_offload_params: shards in main memory are not supported; set false, and use more processes or LoRA",
    ),
    "FSDP_ACTIVATION_CHECKPOINTING": (
        ("false",),
        "fsdp_activation_checkpointing: the run's own setting is model.gradient_checkpointing; set false",
    ),
    "FSDP_AUTO_WRAP_POLICY": (
        ("NO_WRAP", "TRANSFORMER_BASED_WRAP"),
        "fsdp_auto_wrap_policy: the units are always the UNet's blocks; leave it out",
    ),
    "FSDP_TRANSFORMER_CLS_TO_WRAP": (
        ("",),
        "fsdp_transformer_layer_cls_to_wrap: the units are always the UNet's blocks; leave it out",
    ),
    "FSDP_IGNORED_MODULES": (("",), "fsdp_ignored_modules: every weight is sharded; leave it out"),
    "FSDP_STATE_DICT_TYPE": (
        ("SHARDED_STATE_DICT",),
        "fsdp_state_dict_type: checkpoints have sharded states and whole weights; set SHARDED_STATE_DICT",
    ),
}


def check_sharding(config: AnyConfig) -> None:
    """Raises DiffalignError for a launcher's or a run's settings that sharding does not support.

    For use before accelerate reads its variables; it also keeps transformers from loading text encoders in the main
    process alone, which accelerate asks it to do.
    """
    if not shards():
        return
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    for name, (allowed, remedy) in _SETTINGS.items():
        value = os.environ.get(name, allowed[0])
        if value.lower() not in [each.lower() for each in allowed]:
            raise DiffalignError(
                f"{remedy} (accelerate's config has {value!r}; {LAUNCH_CONFIGS}/fsdp2.yaml is one that works)"
            )
    if not isinstance(config, Config):
        raise DiffalignError(
            "FSDP: a preference model is not sharded, as it is small; launch with data parallelism (--multi_gpu)"
        )
    for key, reason in _unsupported(config).items():
        raise DiffalignError(f"{key} with FSDP: {reason}. Change it, or launch with data parallelism (--multi_gpu)")


def _unsupported(config: Config) -> dict[str, str]:
    """Settings of the run that sharding does not support, with the reason."""
    model, training = config.model, config.training
    method = config.tuning.method
    found = {
        f"training.mixed_precision: {training.mixed_precision}": training.mixed_precision == "fp16"
        and "each process would find the overflows of its own shards alone and scale its loss by itself; use bf16",
        f"training.optimizer: {training.optimizer}": training.optimizer != "adamw"
        and "its states are not made for shards (blocks of 8 bits, factors of a whole matrix, random rounding that "
        "belongs to a whole weight); use adamw",
        "model.compile: true": model.compile
        and "a graph of a block would contain weights that are gathered and freed outside of it; use false",
        "model.channels_last: true": model.channels_last and "FSDP2 takes weights in the contiguous layout only",
        f"tuning.method: {method}": method not in ("full", "lora") and "only full and lora are supported",
        f"tuning.quantize_base: {getattr(config.tuning, 'quantize_base', None)}": bool(
            getattr(config.tuning, "quantize_base", None)
        )
        and "codes are no weights that FSDP2 shards; each process would hold all of them",
        f"training.ref_model_sync_steps: {training.ref_model_sync_steps}": training.ref_model_sync_steps is not None
        and "a reference that follows the policy holds the weights as they were before they were cut; use null",
        "tuning.use_dora: true": bool(getattr(config.tuning, "use_dora", False))
        and "the lengths of rows need the whole weight outside of a block's forward",
    }
    return {key: reason for key, reason in found.items() if reason}


def mesh_of(accelerator: Any) -> Any | None:
    """The mesh of all processes to shard over; None where nothing is sharded."""
    if not shards():
        return None
    if accelerator.num_processes == 1:
        log.warning("FSDP: one process has nothing to share out; it trains as without FSDP")
        return None
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule

    if not hasattr(FSDPModule, "reset_iter_state"):
        raise DiffalignError(f"FSDP: torch {torch.__version__} is too old for sharding; torch 2.13 is tested")
    return init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
