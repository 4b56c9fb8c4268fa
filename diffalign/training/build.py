"""From a config to everything a run needs, cheapest checks first: config, data, then models, then encoding."""

from __future__ import annotations

import importlib.util
import logging
import os
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from diffalign.config.schema import Config, PreferenceModelConfig
from diffalign.config.sections import ModelSection, TuningSection
from diffalign.data.row import DataError
from diffalign.data.table.open import open_pairs
from diffalign.data.table.pairs import PairTable
from diffalign.data.table.prompts import Table, open_prompts
from diffalign.data.table.score_aggregation import use_axes
from diffalign.data.table.users import open_users, use_users
from diffalign.data.table.winners import open_winners
from diffalign.engine.schedule import NoiseSchedule
from diffalign.errors import DiffalignError, MissingPackageError
from diffalign.experimental.fusing import fuse_kernels
from diffalign.models.adapters.lora import (
    ADAPTER,
    adapter_weights,
    add_lora,
    check_targets,
    fuse_lora,
    load_lora,
    lora_layers,
)
from diffalign.models.adapters.merge import merge_into
from diffalign.models.adapters.save_load import check_tuned, find_tuned
from diffalign.models.adapters.user_attention import add_user_attention, set_user, user_branch
from diffalign.models.kernels.attention import set_attention
from diffalign.models.kernels.checkpointing import Checkpointing, place, set_checkpointing, store_for_autocast
from diffalign.models.kernels.compile import compile_blocks
from diffalign.models.loading.base import Base, load_base, vae_factor
from diffalign.models.loading.encoder import Encoder
from diffalign.models.loading.family import ModelError, check_resolution
from diffalign.models.loading.modules import UNet
from diffalign.models.policy.networks import Networks
from diffalign.models.policy.reference import FrozenCopy, HeldLora, Reference, ReferenceKind, make_reference
from diffalign.models.policy.snapshot_reference import FormerCopy, make_former
from diffalign.models.spec import ModelSpec
from diffalign.objectives import Objective
from diffalign.objectives.base import require_terms
from diffalign.sources import Source
from diffalign.training.build_source import make_feed
from diffalign.training.checkpoints.identity import Identity, refuse_others, run_identity
from diffalign.training.optim.optimizers import effective_lr, make_lr_scheduler, make_optimizer
from diffalign.training.processes import PATIENCE, all_in_use, before_accelerate, on_main
from diffalign.training.score_units import check_units
from diffalign.training.settle import settled, with_precision

log = logging.getLogger(__name__)

AUTOCAST = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Run:
    """All the parts of a run, built and placed on their devices."""

    config: Config
    accelerator: Accelerator
    base: Base
    unet: UNet  # the policy, unwrapped
    networks: Networks
    source: Source
    objective: Objective
    parameters: list[nn.Parameter]  # what the optimiser trains
    optimizer: torch.optim.Optimizer
    lr_scheduler: LRScheduler
    scaler: torch.amp.GradScaler  # disabled unless fp16
    ema: Any | None  # diffusers' EMAModel
    reference_kind: ReferenceKind
    lr: float  # in force, after scale_lr
    table: Table
    identity: Identity = field(default_factory=dict)  # what the run is made from, for its checkpoints

    @property
    def output_dir(self) -> Path:
        """Where the run writes."""
        return Path(self.config.output_dir)


def open_table(
    config: Config | PreferenceModelConfig, accelerator: Accelerator | None = None, *, keep_ties: bool = False
) -> Table:
    """The usable pairs of the run's data, or the prompts of a source that makes its pictures; needs no model.

    With several processes the first reads the files and hands the others its table. Raises DataError in all of them.
    """
    if accelerator is None:
        return _open_table(config, keep_ties)
    return on_main(accelerator, lambda: _open_table(config, keep_ties))


