"""From a config with a `preference_model` section to everything its run needs, cheapest checks first.

Left out: a latent cache, EMA, fp16 and gradient checkpointing (the config refuses them).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from diffalign.config.schema import PreferenceModelConfig
from diffalign.contrib.step_aware.batch import Labels, StepWeights, WeightedPairs
from diffalign.contrib.step_aware.clip import StepAwareClip
from diffalign.contrib.step_aware.scorer import WEIGHTS_FILE, WEIGHTS_FOLDER, save_step_aware
from diffalign.contrib.step_aware.step import judge_step, scores_of
from diffalign.data.loader.online import Online
from diffalign.data.loader.spec import SHUFFLE_BUFFER, LoaderSpec
from diffalign.data.sampler import Processes
from diffalign.data.table.pairs import PairTable
from diffalign.errors import DiffalignError
from diffalign.models.kernels.attention import set_attention
from diffalign.models.kernels.checkpointing import store_for_autocast
from diffalign.models.loading.base import Base, hide_loading_bars
from diffalign.models.loading.encoder import Encoder
from diffalign.models.policy.networks import Networks
from diffalign.rewards import Scorer, load_scorer
from diffalign.rewards.clip import load_clip, load_state
from diffalign.training.build import AUTOCAST, load_run_base
from diffalign.training.checkpoints.identity import Identity, refuse_others, run_identity
from diffalign.training.metrics import Meter
from diffalign.training.open_data import no_terms
from diffalign.training.optim.optimizers import effective_batch, effective_lr, make_lr_scheduler, make_optimizer
from diffalign.training.processes import on_main
from diffalign.training.settle import with_precision
from diffalign.training.trainable import Trainable
from diffalign.types import PairBatch


@dataclass(kw_only=True)
class PreferenceRun(Trainable):
    """A run that trains a preference model; `networks` calls the UNet of the frozen base."""

    config: PreferenceModelConfig
    source: WeightedPairs
    table: PairTable
    labels: Labels
    model: Any  # what is trained, unwrapped: a StepAwareClip, or what a subclass trains
    wrapped: nn.Module  # the same, wrapped for several processes
    tokenizer: Any

    @property
    def label(self) -> str:
        """The kind of run."""
        return "preference model"

    @property
    def module(self) -> nn.Module:
        """The model as it is called."""
        return self.wrapped

    def step(self, batches: Iterator[PairBatch], meter: Meter) -> None:
        """`contrib.step_aware.step.judge_step`."""
        judge_step(self, batches, meter)

    def scores(self, batch: PairBatch) -> tuple[Tensor, Tensor, Tensor]:
        """Scores "side pair" with grad; on the CPU their labels and timesteps [pair]."""
        return scores_of(self, batch)

    def save_weights(self, folder: Path) -> None:
        """A folder that the scorer `step-aware` loads."""
        save_step_aware(self.model, self.tokenizer, folder / WEIGHTS_FOLDER)

    def load_weights(self, folder: Path) -> None:
        """Loads what `save_weights` wrote. Raises ScorerError for a file that cannot be read."""
        self.model.load_state_dict(load_state(folder / WEIGHTS_FOLDER / WEIGHTS_FILE))

    def describe(self, start: int = 0) -> str:
        """Base, what is trained, labels, batch, learning rate, steps, data."""
        return describe_judge(self, start)

    def what(self) -> str:
        """What is trained, and from what, for the plan."""
        return f"step-aware preference model from {self.config.preference_model.pretrained_model_name_or_path}"

    def base_is(self) -> str:
        """What the base is for, for the plan."""
        return f"frozen, guidance {self.config.preference_model.guidance_scale:g}"

    def dry_run(self) -> str:
        """One optimiser step of one pair on each device."""
        small, meter = with_one_pair(self), Meter()
        small.step(small.source.batches(0), meter)
        values = meter.means()
        return f"{'dry run':>14}  1 pair: loss {values['loss']:.6f}, gradient norm {values['grad_norm']:.4g}"

    def usage(self) -> str:
        """The folder, and the scorer that takes it."""
        return f"weights in {self.output_dir / WEIGHTS_FOLDER}: use them as the scorer step-aware={self.output_dir}"


def build_preference_run(config: PreferenceModelConfig, accelerator: Accelerator, table: PairTable) -> PreferenceRun:
    """Builds every part of the run; afterwards only steps are left to take."""
    config = begun(config, accelerator, table)
    settings, device = config.preference_model, accelerator.device
    clip = load_clip(settings.pretrained_model_name_or_path, settings.tokenizer, str(device))
    judge = relabelling(config, device)
    base = load_run_base(config.model)
    identity = run_identity(config, table, base)
    on_main(accelerator, lambda: refuse_others(config, identity))
    _needs_x0(base)
    model = StepAwareClip(clip.model, config.seed).requires_grad_(True).train().to(device)
    autocast = AUTOCAST[config.training.mixed_precision]
    set_attention(base.unet, config.model.attention, device)
    if autocast is not None:
        store_for_autocast(base.unet, autocast)
    base.unet.to(device)
    parts = Parts(base, table, judge, identity, model, clip.tokenizer)
    return assembled(PreferenceRun, config, accelerator, parts)


def begun(config: PreferenceModelConfig, accelerator: Accelerator, table: PairTable) -> PreferenceModelConfig:
    """The config with its precision in force, the seed and torch's switches set, and the data's terms refused."""
    config = with_precision(config, accelerator.device)
    hide_loading_bars()
    torch.manual_seed(config.seed)
    torch.backends.cuda.matmul.allow_tf32 = config.training.allow_tf32
    torch.backends.cudnn.allow_tf32 = config.training.allow_tf32
    no_terms(table, "a preference model learns which image is better and nothing else")
    return config


def relabelling(config: PreferenceModelConfig, device: torch.device) -> Scorer | None:
    """The scorer whose verdict replaces the labels; None where the data's are used."""
    name = config.preference_model.relabel_with
    return None if name is None else load_scorer(name, str(device))


