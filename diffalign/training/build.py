"""From a config to all parts of a run, cheapest checks first: config, data, then models, then encoding."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import Tensor

from diffalign.config.schema import Config
from diffalign.config.sections import DataSection, ModelSection
from diffalign.data.table.pairs import PairTable
from diffalign.data.table.prompts import Table
from diffalign.data.table.users import open_users
from diffalign.engine.schedule import NoiseSchedule
from diffalign.errors import DiffalignError
from diffalign.experimental.fusing import fuse_kernels
from diffalign.models.adapters.methods import Start
from diffalign.models.kernels.attention import set_attention
from diffalign.models.kernels.checkpointing import Checkpointing, place, set_checkpointing, store_for_autocast
from diffalign.models.kernels.compile import compile_blocks
from diffalign.models.loading.base import Base, load_base, vae_factor
from diffalign.models.loading.components import complete_scheduler
from diffalign.models.loading.encoder import Encoder
from diffalign.models.loading.family import Family, check_resolution
from diffalign.models.loading.modules import UNet
from diffalign.models.policy.moving_reference import Decay, MovingReference, ReferenceSync
from diffalign.models.policy.networks import Networks
from diffalign.models.policy.reference import Reference
from diffalign.models.policy.sharding import HostCopy, parts, shard
from diffalign.models.policy.snapshot_reference import FormerCopy, FormerLora, make_former
from diffalign.models.text.notices import counted
from diffalign.objectives.base import require_terms
from diffalign.rewards import Scorer, load_scorer
from diffalign.training.build_source import source_builder
from diffalign.training.checkpoints.identity import refuse_others, run_identity
from diffalign.training.distributed.sharding import mesh_of
from diffalign.training.heldout.build import build_points
from diffalign.training.heldout.guards import prompts_of_guards
from diffalign.training.open_data import open_table, refuse_weights
from diffalign.training.optim.optimizers import effective_lr, make_lr_scheduler, make_optimizer
from diffalign.training.processes import on_main
from diffalign.training.settle import settled
from diffalign.training.trainable import Run as Run

log = logging.getLogger(__name__)

AUTOCAST = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def load_run_base(model: ModelSection) -> Base:
    """The base model that a config names, in float32 on the CPU."""
    return trained_as(load_base(model.spec), model)


def trained_as(base: Base, model: ModelSection) -> Base:
    """A base with the config's text encoding, and with its noise and null prompt for training alone.

    Raises DiffalignError for a null prompt of zeros where the base's family has none, and for a text encoding that its
    text encoders cannot have.
    """
    if base.text is not None and model.text != base.text.spec:
        base = replace(base, text=replace(base.text, spec=model.text))
    if model.scheduler is not None or model.prediction_type is not None:  # `load_base` did so; not of an open pipeline
        config, schedule = complete_scheduler(base.scheduler_config, model.spec)
        base = replace(base, scheduler_config=config, schedule=schedule)
    if model.rescale_betas_zero_snr is not None:
        config = {**base.scheduler_config, "rescale_betas_zero_snr": model.rescale_betas_zero_snr}
        base = replace(base, schedule=NoiseSchedule.from_config(config))
    zeros = model.force_zeros_for_empty_prompt
    if zeros is None:
        return base
    if base.family.name != "sdxl":
        raise DiffalignError(
            f"model.force_zeros_for_empty_prompt = {zeros}: only SDXL has a null prompt of zeros, and {base.source!r} "
            f'is an {base.family.name} model, whose null prompt is the encoded ""; leave the key out'
        )
    assert base.text is not None
    return replace(base, text=replace(base.text, zero_empty_prompt=zeros))


def build(config: Config, accelerator: Accelerator, table: Table | None = None, base: Base | None = None) -> Run:
    """Builds every part of a run, ready for its first step. A given table or base is not loaded again."""
    torch.manual_seed(config.seed)
    torch.backends.cuda.matmul.allow_tf32 = config.training.allow_tf32
    torch.backends.cudnn.allow_tf32 = config.training.allow_tf32  # torch's own default is True
    device, objective = accelerator.device, config.objective
    table = open_table(config, accelerator) if table is None else table
    refuse_weights(config, table)
    if isinstance(table, PairTable):
        require_terms(objective, margin="margin" in table.terms, signs=table.negative_masks)
    config.tuning.check()
    if base is not None and config.model.merge_lora:
        raise DiffalignError("model.merge_lora: the model is an open pipeline; merge there, with its fuse_lora()")
    base = load_run_base(config.model) if base is None else trained_as(base, config.model)
    if base.text is not None and accelerator.is_main_process and (said := counted(base.text, table.prompts)):
        log.warning("%s", said)
    config = settled(config, device, base.family.name)
    training = config.training
    config.tuning.check_base(base.unet)
    identity = run_identity(config, table, base)
    on_main(accelerator, lambda: refuse_others(config, identity))
    objective.check_schedule(base.schedule)
    faithfulness = load_faithfulness(config, accelerator)
    guarded = () if table.heldout is None else prompts_of_guards(config.validation, table.heldout.prompts)

    encoder = Encoder(base, device)
    resolution = resolution_of(config.data, base)
    build_source = source_builder(config, accelerator, table, encoder, resolution)
    heldout = None
    if table.heldout is not None:
        heldout = build_points(config, accelerator, table.heldout, encoder, resolution)
    unet = prepare_policy(base, config, device, table.user_dim if isinstance(table, PairTable) else None)
    mesh = mesh_of(accelerator)
    place(unet, device if mesh is None else torch.device("cpu"))
    config.tuning.after_placement(unet)
    reference = make_run_reference(config, unet, base.family)
    if config.model.compile:
        compile_blocks(unet)
        second = getattr(reference, "module", None)  # a UNet of the reference's own
        if second is not None:
            compile_blocks(second)
    if config.data.cache_dir is not None and not config.validation.samples:
        encoder.unload()
    host = None
    if mesh is not None:
        host = HostCopy(unet)
        shard_networks(unet, reference, mesh, AUTOCAST[training.mixed_precision])
    networks = Networks(
        accelerator.prepare_model(unet) if mesh is None else unet,
        family=base.family,
        schedule=base.schedule,
        reference=reference,
        autocast_dtype=AUTOCAST[training.mixed_precision],
        device=device,
    )
    moving = reference if isinstance(reference, MovingReference) else None
    if heldout is not None and (config.data.cache_reference_errors or moving is not None):
        with networks.gathered():
            heldout.ask_reference(objective, networks)  # building the source frees the reference, or it will move
    parameters = [p for p in unet.parameters() if p.requires_grad]
    lr = effective_lr(training, accelerator.num_processes)
    undecayed = config.tuning.undecayed(unet)
    optimizer = make_optimizer([p for p in parameters if all(p is not u for u in undecayed)], training, lr, config.seed)
    if undecayed:
        optimizer.add_param_group({"params": undecayed, "weight_decay": 0.0})
    return Run(
        config=config,
        accelerator=accelerator,
        base=base,
        unet=unet,
        networks=networks,
        source=build_source(networks, unet, reference if isinstance(reference, FormerLora | FormerCopy) else None),
        objective=objective,
        parameters=parameters,
        optimizer=optimizer,
        lr_scheduler=make_lr_scheduler(optimizer, training),
        scaler=torch.amp.GradScaler(device.type, enabled=training.mixed_precision == "fp16"),
        ema=None if training.ema_decay is None else make_ema(parts(parameters), training.ema_decay),
        reference_kind="none" if reference is None else reference.kind,
        moving_reference=moving,
        lr=lr,
        table=table,
        heldout=heldout,
        faithfulness=faithfulness,
        guard_prompts=guarded,
        identity=identity,
        host=host,
    )


def load_faithfulness(config: Config, accelerator: Accelerator) -> Scorer | None:
    """The scorer of `validation.faithfulness`, in the main process alone: it samples the images. Raises ScorerError."""
    name, loaded = config.validation.faithfulness, list[Scorer]()
    if name is not None:
        on_main(accelerator, lambda: loaded.append(load_scorer(name, str(accelerator.device))))
    return next(iter(loaded), None)


def make_run_reference(config: Config, unet: UNet, family: Family) -> Reference | None:
    """The network that the policy is compared with, from the policy's unwrapped UNet before training.

    A snapshot of the policy if the source chooses one, one that follows it if the config says so, else the tuning
    method's reference. None for an objective without a reference.
    """
    autocast = AUTOCAST[config.training.mixed_precision]
    if config.source is not None and config.source.own_reference:
        return make_former(unet, family, autocast)
    training = config.training
    if training.ref_model_sync_steps is not None:
        alpha, most = training.ref_model_mixup_alpha, training.ref_model_max_distance
        section = training.ref_model_decay
        decay = None if section is None else Decay(**section.model_dump())
        return MovingReference(unet, ReferenceSync(training.ref_model_sync_steps, alpha, most, decay))
    return config.tuning.make_reference(unet, autocast) if config.objective.needs_reference else None


def shard_networks(unet: UNet, reference: Reference | None, mesh: Any, autocast_dtype: torch.dtype | None) -> None:
    """Shards the policy, and the reference where it is a network of its own."""
    own = getattr(reference, "module", None)
    if own is not None:
        shard(own, mesh, autocast_dtype)
    shard(unet, mesh, autocast_dtype)


def resolution_of(data: DataSection, base: Base) -> int:
    """Side of square images in pixels. Raises ModelError where the base cannot take it, or the side of a bucket."""
    resolution = data.resolution or base.family.default_resolution
    if base.vae is not None:
        check_resolution(base.unet, vae_factor(base.vae), resolution, "data.resolution")
        for size in () if data.aspect_buckets is None else data.aspect_buckets.sizes(resolution):
            for side in size:
                check_resolution(base.unet, vae_factor(base.vae), side, f"data.aspect_buckets {size[0]}x{size[1]}")
    return resolution


def prepare_policy(base: Base, config: Config, device: torch.device, user_dim: int | None = None) -> UNet:
    """The base's UNet made trainable as configured: attention, the tuning method, memory layout, checkpointing.

    `user_dim` is the length of the users' embeddings, for a method that needs users.
    """
    unet, training = base.unet, config.training
    autocast = AUTOCAST[training.mixed_precision]
    set_attention(unet, config.model.attention, device)
    user = config.validation.user
    start = Start(
        seed=config.seed,
        weights_dtype=torch.bfloat16 if training.bf16_weights else None,
        user_dim=user_dim,
        default_user=None if user is None else open_users(str(config.data.users)).of(user, "validation.user"),
    )
    config.tuning.prepare(unet, start)
    if not config.tuning.trains_base and autocast is not None:
        store_for_autocast(unet, autocast)
    if config.model.channels_last:
        unet.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # no overload of torch's has it
    if config.model.fused_kernels:
        fuse_kernels(unet, device)
    set_checkpointing(unet, cast("Checkpointing", config.model.gradient_checkpointing))  # "auto" is settled
    return unet


def make_ema(parameters: Sequence[Tensor], decay: float) -> Any:
    """diffusers' moving average of the weights, which starts at their present values."""
    from diffusers.training_utils import EMAModel

    return EMAModel(parameters, decay=decay, foreach=True)
