"""From a config with a `preference_model` section to everything its run needs, cheapest checks first.

Left out: an encode cache, EMA, fp16 and gradient checkpointing (the config refuses them).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from diffalign.config.schema import PreferenceModelConfig
from diffalign.data.loader.offline_pairs import OfflinePairs, Online
from diffalign.data.loader.spec import LoaderSpec
from diffalign.data.sampler import Processes
from diffalign.data.table.pairs import PairTable
from diffalign.errors import DiffalignError
from diffalign.models.kernels.attention import set_attention
from diffalign.models.kernels.checkpointing import store_for_autocast
from diffalign.models.loading.base import Base, hide_loading_bars
from diffalign.models.loading.encoder import Encoder
from diffalign.models.policy.networks import Networks
from diffalign.rewards import load_scorer
from diffalign.rewards.clip import load_clip
from diffalign.rewards.step_aware_clip import StepAwareClip
from diffalign.training.build import AUTOCAST, load_run_base
from diffalign.training.checkpoints.identity import Identity, refuse_others, run_identity
from diffalign.training.open_data import no_terms, open_table
from diffalign.training.optim.optimizers import effective_batch, effective_lr, make_lr_scheduler, make_optimizer
from diffalign.training.preference_model.batch import Labels, StepWeights
from diffalign.training.settle import with_precision


@dataclass
class PreferenceRun:
    """All the parts of a preference model's run, built and placed on their devices."""

    config: PreferenceModelConfig
    accelerator: Accelerator
    base: Base
    networks: Networks  # the frozen base's UNet
    source: OfflinePairs
    table: PairTable
    labels: Labels
    weights: StepWeights
    model: StepAwareClip  # what is trained, unwrapped
    module: nn.Module  # the same, wrapped for several processes
    tokenizer: Any
    parameters: list[nn.Parameter]
    optimizer: torch.optim.Optimizer
    lr_scheduler: LRScheduler
    lr: float  # in force, after scale_lr
    identity: Identity = field(default_factory=dict)  # what the run is made from, for its checkpoints

    @property
    def output_dir(self) -> Path:
        """Where the run writes."""
        return Path(self.config.output_dir)


def open_pairs_of(config: PreferenceModelConfig, accelerator: Accelerator) -> PairTable:
    """The run's pairs, ties included. Raises DataError."""
    return cast("PairTable", open_table(config, accelerator, keep_ties=True))  # it has no source


def build_preference_run(
    config: PreferenceModelConfig, accelerator: Accelerator, table: PairTable | None = None
) -> PreferenceRun:
    """Builds every part of the run; afterwards only steps are left to take."""
    config = with_precision(config, accelerator.device)
    training, settings, device = config.training, config.preference_model, accelerator.device
    hide_loading_bars()
    torch.manual_seed(config.seed)
    torch.backends.cuda.matmul.allow_tf32 = training.allow_tf32
    torch.backends.cudnn.allow_tf32 = training.allow_tf32
    table = open_pairs_of(config, accelerator) if table is None else table
    no_terms(table, "a preference model learns which picture is better and nothing else")
    clip = load_clip(settings.pretrained_model_name_or_path, settings.tokenizer, str(device))
    judge = None if settings.relabel_with is None else load_scorer(settings.relabel_with, str(device))
    base = load_run_base(config.model)
    identity = run_identity(config, table, base)
    refuse_others(config, identity)
    _needs_x0(base)
    model = StepAwareClip(clip.model, config.seed).requires_grad_(True).train().to(device)

    autocast = AUTOCAST[training.mixed_precision]
    set_attention(base.unet, config.model.attention, device)
    if autocast is not None:
        store_for_autocast(base.unet, autocast)
    base.unet.to(device)
    encoder = Encoder(base, device)
    parameters = list(model.parameters())
    lr = effective_lr(training, accelerator.num_processes)
    optimizer = make_optimizer(parameters, training, lr)
    return PreferenceRun(
        config=config,
        accelerator=accelerator,
        base=base,
        networks=Networks(
            base.unet, family=base.family, schedule=base.schedule, autocast_dtype=autocast, device=device
        ),
        source=_source(config, accelerator, table, encoder),
        table=table,
        labels=Labels(table, judge, settings.relabel_gap),
        weights=StepWeights(table, config.seed, effective_batch(training, accelerator.num_processes)),
        model=model,
        module=accelerator.prepare_model(model),
        tokenizer=clip.tokenizer,
        parameters=parameters,
        optimizer=optimizer,
        lr_scheduler=make_lr_scheduler(optimizer, training),
        lr=lr,
        identity=identity,
    )


