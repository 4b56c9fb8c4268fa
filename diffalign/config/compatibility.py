"""Settings of a config that do not go together: what a section cannot say of itself.

Each check takes a `diffalign.config.schema.Config` (or its section `tuning`) and raises ValueError, which the config
reports with its other faults.
"""

from __future__ import annotations

from typing import Any

from diffalign.errors import DiffalignError
from diffalign.objectives import OBJECTIVES
from diffalign.objectives.base import OnSharedNoise

LORA_ONLY = ("rank", "alpha", "target_modules", "resume_lora")
USERS_ONLY = ("user_tokens", "user_scale")


def check_tuning(tuning: Any) -> None:
    """Raises ValueError for settings of a method that is not the run's."""
    fields = type(tuning).model_fields
    for method, names in (("lora", LORA_ONLY), ("user_attention", USERS_ONLY)):
        idle = [name for name in names if getattr(tuning, name) != fields[name].default]
        if idle and tuning.method != method:
            raise DiffalignError(f"tuning.{', tuning.'.join(idle)}: only tuning.method: {method} has such a setting")


def check_users(config: Any) -> None:
    """Raises ValueError for users without user attention, or user attention in a run that cannot have users."""
    users, validation = config.data.users, config.validation
    if config.tuning.method != "user_attention":
        if users is not None or validation.user is not None:
            name = "data.users" if users is not None else "validation.user"
            raise DiffalignError(f"{name}: only tuning.method: user_attention knows users")
        return
    if config.tuning.reference is not None:
        raise DiffalignError("tuning.reference: user attention is compared with the network without it; leave this out")
    if config.source is not None:
        raise DiffalignError(
            f"tuning.method: user_attention needs pairs that say whose they are, and source {config.source.name} makes "
            "pairs of nobody; leave out the source"
        )
    if bool(validation.prompts) != (validation.user is not None):
        raise DiffalignError(
            "validation.user: pictures are for somebody; give validation.prompts and an id of data.users"
        )
    if validation.user is not None and users is None:
        raise DiffalignError("validation.user: is an id in data.users, and there is no such file")


def can_fuse_kernels(model: Any) -> None:
    """Raises ValueError for layouts that the kernels do not read, and for a compiler that fuses the same layers."""
    if model.compile:
        raise DiffalignError(
            "model.fused_kernels: model.compile makes kernels of the same layers by itself; set one of the two to false"
        )
    if not model.channels_last:
        raise DiffalignError(
            "model.fused_kernels: the kernels read channels-last activations; set model.channels_last: true"
        )


def reference_batch_fits(config: Any) -> None:
    """A larger batch for the reference needs micro-batches to put together, and a reference that is asked."""
    training, size = config.training, config.training.reference_batch_size
    if size is None:
        return
    step = training.train_batch_size * training.gradient_accumulation_steps
    if size <= training.train_batch_size or size % training.train_batch_size or size > step:
        raise DiffalignError(
            f"training.reference_batch_size: {size} must be several micro-batches of one optimiser step: a multiple "
            f"of train_batch_size ({training.train_batch_size}) above it, at most {step} (× accumulation)"
        )
    if not config.objective.needs_reference or config.data.cache_reference_errors:
        raise DiffalignError("training.reference_batch_size: this run asks no reference in its steps; leave it null")


def can_have_a_reference(config: Any) -> None:
    """`tuning.reference` needs an objective with one, that nothing else chooses and nothing kept belongs to."""
    if not config.objective.needs_reference:
        raise DiffalignError(f"tuning.reference: objective {config.objective.name} has no reference")
    if config.source is not None and config.source.own_reference:
        raise DiffalignError(f"tuning.reference: source {config.source.name} chooses the reference itself")
    if config.data.cache_trajectories or config.data.cache_reference_errors:
        raise DiffalignError(
            "tuning.reference: data.cache_trajectories and data.cache_reference_errors keep what the base alone made"
        )


def can_keep_trajectories(config: Any) -> None:
    """Trajectories can be kept only where no training changes them."""
    objective = config.objective
    if objective.recording is None:
        raise DiffalignError(
            f"data.cache_trajectories: {objective.name} with these settings inverts by the network being trained, "
            "or not at all; only trajectories of a frozen reference can be cached"
        )
    if config.data.cache_dir is None:
        raise DiffalignError("data.cache_trajectories needs data.cache_dir: trajectories lie beside the encoded images")
    if config.data.proportion_empty_prompts:
        raise DiffalignError(
            "data.cache_trajectories: a trajectory belongs to its prompt; set data.proportion_empty_prompts: 0"
        )


def can_keep_errors(config: Any) -> None:
    """A reference's errors can be kept only at points that come back and that no network chose."""
    if config.objective.drawn is None or not config.objective.needs_reference:
        drawn = [n for n, cls in OBJECTIVES.items() if cls.probe is OnSharedNoise.probe and cls.needs_reference]
        raise DiffalignError(
            f"data.cache_reference_errors: {config.objective.name} has no reference, or its points come from a "
            f"network; only errors at points that are drawn can be cached ({', '.join(drawn)})"
        )
    if config.data.draws_per_pair is None:
        raise DiffalignError(
            "data.cache_reference_errors needs data.draws_per_pair: without it no draw is ever seen a second time"
        )
    if config.data.cache_dir is None:
        raise DiffalignError("data.cache_reference_errors needs data.cache_dir: errors lie beside the encoded images")


def can_train_in_bf16(config: Any) -> None:
    """Weights without a float32 master: what they do not go with."""
    name = config.training.optimizer
    if config.tuning.method != "full":
        raise DiffalignError(
            f"training.optimizer: {name} is for tuning.method: full; LoRA's weights are few, use adamw"
        )
    if config.training.mixed_precision != "bf16":
        raise DiffalignError(f"training.optimizer: {name} keeps weights in bfloat16; set mixed_precision: bf16")
    if config.training.ema_decay is not None:
        raise DiffalignError("training.ema_decay: an average in bfloat16 would stand still; use adamw, or no EMA")
    if config.source is not None and config.source.own_reference:
        raise DiffalignError(f"training.optimizer: {name} does not go with a source that keeps former policies")


def usable_together(config: Any) -> None:
    """Raises ValueError for settings that a source which makes its pairs cannot honour."""
    source, objective, data = config.source, config.objective, config.data
    if source.objectives and objective.name not in source.objectives:
        raise DiffalignError(f"source: {source.name} makes data for objective {' or '.join(source.objectives)} only")
    for own, its in getattr(source, "same_in_objective", {}).items():
        if getattr(source, own) != getattr(objective, its):
            raise DiffalignError(
                f"source.{own} = {getattr(source, own)} and objective.{its} = {getattr(objective, its)}: the objective "
                "compares the very steps that the source took; give both the same value"
            )
    idle = ["cache_dir", "invert_preference", "dataloader_num_workers", "scores", "curriculum", "draws_per_pair"]
    if source.data == "prompts":
        idle += ["format", "split", "columns", "random_flip", "center_crop", "verify"]
    if set_ := [name for name in idle if getattr(data, name) != type(data).model_fields[name].default]:
        raise DiffalignError(
            f"data.{', data.'.join(set_)}: source {source.name} makes its pictures and has no such setting"
        )
