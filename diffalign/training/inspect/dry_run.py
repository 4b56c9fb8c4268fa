"""What a run is going to do, in words and numbers, before it does it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from diffalign.config.sections import TrainingSection
from diffalign.models.adapters.lora import ADAPTER
from diffalign.models.adapters.lora_file import LORA_FILE
from diffalign.models.adapters.save_load import UNET_FOLDER
from diffalign.models.adapters.user_attention import USER_FILE, is_user_weight, user_branch
from diffalign.training.build import Run
from diffalign.training.inspect.activation_memory import Kept
from diffalign.training.metrics import Meter
from diffalign.training.optim.optimizers import effective_batch
from diffalign.training.step import optimizer_step
from diffalign.types import PairBatch

TINY_LATENT = 32  # side of the latents of the trial step on a CPU; its activations are scaled up to the run's
OPTIMIZER_BYTES = {
    "adamw": 8.0,
    "adamw_8bit": 2.0,
    "adamw_bf16": 8.0,
    "adamw_8bit_bf16": 2.0 + 2 * 4 / 256,  # two codes, and a share of two scales
    "adafactor": 4.0,
}  # state per trained parameter, at most


def describe(run: Run, start: int = 0) -> str:
    """The plan of a built run: model, what is trained, batch, learning rate, steps, data, files."""
    config, training = run.config, run.config.training
    processes = run.accelerator.num_processes
    batch = effective_batch(training, processes)
    added = (".lora_" in name or is_user_weight(name) for name, _ in run.unet.named_parameters())
    total = sum(p.numel() for p, new in zip(run.unet.parameters(), added, strict=True) if not new)
    trained = sum(p.numel() for p in run.parameters)
    how: str = config.tuning.method
    if how == "lora":
        adapter = run.unet.peft_config[ADAPTER]  # what is in force, also where it came with resume_lora
        how += f" rank {adapter.r} alpha {adapter.lora_alpha:g}"
    if (branch := user_branch(run.unet)) is not None:
        how += f" of {branch.tokens} tokens, users of {branch.dim} numbers"
    product = f"{training.train_batch_size} x {training.gradient_accumulation_steps} x {processes}"
    lr = f"{run.lr:.3g}"
    if training.scale_lr:
        lr += f" = {training.learning_rate:.3g} x {batch} (scale_lr)"
    steps = training.max_train_steps
    reference = {
        "none": "none",
        "copy": "frozen copy",
        "lora_off": "the policy with LoRA off",
        "held": "the policy with other LoRA weights",
        "user_off": "the policy with user attention off",
        "former": "former policies",
    }[run.reference_kind] + (f" of {config.tuning.reference}" if config.tuning.reference else "")
    pairs = len(run.table)
    epochs = "" if config.source is not None else f" = {steps * batch / pairs:.2f} epochs of {pairs}"
    rows = [
        ("objective", f"{run.objective.name} {_settings(run.objective)}".strip()),
        ("model", f"{config.model.pretrained_model_name_or_path} ({run.base.family.name}, "
                  f"{run.base.schedule.prediction_type}), {total / 1e6:.2f} M parameters"),
        ("training", f"{how}: {trained / 1e6:.3f} M parameters, reference: {reference}"),
        ("batch", f"{batch} pairs = {product} (per device x accumulation x processes)"),
        ("learning rate", f"{lr}, {training.lr_scheduler}, {_warmup(training)}"),
        ("optimizer", f"{training.optimizer}, precision {training.mixed_precision}, gradient checkpointing "
                      f"{config.model.gradient_checkpointing}, device {run.accelerator.device}"),
        ("steps", f"{start} -> {steps}, {steps * batch} pairs{epochs}"),
        ("data", _data(run)),
        ("files", _files(run)),
    ]  # fmt: skip
    return "\n".join(f"{name:>14}  {text}" for name, text in rows)


def _data(run: Run) -> str:
    data, rows = run.config.data, f"{len(run.table)} usable of {run.table.total_rows} rows"
    if run.config.source is not None:
        return f"{data.path}, {rows}, pairs made by {run.config.source.name} {_settings(run.config.source)}"
    terms = "".join(f", {part} of each pair" for part in getattr(run.table, "terms", ()))
    how = "encoded at every visit" if data.cache_dir is None else f"cache {data.cache_dir}"
    if data.curriculum is not None:
        steps = data.curriculum.steps or run.config.training.max_train_steps
        how += f", easiest first: {data.curriculum.chunks} chunks in {steps} steps"
    return f"{data.path}, {rows}{terms}, {how}"


def trial(run: Run) -> str:
    """Takes one tiny optimiser step on the first pair and says what it measured and what the run will need.

    The run's weights are moved by it: build another run to train.
    """
    batch = next(run.source.batches(0))
    config = run.config
    tiny = config.model_copy(update={"training": config.training.model_copy(update={"gradient_accumulation_steps": 1})})
    small = _one_small_pair(batch, run.accelerator.device.type == "cuda")
    meter, kept = Meter(), Kept(run.unet.parameters())
    with kept:
        optimizer_step(replace(run, config=tiny), iter([small]), meter)
    values = meter.means()
    scale = config.training.train_batch_size * batch.latents[0, 0, 0].numel() / small.latents[0, 0, 0].numel()
    shape = "x".join(map(str, small.latents.shape[2:]))
    if "grad_norm" in values:
        gradient = f"gradient norm {values['grad_norm']:.4g}"
    else:  # fp16's scaler begins high, skips such a step and goes down
        gradient = "gradients past fp16's range at the scaler's first scale; a run skips such steps and goes lower"
    lines = [
        f"{'trial step':>14}  1 pair, latents {shape}: loss {values['loss']:.6f}, {gradient}",
        f"{'memory':>14}  {_memory(run, kept.bytes * scale, kept.casts)}",
    ]
    return "\n".join(lines)


def _one_small_pair(batch: PairBatch, full: bool) -> PairBatch:
    """The first pair; on a CPU only a corner of its latents, because this is a look at the machinery."""
    one = batch.select(pair=slice(0, 1))
    if full:
        return replace(one, latents=one.latents.contiguous())
    corner = (..., slice(TINY_LATENT), slice(TINY_LATENT))
    mask = None if one.terms.mask is None else one.terms.mask[corner]
    return replace(one, latents=one.latents[corner].contiguous(), terms=replace(one.terms, mask=mask))


def _memory(run: Run, activations: float, casts: int) -> str:
    """An estimate of the peak on one device: what is resident, plus the activations of one micro-batch."""
    weights = sum(p.numel() * p.element_size() for p in run.unet.parameters())
    trained = sum(p.numel() for p in run.parameters)
    reference = 0
    if run.reference_kind == "copy" or (run.reference_kind == "former" and run.config.tuning.method == "full"):
        reference = (
            weights if run.networks.autocast_dtype is None else 2 * sum(p.numel() for p in run.unet.parameters())
        )
    unloaded = run.config.data.cache_dir is not None and not run.config.validation.prompts
    other = [] if unloaded else [run.base.vae, *(run.base.text.models if run.base.text else ())]
    encoders = sum(p.numel() * p.element_size() for module in other if module is not None for p in module.parameters())
    parts = {
        "weights": weights,
        "reference": reference,
        "VAE and text": encoders,
        "gradients": sum(p.numel() * p.element_size() for p in run.parameters),
        "optimizer": OPTIMIZER_BYTES[run.config.training.optimizer] * trained,
        "EMA": 0 if run.ema is None else 4 * trained,
        "weight casts": casts,
        "activations": activations,
    }
    listed = ", ".join(f"{name} {_size(value)}" for name, value in parts.items() if value)
    return f"about {_size(sum(parts.values()))} = {listed} (an estimate; kernels and fragmentation come on top)"


def _size(n: float) -> str:
    return f"{n / 2**30:.2f} GiB" if n >= 2**30 / 10 else f"{n / 2**20:.2f} MiB"


def _warmup(training: TrainingSection) -> str:
    inside = training.lr_warmup_steps >= training.max_train_steps
    return f"{training.lr_warmup_steps} warm-up steps{' (the run ends inside them)' if inside else ''}"


def _settings(objective: Any) -> str:
    return repr(objective).removeprefix(type(objective).__name__)


def _files(run: Run) -> str:
    weights = {"full": f"{UNET_FOLDER}/", "lora": LORA_FILE, "user_attention": USER_FILE}
    names = [weights[run.config.tuning.method], "config.yaml", "run.json", "metrics.jsonl"]
    if run.config.training.checkpointing_steps:
        names.append("checkpoint-N/")
    return f"{run.output_dir}/ {', '.join(names)}"