def _open_table(config: Config | PreferenceModelConfig, keep_ties: bool) -> Table:
    data, source = config.data, config.source if isinstance(config, Config) else None
    if source is not None and isinstance(config, Config):
        check_units(config, None)
    if source is not None and source.data == "prompts":
        return open_prompts(data.path, limit=data.max_pairs)
    if source is not None:
        winners = open_winners(data.path, data.spec)
        if isinstance(winners, PairTable):
            no_terms(winners, f"source {source.name} makes its pairs")
        return winners
    table = open_pairs(data.path, replace(data.spec, keep_ties=keep_ties))
    table.require_usable()
    return prepared(config, table)


def prepared(config: Config | PreferenceModelConfig, table: PairTable) -> PairTable:
    """Pairs with what a run's `data` section adds: scores, users, the hash of their images. Raises DataError."""
    data, batch = config.data, config.training.train_batch_size
    if batch > len(table):
        limit = "" if data.max_pairs is None else f" (data.max_pairs: {data.max_pairs})"
        raise DataError(
            f"training.train_batch_size: {batch} pairs at a time, and {data.path} has {len(table)} usable ones{limit}; "
            f"give {len(table)} or fewer, or more pairs"
        )
    if data.cache_reference_errors and "mask" in table.terms:
        raise DataError(
            "data.cache_reference_errors: an error under a mask is the mask's own; train without one of them"
        )
    if data.axes:
        use_axes(table, data.axes, data.aggregate, relabel=data.relabel)
    if isinstance(config, Config):
        check_units(config, table)
    if isinstance(config, Config) and config.tuning.method == "user_attention":
        users = None if data.users is None else open_users(data.users)
        use_users(table, users, where=f"data.users: {data.users}")
        if users is not None and config.validation.user is not None:
            users.of(config.validation.user, "validation.user")  # an id that is not there is said now
    elif table.layout.user_embed is not None:
        log.info("the pairs have users (%s); only tuning.method: user_attention uses them", table.layout.user_embed)
    if data.cache_dir is not None:
        _ = table.identity  # may read every image once: done here, before other processes get the table
    return table


def no_terms(table: PairTable, why: str) -> None:
    """Raises DataError for pairs with weights, margins or masks in a run that cannot use them."""
    if table.terms:
        left_out = ", ".join(f'{part}: ""' for part in table.terms)
        raise DataError(
            f"the data have {', '.join(table.terms)} of each pair, which cannot act here, because {why}: leave them "
            f"out with data.columns: {{{left_out}}}"
        )


def load_run_base(model: ModelSection) -> Base:
    """The base model that a config names, in float32 on the CPU."""
    base = load_base(ModelSpec(**model.model_dump(include={field.name for field in fields(ModelSpec)})))
    return trained_as(base, model)


def trained_as(base: Base, model: ModelSection) -> Base:
    """A base with the noise and the null prompt that a config says it is trained on; its sampler stays its own.

    Raises DiffalignError for a null prompt of zeros where the base's family has none.
    """
    if model.rescale_betas_zero_snr is not None:
        config = {**base.scheduler_config, "rescale_betas_zero_snr": model.rescale_betas_zero_snr}
        base = replace(base, schedule=NoiseSchedule.from_config(config))
    if model.force_zeros_for_empty_prompt is not None:
        if base.family.name != "sdxl":
            raise DiffalignError(
                f"model.force_zeros_for_empty_prompt = {model.force_zeros_for_empty_prompt}: only SDXL has a null "
                f"prompt of zeros, and {base.source!r} is an {base.family.name} model, whose null prompt is the "
                'encoded ""; leave the key out'
            )
        assert base.text is not None
        base = replace(base, text=replace(base.text, zero_empty_prompt=model.force_zeros_for_empty_prompt))
    return base


