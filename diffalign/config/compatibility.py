"""Checks of settings that must be compatible across sections of a config.

Each check takes a `diffalign.config.schema.Config` and raises DiffalignError, which the config reports with its other
faults.
"""

from __future__ import annotations

from typing import Any

from diffalign.config.data_sections import check_remote
from diffalign.config.health_section import can_roll_back
from diffalign.config.sections import ADAM_ONLY, DataSection, ModelSection, TrainingSection
from diffalign.errors import DiffalignError
from diffalign.models.adapters.methods import known_methods
from diffalign.objectives import OBJECTIVES
from diffalign.objectives.base import OnSharedNoise


def check_together(config: Any) -> None:
    """Every check of a run's config. Raises DiffalignError for the first fault."""
    check_training(config.training)
    reference_batch_fits(config)
    check_model(config.model)
    if getattr(config.tuning, "quantize_base", None) is not None:
        check_quantized(config)
    if config.training.bf16_weights:
        can_train_in_bf16(config)
    check_data(config.data)
    if config.data.aspect_buckets is not None:
        check_buckets(config.data, config.training)
    check_remote(config.data, config.validation.pairs, config.source)
    if config.data.cache_trajectories:
        can_keep_trajectories(config)
    if config.data.cache_reference_errors:
        can_keep_errors(config)
    check_users(config)
    if config.tuning.reference is not None:
        can_have_a_reference(config)
    can_move_the_reference(config)
    if config.source is not None:
        usable_together(config)
    elif config.objective.compares == "graded images":
        raise DiffalignError(
            f"objective: {config.objective.name} needs the optimality of each image, which stored pairs do not have; "
            "add source: {name: graded_groups, scorer: …}, or use an objective of pairs, e.g. dpo"
        )
    can_hold_out(config)
    can_roll_back(config.health, config.training, config.source)


def check_training(training: TrainingSection) -> None:
    """Raises DiffalignError for settings that the schedule or the optimiser does not have."""
    if training.lr_scheduler == "constant" and training.lr_warmup_steps:
        raise DiffalignError("training.lr_warmup_steps: lr_scheduler constant has no warm-up; use constant_with_warmup")
    if training.optimizer == "adafactor":
        idle = [n for n in ADAM_ONLY if getattr(training, n) != TrainingSection.model_fields[n].default]
        if idle:
            raise DiffalignError(f"training.{', training.'.join(idle)}: adafactor has no such setting; remove it")


def check_model(model: ModelSection) -> None:
    """Raises DiffalignError for ways to compute a model that exclude each other, and for a setting given twice."""
    for name in {} if model.scheduler is None else model.scheduler.given:
        if getattr(model, name, None) is not None:
            raise DiffalignError(f"model.scheduler.{name} and model.{name} are both set; remove one of them")
    if model.compile and model.gradient_checkpointing == "selective":
        raise DiffalignError(
            "model.compile: a compiled block already recomputes its cheap activations; use "
            "gradient_checkpointing none, or full"
        )
    if model.fused_kernels:
        can_fuse_kernels(model)


def check_quantized(config: Any) -> None:
    """Raises DiffalignError for ways to compute a model that read its weights themselves."""
    kind, model = config.tuning.quantize_base, config.model
    for setting in ("compile", "fused_kernels"):
        if getattr(model, setting):
            raise DiffalignError(
                f"tuning.quantize_base: {kind} is not supported with model.{setting}, which was made for plain linear "
                "layers; set one of the two to null or false"
            )


def check_data(data: DataSection) -> None:
    """Raises DiffalignError for settings of a cache or of scores that are not there."""
    if data.cache_variants > 1 and data.cache_dir is None:
        raise DiffalignError("data.cache_variants needs data.cache_dir: without a cache every visit crops again")
    if data.aggregate != "sum" and len(data.axes) < 2:
        raise DiffalignError(f"data.aggregate: {data.aggregate} needs several axes in data.scores")
    if data.relabel and data.scores is None:
        raise DiffalignError("data.relabel needs data.scores, a file written by `diffalign data score`")