@dataclass(frozen=True)
class Parts:
    """What a kind of preference model brings to its run."""

    base: Base  # its UNet on the device
    table: PairTable
    judge: Scorer | None
    identity: Identity
    model: nn.Module  # on the device, in training mode; parameters without grad are not trained
    tokenizer: Any


R = TypeVar("R", bound=PreferenceRun)


def assembled(kind: type[R], config: PreferenceModelConfig, accelerator: Accelerator, parts: Parts, **own: Any) -> R:
    """A run of that class: the source, the optimiser and the rest around the parts; `own`: fields of its alone."""
    training, settings, device, base = config.training, config.preference_model, accelerator.device, parts.base
    encoder = Encoder(base, device)
    parameters = [p for p in parts.model.parameters() if p.requires_grad]
    lr = effective_lr(training, accelerator.num_processes)
    optimizer = make_optimizer(parameters, training, lr)
    return kind(
        config=config,
        accelerator=accelerator,
        base=base,
        networks=Networks(
            base.unet,
            family=base.family,
            schedule=base.schedule,
            autocast_dtype=AUTOCAST[training.mixed_precision],
            device=device,
        ),
        source=_source(config, accelerator, parts.table, encoder),
        table=parts.table,
        labels=Labels(parts.table, parts.judge, settings.relabel_gap),
        model=parts.model,
        wrapped=accelerator.prepare_model(parts.model),
        tokenizer=parts.tokenizer,
        parameters=parameters,
        optimizer=optimizer,
        lr_scheduler=make_lr_scheduler(optimizer, training),
        scaler=torch.amp.GradScaler(device.type, enabled=False),
        lr=lr,
        identity=parts.identity,
        **own,
    )


def _needs_x0(base: Base) -> None:
    """Raises DiffalignError for a base whose prediction says nothing of x̂_0 at the last timestep."""
    schedule = base.schedule
    if schedule.prediction_type == "epsilon" and float(schedule.alphas_cumprod[-1]) == 0.0:
        raise DiffalignError(
            f"model: {base.source!r} predicts noise at zero terminal SNR, where x̂_0 is undefined; "
            "set model.prediction_type if its scheduler config is wrong, or use another base"
        )


def with_one_pair(run: PreferenceRun) -> PreferenceRun:
    """The same run with one pair a step on each device."""
    training = run.config.training.model_copy(update={"train_batch_size": 1, "gradient_accumulation_steps": 1})
    config = run.config.model_copy(update={"training": training})
    encoder = Encoder(run.base, run.accelerator.device)
    return replace(
        run,
        config=config,
        source=_source(config, run.accelerator, run.table, encoder),
    )


def _source(
    config: PreferenceModelConfig, accelerator: Accelerator, table: PairTable, encoder: Encoder
) -> WeightedPairs:
    data = config.data
    resolution = data.resolution or encoder.base.family.default_resolution
    return WeightedPairs(
        StepWeights(table, config.seed, effective_batch(config.training, accelerator.num_processes)),
        table,
        Online(encoder, resolution, center_crop=data.center_crop, random_flip=data.random_flip),
        LoaderSpec(
            run_seed=config.seed,
            train_batch_size=config.training.train_batch_size,
            gradient_accumulation_steps=config.training.gradient_accumulation_steps,
            processes=Processes(accelerator.process_index, accelerator.num_processes),
            shuffle_buffer=data.shuffle_buffer or SHUFFLE_BUFFER,
            with_uncond=config.preference_model.kind == "step_aware" and config.preference_model.guidance_scale != 1.0,
            num_workers=data.dataloader_num_workers,
            pin_memory=accelerator.device.type == "cuda",
        ),
        time_ids=lambda geometry: encoder.time_ids(_as_sampled(geometry)),
    )


def _as_sampled(geometry: Tensor) -> Tensor:
    """The geometry "... 6" that a sampler gives: full size, no crop. The model judges what samplers make."""
    target = geometry[..., 4:]
    return torch.cat([target, torch.zeros_like(target), target], dim=-1)


def describe_judge(run: PreferenceRun, start: int = 0) -> str:
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
        ("training", f"{run.what()}, {trained / 1e6:.3f} M parameters"),
        ("base", f"{config.model.pretrained_model_name_or_path} ({run.base.family.name}, "
                 f"{run.base.schedule.prediction_type}), {run.base_is()}"),
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