def make_accelerator(config: Config | PreferenceModelConfig) -> Accelerator:
    """Devices and processes as the launcher set them up.

    Autocast and accumulation are not accelerate's here: the networks cast at one border, and the loop owns
    accumulation. Raises DiffalignError where launched processes are not all in use, for a device that is not there and
    for sharded strategies, which checkpoints do not cover; MissingPackageError for a tracker that is not installed.
    """
    trackers = None if config.training.report_to == "none" else config.training.report_to
    if trackers == "wandb" and importlib.util.find_spec("wandb") is None:
        raise MissingPackageError(
            "training.report_to: wandb is not installed; pip install wandb, or use tensorboard or none"
        )
    before_accelerate()
    accelerator = Accelerator(
        mixed_precision="no",
        log_with=trackers,
        project_dir=config.output_dir,
        kwargs_handlers=[
            InitProcessGroupKwargs(timeout=PATIENCE),
            DistributedDataParallelKwargs(gradient_as_bucket_view=True, broadcast_buffers=False),
        ],
    )
    all_in_use(accelerator)
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")  # accelerate launch says "no" when nothing was asked
    ours = with_precision(config, accelerator.device).training.mixed_precision
    if launched not in ("no", ours) and accelerator.is_main_process:
        log.warning(
            "accelerate was launched with mixed precision %s; in force is the config's training.mixed_precision: %s",
            launched,
            ours,
        )
    kind = accelerator.distributed_type.value
    if kind in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        raise DiffalignError(f"accelerate's {kind} is not supported; launch with plain data parallelism (--multi_gpu)")
    return accelerator


def build(config: Config, accelerator: Accelerator, table: Table | None = None, base: Base | None = None) -> Run:
    """Builds every part of the run; afterwards only steps are left to take. What is given is not loaded again."""
    torch.manual_seed(config.seed)
    table = open_table(config, accelerator) if table is None else table
    objective: Objective = config.objective
    if isinstance(table, PairTable):
        require_terms(objective, margin="margin" in table.terms, signs=table.negative_masks)
    device = accelerator.device
    torch.backends.cuda.matmul.allow_tf32 = config.training.allow_tf32
    torch.backends.cudnn.allow_tf32 = config.training.allow_tf32  # torch's own default is True

    _check_reference(config.tuning)
    base = load_run_base(config.model) if base is None else trained_as(base, config.model)
    config = settled(config, device, base.family.name)
    training = config.training
    _check_start(config.tuning, base.unet)
    identity = run_identity(config, table, base)
    refuse_others(config, identity)
    objective.check_schedule(base.schedule)
    encoder = Encoder(base, device)
    resolution = config.data.resolution or base.family.default_resolution
    if base.vae is not None:
        check_resolution(base.unet, vae_factor(base.vae), resolution, "data.resolution")
    feed = make_feed(config, accelerator, table, encoder, resolution)
    unet = prepare_policy(base, config, device, table.user_dim if isinstance(table, PairTable) else None)
    kind: ReferenceKind = "none"
    if objective.needs_reference:
        kind = "lora_off" if lora_layers(unet) else "user_off" if user_branch(unet) is not None else "copy"
    autocast = AUTOCAST[training.mixed_precision]
    place(unet, device)
    former = None
    if config.source is not None and config.source.own_reference:
        kind, former = "former", make_former(unet, base.family, autocast)
    reference: Reference | None = former
    if config.tuning.reference is not None and config.tuning.method == "lora":
        reference = HeldLora(unet, adapter_weights(unet, config.tuning.reference))
        kind = reference.kind
    elif former is None:
        reference = make_reference(kind, unet, autocast)
    if config.model.compile:
        compile_blocks(unet)
        if isinstance(reference, FrozenCopy | FormerCopy):
            compile_blocks(reference.module)
    if config.data.cache_dir is not None and not config.validation.prompts:
        encoder.unload()

    parameters = [p for p in unet.parameters() if p.requires_grad]
    lr = effective_lr(training, accelerator.num_processes)
    optimizer = make_optimizer(parameters, training, lr, config.seed)
    networks = Networks(
        accelerator.prepare_model(unet),
        family=base.family,
        schedule=base.schedule,
        reference=reference,
        autocast_dtype=autocast,
        device=device,
    )
    return Run(
        config=config,
        accelerator=accelerator,
        base=base,
        unet=unet,
        networks=networks,
        source=feed(networks, unet, former),
        objective=objective,
        parameters=parameters,
        optimizer=optimizer,
        lr_scheduler=make_lr_scheduler(optimizer, training),
        scaler=torch.amp.GradScaler(device.type, enabled=training.mixed_precision == "fp16"),
        ema=_make_ema(parameters, training.ema_decay),
        reference_kind=kind,
        lr=lr,
        table=table,
        identity=identity,
    )