def check_buckets(data: DataSection, training: TrainingSection) -> None:
    """Raises DiffalignError for settings that pairs of several sizes exclude."""
    if training.reference_batch_size is not None:
        raise DiffalignError(
            "data.aspect_buckets: training.reference_batch_size puts several micro-batches into one forward, and they "
            "may have several sizes; remove it"
        )
    if data.verify == "none":
        raise DiffalignError("data.aspect_buckets needs the sizes of the images, which verify: none does not read")
    if data.curriculum is not None:
        raise DiffalignError(
            "data.aspect_buckets and data.curriculum each decide which pairs make a micro-batch; remove one of them"
        )
    if data.cache_trajectories or data.cache_reference_errors:
        raise DiffalignError(
            "data.aspect_buckets: what is computed by the base and stored (data.cache_trajectories, "
            "data.cache_reference_errors) is stored for squares; remove it. data.cache_dir can stay"
        )


def check_users(config: Any) -> None:
    """Raises DiffalignError for users that the tuning method does not need, or a run that cannot have its users."""
    users, validation, method = config.data.users, config.validation, config.tuning.method
    if not config.tuning.needs_users:
        if users is not None or validation.user is not None:
            name = "data.users" if users is not None else "validation.user"
            needing = " or ".join(name for name, cls in known_methods().items() if cls.needs_users)
            raise DiffalignError(f"{name}: only tuning.method: {needing} supports users; remove it")
        return
    if config.source is not None:
        raise DiffalignError(
            f"tuning.method: {method} needs pairs with a user column, and source {config.source.name} "
            "generates pairs without users; remove source"
        )
    if bool(validation.prompts) != (validation.user is not None):
        raise DiffalignError(
            "validation.user: validation images need both validation.prompts and a user with an id in data.users"
        )
    if validation.guards and validation.user is None:
        name = "faithfulness" if validation.least_diversity is None else "least_diversity"
        raise DiffalignError(
            f"validation.{name}: images are sampled, which needs validation.user and validation.prompts"
        )
    if validation.user is not None and users is None:
        raise DiffalignError("validation.user: this is an id in data.users, which is not set; set data.users")


def can_hold_out(config: Any) -> None:
    """Raises DiffalignError for held-out pairs that a run cannot measure, and for settings that need them."""
    validation, objective, source = config.validation, config.objective, config.source
    if validation.least_faithfulness is not None and validation.faithfulness is None:
        raise DiffalignError(
            "validation.least_faithfulness: a scorer measures it; name one in validation.faithfulness, e.g. clip"
        )
    if validation.pairs is None:
        for name in ("early_stopping_patience", "least_diversity", "faithfulness", "load_best_model_at_end"):
            value = getattr(validation, name)
            if value is not None and value is not False:  # a limit of 0 is given
                raise DiffalignError(f"validation.{name} needs held-out pairs: set validation.pairs, e.g. to 0.1")
        return
    if validation.pairs_every % config.training.logging_steps:
        raise DiffalignError(
            f"validation.pairs_every: {validation.pairs_every} is not a multiple of training.logging_steps "
            f"({config.training.logging_steps}); held-out pairs are measured at steps that are logged"
        )
    if objective.compares == "steps":
        raise DiffalignError(
            f"validation.pairs: {objective.name} compares steps of the sampler, which stored pairs do not have; "
            "remove it, and use validation.prompts"
        )
    if (
        validation.stops_or_loads
        and validation.metric_for_best_model != "loss"
        and objective.compares == "chosen images"
    ):
        raise DiffalignError(
            f"validation.metric_for_best_model: {objective.name} does not compare the images of a pair; use loss"
        )
    if source is not None and source.own_reference:
        raise DiffalignError(
            f"validation.pairs: source {source.name} compares the policy with its own snapshots, so numbers of "
            "different steps have different references; remove it, and use validation.prompts"
        )
    if isinstance(validation.pairs, str):
        if config.data.scores is not None:
            raise DiffalignError(
                "validation.pairs: data.scores belong to the pairs of data.path; give a share of these, e.g. 0.1"
            )
        return
    if source is not None:
        raise DiffalignError(
            f"validation.pairs: source {source.name} generates its pairs, so none can be held out; give the path of "
            "labelled pairs"
        )
    if validation.pairs_split is not None:
        raise DiffalignError("validation.pairs_split: a share is of the pairs of data.path; remove it")


