"""Settings of accelerate's own config that would change a run behind its config: each is used, or refused by name.

`accelerate launch` passes its config to the processes as environment variables. diffalign takes from it how many
processes there are and where. Precision, compilation and accumulation belong to the config of the run.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from diffalign.errors import DiffalignError

LAUNCH_CONFIGS = "training_configs/accelerate"
_FSDP1 = (
    "accelerate's config asks for FSDP version 1 (fsdp_version), and only fsdp_version: 2 shards here: "
    f"`accelerate to-fsdp2` rewrites the file, or take {LAUNCH_CONFIGS}/fsdp2.yaml"
)
_REFUSED = {
    "ACCELERATE_USE_DEEPSPEED": (
        "accelerate's config asks for DeepSpeed (use_deepspeed, deepspeed_config), which is not supported: ZeRO-2 "
        "shards gradients and optimiser states, and FSDP2 does so too, with the weights besides. Take "
        f"{LAUNCH_CONFIGS}/fsdp2.yaml"
    ),
    "ACCELERATE_USE_MEGATRON_LM": (
        "accelerate's config asks for Megatron-LM (use_megatron_lm, megatron_lm_config), which trains language models "
        f"alone: take {LAUNCH_CONFIGS}/ddp.yaml or fsdp2.yaml"
    ),
    "ACCELERATE_USE_PARALLELISM_CONFIG": (
        "accelerate's config asks for tensor or context parallelism (use_parallelism_config), which is not supported "
        f"for UNets: remove parallelism_config, or take {LAUNCH_CONFIGS}/ddp.yaml or fsdp2.yaml"
    ),
}


def refuse_launcher_settings(environment: Mapping[str, str] = os.environ) -> None:
    """Raises DiffalignError for what accelerate's config asks for and is not done here.

    Called before any group of processes is made. On a CPU accelerate itself leaves FSDP out without a word.
    """
    for name, said in _REFUSED.items():
        if is_true(environment.get(name)):
            raise DiffalignError(said)
    if shards(environment) and environment.get("FSDP_VERSION", "1") != "2":
        raise DiffalignError(_FSDP1)
    backend = environment.get("ACCELERATE_DYNAMO_BACKEND", "no")
    if backend.lower() not in ("", "no"):
        raise DiffalignError(
            f"accelerate's config asks for torch.compile (dynamo_backend: {backend}) of the whole UNet: remove "
            "dynamo_config (or --dynamo_backend) there, and set model.compile in the run's config"
        )
    if environment.get("ACCELERATE_MIXED_PRECISION", "no") == "fp8":
        raise DiffalignError(
            "accelerate's config asks for mixed_precision: fp8, which is not supported: set it to 'no' there, and "
            "training.mixed_precision in the run's config (no, bf16 or fp16)"
        )
    steps = environment.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if steps not in ("", "1"):
        raise DiffalignError(
            f"accelerate was given gradient_accumulation_steps {steps}: unset "
            "ACCELERATE_GRADIENT_ACCUMULATION_STEPS, and set training.gradient_accumulation_steps in the run's config"
        )


def shards(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether accelerate's config asks for FSDP, of either version."""
    return is_true(environment.get("ACCELERATE_USE_FSDP"))


def is_true(value: str | None) -> bool:
    """What accelerate reads as true in an environment variable."""
    return (value or "").lower() in ("1", "true", "yes", "y", "on", "t")
