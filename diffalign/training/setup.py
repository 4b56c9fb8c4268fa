"""From a config to everything a run needs, cheapest checks first: config, data, then models, then encoding."""

from __future__ import annotations

import importlib.util
import logging
import os
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs, broadcast_object_list
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from diffalign.config import Config, PreferenceModelConfig
from diffalign.data.cache import CacheKey, open_cache
from diffalign.data.encode import encode_cache
from diffalign.data.readers import open_pairs
from diffalign.data.rows import DataError
from diffalign.data.source import OfflinePairs, Online
from diffalign.data.table import PairTable
from diffalign.models.attention import set_attention
from diffalign.models.base import Base, load_base
from diffalign.models.encoder import Encoder
from diffalign.models.lora import ADAPTER, add_lora, load_lora, lora_layers
from diffalign.models.memory import set_checkpointing, store_for_autocast
from diffalign.models.networks import Networks
from diffalign.models.reference import ReferenceKind, make_reference
from diffalign.objectives import Objective
from diffalign.training.optim import effective_lr, make_lr_scheduler, make_optimizer

log = logging.getLogger(__name__)

PATIENCE = timedelta(hours=12)  # others wait while one process examines the data or writes a checkpoint
AUTOCAST = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Run:
    """All the parts of a run, built and placed on their devices."""

    config: Config
    accelerator: Accelerator
    base: Base
    unet: nn.Module  # the policy, unwrapped
    networks: Networks
    source: OfflinePairs
    objective: Objective
    parameters: list[nn.Parameter]  # what the optimiser trains
    optimizer: torch.optim.Optimizer
    lr_scheduler: LRScheduler
    scaler: torch.amp.GradScaler  # disabled unless fp16
    ema: Any | None  # diffusers' EMAModel
    reference_kind: ReferenceKind
    lr: float  # in force, after scale_lr
    table: PairTable

    @property
    def output_dir(self) -> Path:
        """Where the run writes."""
        return Path(self.config.output_dir)


def open_table(
    config: Config | PreferenceModelConfig, accelerator: Accelerator | None = None, *, keep_ties: bool = False
) -> PairTable:
    """The usable pairs of the run's data; needs no model.

    With several processes the first reads the files and hands the others its table. Raises DataError in all of them.
    """
    if accelerator is None or accelerator.num_processes == 1:
        return _open_table(config, keep_ties)
    found: list[PairTable | DataError | None] = [None]
    if accelerator.is_main_process:
        try:
            found = [_open_table(config, keep_ties)]
        except DataError as error:
            found = [error]
    (table,) = broadcast_object_list(found)
    if isinstance(table, DataError):
        raise table
    return table


def _open_table(config: Config | PreferenceModelConfig, keep_ties: bool) -> PairTable:
    data = config.data
    table = open_pairs(
        data.path,
        format=data.format,
        split=data.split,
        keep_ties=keep_ties,
        max_pairs=data.max_pairs,
        invert_preference=data.invert_preference,
        columns=data.columns,
        verify=data.verify,
    )
    table.require_usable()
    if data.cache_dir is not None:
        _ = table.identity  # may read every image once: done here, before other processes get the table
    return table


def load_run_base(config: Config | PreferenceModelConfig) -> Base:
    """The base model that the config names, in float32 on the CPU."""
    model = config.model
    return load_base(
        model.pretrained_model_name_or_path,
        pretrained_vae_model_name_or_path=model.pretrained_vae_model_name_or_path,
        revision=model.revision,
        variant=model.variant,
        prediction_type=model.prediction_type,
        single_file_config=model.single_file_config,
    )


def make_accelerator(config: Config | PreferenceModelConfig) -> Accelerator:
    """Devices and processes as `accelerate launch` set them up.

    Autocast and accumulation are not accelerate's here: the networks cast at one border, and the loop owns
    accumulation. Raises ValueError for sharded strategies, which checkpoints do not cover, and ImportError for a
    tracker that is not installed.
    """
    trackers = None if config.training.report_to == "none" else config.training.report_to
    if trackers == "wandb" and importlib.util.find_spec("wandb") is None:
        raise ImportError("training.report_to: wandb is not installed; pip install wandb, or use tensorboard or none")
    accelerator = Accelerator(
        mixed_precision="no",
        log_with=trackers,
        project_dir=config.output_dir,
        kwargs_handlers=[
            InitProcessGroupKwargs(timeout=PATIENCE),
            DistributedDataParallelKwargs(gradient_as_bucket_view=True, broadcast_buffers=False),
        ],
    )
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if launched != config.training.mixed_precision and accelerator.is_main_process:
        log.warning(
            "accelerate was launched with mixed precision %s; in force is the config's training.mixed_precision: %s",
            launched,
            config.training.mixed_precision,
        )
    kind = accelerator.distributed_type.value
    if kind in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        raise ValueError(f"accelerate's {kind} is not supported; launch with plain data parallelism (--multi_gpu)")
    return accelerator