def can_fuse_kernels(model: ModelSection) -> None:
    """Raises DiffalignError for fused kernels with an unsupported memory layout or with torch.compile."""
    if model.compile:
        raise DiffalignError("model.fused_kernels: model.compile fuses the same layers; set one of the two to false")
    if not model.channels_last:
        raise DiffalignError(
            "model.fused_kernels: the kernels need channels-last activations; set model.channels_last: true"
        )


def reference_batch_fits(config: Any) -> None:
    """A larger batch for the reference needs several micro-batches in a step, and a reference."""
    training, size = config.training, config.training.reference_batch_size
    if size is None:
        return
    step = training.train_batch_size * training.gradient_accumulation_steps
    if size <= training.train_batch_size or size % training.train_batch_size or size > step:
        raise DiffalignError(
            f"training.reference_batch_size: {size} is not valid; give a multiple of "
            f"train_batch_size ({training.train_batch_size}) above it, at most {step} "
            "(train_batch_size × gradient_accumulation_steps)"
        )
    if not config.objective.needs_reference or config.data.cache_reference_errors:
        raise DiffalignError(
            "training.reference_batch_size: this run does not evaluate a reference in its steps; set it to null"
        )


def can_have_a_reference(config: Any) -> None:
    """`tuning.reference` needs an objective with a reference, and no source or cache that sets its own."""
    if not config.objective.needs_reference:
        raise DiffalignError(
            f"tuning.reference: objective {config.objective.name} has no reference; remove tuning.reference"
        )
    if config.source is not None and config.source.own_reference:
        raise DiffalignError(
            f"tuning.reference: source {config.source.name} chooses the reference itself; remove tuning.reference"
        )
    if config.data.cache_trajectories or config.data.cache_reference_errors:
        raise DiffalignError(
            "tuning.reference: data.cache_trajectories and data.cache_reference_errors store results of the base; "
            "set them to false"
        )


def can_move_the_reference(config: Any) -> None:
    """Raises DiffalignError for a reference that cannot follow the policy, or settings of one that does not."""
    training, objective = config.training, config.objective
    own = type(training).model_fields
    if training.ref_model_sync_steps is None:
        for name in ("ref_model_mixup_alpha", "ref_model_decay", "ref_model_max_distance"):
            if getattr(training, name) != own[name].default:
                raise DiffalignError(f"training.{name}: needs training.ref_model_sync_steps; without it nothing moves")
        return
    reason = None
    if not objective.needs_reference:
        reason = f"objective {objective.name} has no reference"
    elif config.source is not None and config.source.own_reference:
        reason = f"source {config.source.name} chooses the reference itself"
    elif not config.tuning.may_follow:
        reason = f"tuning.method {config.tuning.method} does not support it; use lora or full"
    elif not config.tuning.starts_at_reference:
        reason = "with tuning.resume_lora the policy does not start at its reference; give the file as tuning.reference"
    elif config.data.cache_trajectories or config.data.cache_reference_errors:
        reason = "data.cache_trajectories and data.cache_reference_errors store results of a fixed reference"
    elif training.bf16_weights and (training.ref_model_mixup_alpha < 1 or training.ref_model_decay):
        reason = (
            "an average in bfloat16 would not move; use adamw, or training.ref_model_mixup_alpha: 1 without "
            "ref_model_decay"
        )
    elif training.ref_model_decay is not None and training.ref_model_mixup_alpha != 1:
        reason = "ref_model_mixup_alpha and ref_model_decay both say how far it moves; remove one of them"
    elif config.validation.pairs is not None and (objective.drawn is None or objective.needs_distance):
        reason = (
            f"validation.pairs are compared with the reference at its start, and {objective.name} with these settings "
            "needs the reference itself at every measurement; remove validation.pairs"
        )
    if reason is not None:
        raise DiffalignError(f"training.ref_model_sync_steps: {reason}")


def can_keep_trajectories(config: Any) -> None:
    """Trajectories can be cached only where training does not change them."""
    objective = config.objective
    if objective.recording is None:
        raise DiffalignError(
            f"data.cache_trajectories: {objective.name} with these settings inverts with the trained network, or "
            "not at all; only trajectories of a frozen reference can be cached"
        )
    if config.data.cache_dir is None:
        raise DiffalignError(
            "data.cache_trajectories needs data.cache_dir: trajectories are stored beside the encoded images"
        )
    if config.data.proportion_empty_prompts:
        raise DiffalignError(
            "data.cache_trajectories: a trajectory depends on its prompt; set data.proportion_empty_prompts: 0"
        )