def _check_reference(tuning: TuningSection) -> None:
    """Raises ModelError for tuned weights that cannot be this run's reference, before anything is encoded."""
    if tuning.reference is not None and find_tuned(tuning.reference).kind == "unet" and tuning.method == "lora":
        raise ModelError(
            f"tuning.reference: {tuning.reference} is a full UNet, and a LoRA on top of it would not be one of the "
            "base's; give a LoRA file, use tuning.method: full, or make that UNet part of the base model"
        )


def _check_start(tuning: TuningSection, unet: UNet) -> None:
    """Raises ModelError for adapters that the base's UNet cannot take, before anything is encoded."""
    given = [path for path in (tuning.resume_lora, tuning.reference) if path is not None]
    for path in given:
        check_tuned(unet, path)
    if tuning.method == "lora" and not given:
        check_targets(unet, tuning.target_modules, tuning.rank)


def prepare_policy(base: Base, config: Config, device: torch.device, user_dim: int | None = None) -> UNet:
    """The base's UNet made trainable as configured: attention, checkpointing, and LoRA, user attention or all weights.

    `user_dim` is the length of the users' embeddings, for user attention.
    """
    unet, tuning = base.unet, config.tuning
    autocast = AUTOCAST[config.training.mixed_precision]
    set_attention(unet, config.model.attention, device)
    if tuning.method == "lora":
        if (start := tuning.resume_lora or tuning.reference) is not None:
            load_lora(unet, start)
            found = unet.peft_config[ADAPTER]
            if (found.r, found.lora_alpha) != (tuning.rank, tuning.lora_alpha):
                log.warning(
                    "%s has rank %d and alpha %g: these are in force, not tuning.rank and tuning.alpha",
                    start,
                    found.r,
                    found.lora_alpha,
                )
        else:
            add_lora(unet, tuning.rank, tuning.lora_alpha, tuning.target_modules, seed=config.seed)
        fuse_lora(unet)
    elif tuning.method == "user_attention":
        assert user_dim is not None, "the table was opened with its users"
        add_user_attention(unet, user_dim, tuning.user_tokens, tuning.user_scale, seed=config.seed)
        if config.validation.user is not None:
            set_user(unet, open_users(str(config.data.users)).of(config.validation.user, "validation.user"))
    else:
        if tuning.reference is not None:
            merge_into(unet, [(tuning.reference, 1.0)])
        if config.training.bf16_weights:
            store_for_autocast(unet, torch.bfloat16)  # while it is frozen: those become the trained weights
        unet.requires_grad_(True)
    if tuning.method != "full" and autocast is not None:
        store_for_autocast(unet, autocast)
    if config.model.channels_last:
        unet.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # no overload of torch's has it
    if config.model.fused_kernels:
        fuse_kernels(unet, device)
    set_checkpointing(unet, cast("Checkpointing", config.model.gradient_checkpointing))  # "auto" is settled
    return unet


def _make_ema(parameters: list[nn.Parameter], decay: float | None) -> Any | None:
    if decay is None:
        return None
    from diffusers.training_utils import EMAModel

    return EMAModel(parameters, decay=decay, foreach=True)