def encode_run(
    config: Config, table: PairTable, encoder: Encoder, resolution: int, process: int, processes: int
) -> CacheKey:
    """Fills the run's encode cache as far as it is not there yet; this process writes its share of the shards.

    Returns the key of that cache.
    """
    data = config.data
    done = encode_cache(
        table,
        encoder,
        str(data.cache_dir),
        resolution=resolution,
        center_crop=data.center_crop,
        random_flip=data.random_flip,
        variants=data.cache_variants,
        run_seed=config.seed,
        dtype=data.cache_dtype,
        num_workers=data.dataloader_num_workers,
        process=process,
        processes=processes,
    )
    if done.shards_written:
        log.info("encoded %d shards into %s", done.shards_written, done.folder)
    for problem in done.problems:
        log.warning("pair left out of the cache: %s", problem)
    return done.key


def build(config: Config, accelerator: Accelerator, table: PairTable | None = None) -> Run:
    """Builds every part of the run; afterwards only steps are left to take."""
    torch.manual_seed(config.seed)
    table = open_table(config, accelerator) if table is None else table
    objective: Objective = config.objective
    training, device = config.training, accelerator.device
    torch.backends.cuda.matmul.allow_tf32 = training.allow_tf32
    torch.backends.cudnn.allow_tf32 = training.allow_tf32  # torch's own default is True

    base = load_run_base(config)
    encoder = Encoder(base, device)
    resolution = config.data.resolution or base.family.default_resolution
    source = _make_source(config, accelerator, table, encoder, resolution)
    unet = prepare_policy(base, config, device)
    kind: ReferenceKind = "none"
    if objective.needs_reference:
        kind = "lora_off" if lora_layers(unet) else "copy"
    autocast = AUTOCAST[training.mixed_precision]
    unet.to(device)
    reference = make_reference(kind, unet, autocast)
    if config.data.cache_dir is not None and not config.validation.prompts:
        encoder.unload()

    parameters = [p for p in unet.parameters() if p.requires_grad]
    lr = effective_lr(training, accelerator.num_processes)
    optimizer = make_optimizer(parameters, training, lr)
    wrapped = accelerator.prepare_model(unet)
    return Run(
        config=config,
        accelerator=accelerator,
        base=base,
        unet=unet,
        networks=Networks(
            wrapped,
            family=base.family,
            schedule=base.schedule,
            reference=reference,
            autocast_dtype=autocast,
            device=device,
        ),
        source=source,
        objective=objective,
        parameters=parameters,
        optimizer=optimizer,
        lr_scheduler=make_lr_scheduler(optimizer, training),
        scaler=torch.amp.GradScaler(device.type, enabled=training.mixed_precision == "fp16"),
        ema=_make_ema(parameters, training.ema_decay),
        reference_kind=kind,
        lr=lr,
        table=table,
    )


def prepare_policy(base: Base, config: Config, device: torch.device) -> nn.Module:
    """The base's UNet made trainable as configured: attention, checkpointing, LoRA or all weights."""
    unet, tuning = base.unet, config.tuning
    if tuning.method == "lora":
        if tuning.resume_lora is not None:
            load_lora(unet, tuning.resume_lora)
            found = unet.peft_config[ADAPTER]
            if (found.r, found.lora_alpha) != (tuning.rank, tuning.lora_alpha):
                log.warning(
                    "tuning.resume_lora has rank %d and alpha %g: these are in force, not tuning.rank and tuning.alpha",
                    found.r,
                    found.lora_alpha,
                )
        else:
            add_lora(unet, tuning.rank, tuning.lora_alpha, tuning.target_modules, seed=config.seed)
        autocast = AUTOCAST[config.training.mixed_precision]
        if autocast is not None:
            store_for_autocast(unet, autocast)
    else:
        unet.requires_grad_(True)
    set_attention(unet, config.model.attention, device)
    set_checkpointing(unet, config.model.gradient_checkpointing)
    return unet


def _make_source(
    config: Config, accelerator: Accelerator, table: PairTable, encoder: Encoder, resolution: int
) -> OfflinePairs:
    data = config.data
    make = partial(
        OfflinePairs,
        table,
        run_seed=config.seed,
        train_batch_size=config.training.train_batch_size,
        gradient_accumulation_steps=config.training.gradient_accumulation_steps,
        process=accelerator.process_index,
        processes=accelerator.num_processes,
        time_ids=encoder.time_ids,
        prompt_dropout=data.proportion_empty_prompts,
        with_uncond=config.objective.needs_uncond,
        num_workers=data.dataloader_num_workers,
        pin_memory=accelerator.device.type == "cuda",
    )
    if data.cache_dir is None:
        return make(Online(encoder, resolution, center_crop=data.center_crop, random_flip=data.random_flip))
    key = encode_run(config, table, encoder, resolution, accelerator.process_index, accelerator.num_processes)
    accelerator.wait_for_everyone()
    return make(open_cache(data.cache_dir, key))


def _make_ema(parameters: list[nn.Parameter], decay: float | None) -> Any | None:
    if decay is None:
        return None
    from diffusers.training_utils import EMAModel

    return EMAModel(parameters, decay=decay, foreach=True)