def can_keep_errors(config: Any) -> None:
    """Reference errors can be cached only at points that repeat and that no network chose."""
    if config.objective.drawn is None or not config.objective.needs_reference:
        drawn = [n for n, cls in OBJECTIVES.items() if cls.probe is OnSharedNoise.probe and cls.needs_reference]
        raise DiffalignError(
            f"data.cache_reference_errors: {config.objective.name} has no reference, or a network computes its "
            f"points; only errors at randomly drawn points can be cached ({', '.join(drawn)})"
        )
    if config.objective.needs_distance:
        raise DiffalignError(
            f"data.cache_reference_errors: {config.objective.name} with these settings depends on the distance between "
            "policy and reference, which errors alone do not give; set it to false"
        )
    if config.data.draws_per_pair is None:
        raise DiffalignError("data.cache_reference_errors needs data.draws_per_pair: without it no draw ever repeats")
    if config.data.cache_dir is None:
        raise DiffalignError(
            "data.cache_reference_errors needs data.cache_dir: errors are stored beside the encoded images"
        )


def can_train_in_bf16(config: Any) -> None:
    """Optimisers without float32 master weights, and the settings they do not support."""
    name = config.training.optimizer
    if not config.tuning.trains_base:
        raise DiffalignError(
            f"training.optimizer: {name} is for tuning.method: full; for LoRA, which has few weights, use adamw"
        )
    if config.training.mixed_precision != "bf16":
        raise DiffalignError(f"training.optimizer: {name} stores weights in bfloat16; set mixed_precision: bf16")
    if config.training.ema_decay is not None:
        raise DiffalignError("training.ema_decay: an average in bfloat16 would not change; use adamw, or no EMA")
    if config.source is not None and config.source.own_reference:
        raise DiffalignError(f"training.optimizer: {name} does not support a source that stores snapshots; use adamw")


def usable_together(config: Any) -> None:
    """Raises DiffalignError for settings that a source does not support."""
    source, objective, data = config.source, config.objective, config.data
    finished = objective.compares not in ("graded images", "steps")  # then pairs of images are enough
    if source.gives != objective.compares and not (finished and source.gives == "images"):
        usable = " or ".join(name for name, cls in OBJECTIVES.items() if cls.compares == source.gives)
        only = "objectives of pairs" if source.gives == "images" else f"objective {usable} only"
        raise DiffalignError(
            f"source: {source.name} generates {source.gives} for {only}, and objective {objective.name} compares "
            f"{objective.compares}"
        )
    for own, its in getattr(source, "same_in_objective", {}).items():
        if getattr(source, own) != getattr(objective, its):
            raise DiffalignError(
                f"source.{own} = {getattr(source, own)} and objective.{its} = {getattr(objective, its)}: the "
                "objective compares the steps that the source sampled; set both to the same value"
            )
    once_a_round = getattr(source, "same_in_training", {})
    if once_a_round and source.steps_per_round > 1 and config.training.mixed_precision == "fp16":
        raise DiffalignError(
            "training.mixed_precision: fp16 skips steps that overflow, and with source.steps_per_round = "
            f"{source.steps_per_round} the reference then follows the policy inside a round, not at its end; use bf16"
        )
    for own, its in once_a_round.items():
        if getattr(source, own) != getattr(config.training, its):
            raise DiffalignError(
                f"source.{own} = {getattr(source, own)} and training.{its} = {getattr(config.training, its)}: the "
                "reference that samples a round must follow the policy once a round; set both to the same value"
            )
    idle = [
        "pairs_of_ranking",
        "cache_dir",
        "invert_preference",
        "dataloader_num_workers",
        "scores",
        "curriculum",
        "draws_per_pair",
    ]
    idle += ["aspect_buckets", "pairs_of_ranking"]
    if source.data == "prompts":
        idle += ["format", "split", "columns", "random_flip", "center_crop", "verify"]
    if set_ := [name for name in idle if getattr(data, name) != type(data).model_fields[name].default]:
        raise DiffalignError(
            f"data.{', data.'.join(set_)}: source {source.name} generates its images and has no such setting; remove it"
        )