def _needs_x0(base: Base) -> None:
    """Raises ValueError for a base whose prediction says nothing of x̂_0 at the last timestep."""
    schedule = base.schedule
    if schedule.prediction_type == "epsilon" and float(schedule.alphas_cumprod[-1]) == 0.0:
        raise DiffalignError(
            f"model: {base.source!r} predicts noise at zero terminal SNR, where x̂_0 is undefined; "
            "set model.prediction_type if its scheduler config is wrong, or use another base"
        )


def with_one_pair(run: PreferenceRun) -> PreferenceRun:
    """The same run, taking one pair a step on each device: a look at the machinery."""
    training = run.config.training.model_copy(update={"train_batch_size": 1, "gradient_accumulation_steps": 1})
    config = run.config.model_copy(update={"training": training})
    encoder = Encoder(run.base, run.accelerator.device)
    return replace(
        run,
        config=config,
        source=_source(config, run.accelerator, run.table, encoder),
        weights=StepWeights(run.table, config.seed, run.accelerator.num_processes),
    )


def _source(
    config: PreferenceModelConfig, accelerator: Accelerator, table: PairTable, encoder: Encoder
) -> OfflinePairs:
    data = config.data
    resolution = data.resolution or encoder.base.family.default_resolution
    return OfflinePairs(
        table,
        Online(encoder, resolution, center_crop=data.center_crop, random_flip=data.random_flip),
        LoaderSpec(
            run_seed=config.seed,
            train_batch_size=config.training.train_batch_size,
            gradient_accumulation_steps=config.training.gradient_accumulation_steps,
            processes=Processes(accelerator.process_index, accelerator.num_processes),
            with_uncond=config.preference_model.guidance_scale != 1.0,
            num_workers=data.dataloader_num_workers,
            pin_memory=accelerator.device.type == "cuda",
        ),
        time_ids=lambda geometry: encoder.time_ids(_as_sampled(geometry)),
    )


def _as_sampled(geometry: Tensor) -> Tensor:
    """The geometry "... 6" that a sampler will state: full size, no crop. The model judges what samplers make."""
    target = geometry[..., 4:]
    return torch.cat([target, torch.zeros_like(target), target], dim=-1)


def describe(run: PreferenceRun, start: int = 0) -> str:
    """The plan of a built run: base, what is trained, labels, batch, learning rate, steps, data."""
    config, training, settings = run.config, run.config.training, run.config.preference_model
    processes, pairs = run.accelerator.num_processes, len(run.table)
    batch = effective_batch(training, processes)
    steps = training.max_train_steps
    trained = sum(p.numel() for p in run.parameters)
    labels = f"the data's, {run.table.ties} ties kept"
    if settings.relabel_with is not None:
        labels = f"{settings.relabel_with}'s, ties within {settings.relabel_gap:g} of probability"
    product = f"{training.train_batch_size} x {training.gradient_accumulation_steps} x {processes}"
    rows = [
        ("training", f"step-aware preference model from {settings.pretrained_model_name_or_path}, "
                     f"{trained / 1e6:.3f} M parameters"),
        ("base", f"{config.model.pretrained_model_name_or_path} ({run.base.family.name}, "
                 f"{run.base.schedule.prediction_type}), frozen, guidance {settings.guidance_scale:g}"),
        ("labels", labels),
        ("batch", f"{batch} pairs = {product} (per device x accumulation x processes)"),
        ("learning rate", f"{run.lr:.3g}, {training.lr_scheduler}, {training.lr_warmup_steps} warm-up steps"),
        ("optimizer", f"{training.optimizer}, weight decay {training.adam_weight_decay:g}, "
                      f"precision {training.mixed_precision}, device {run.accelerator.device}"),
        ("steps", f"{start} -> {steps}, {steps * batch} pairs = {steps * batch / pairs:.2f} epochs of {pairs}"),
        ("data", f"{config.data.path}, {pairs} usable of {run.table.total_rows} rows, encoded at every visit"),
        ("files", f"{run.output_dir}/ preference_model/, config.yaml, run.json, metrics.jsonl"),
    ]  # fmt: skip
    return "\n".join(f"{name:>14}  {text}" for name, text in rows)
