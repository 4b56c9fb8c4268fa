"""One YAML file is one run: parsed, overridden from the command line, checked whole, and written back resolved.

Field names follow diffusers and TRL. Unknown keys and wrong values are errors, reported all at once, each with the
nearest right name or the allowed values. The `objective` and `source` nodes parse straight into their own dataclasses.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, field_validator, model_validator

from diffalign.config_checks import (
    can_fuse_kernels,
    can_have_a_reference,
    can_keep_errors,
    can_keep_trajectories,
    can_train_in_bf16,
    check_tuning,
    check_users,
    reference_batch_fits,
    usable_together,
)
from diffalign.config_data import CurriculumSection, Scores, axes_of, checked_scores, packaged_asset
from diffalign.config_health import HealthSection, can_roll_back
from diffalign.config_text import SWITCHES, ConfigError, describe, message, override
from diffalign.data.axes import Aggregate, Axis
from diffalign.errors import DiffalignError
from diffalign.objectives import OBJECTIVES
from diffalign.plugins import name_of, nearest, resolve
from diffalign.sources import SOURCES

_Settings = TypeVar("_Settings", bound=BaseModel)
Fraction = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]


# overriding one of these drops the file's other settings of the section
# Settings that only a run with an objective has.
OBJECTIVE_ONLY = {
    "model": ("gradient_checkpointing", "compile", "channels_last", "fused_kernels"),
    "data": (
        "cache_dir",
        "cache_variants",
        "cache_dtype",
        "cache_trajectories",
        "draws_per_pair",
        "cache_reference_errors",
        "scores",
        "aggregate",
        "relabel",
        "curriculum",
        "users",
        "proportion_empty_prompts",
    ),
    "training": ("ema_decay", "max_unet_forwards", "reference_batch_size"),
}
ADAM_ONLY = ("adam_beta1", "adam_beta2", "adam_epsilon")


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class ModelSection(_Section):
    """The base model."""

    _shipped = field_validator("pretrained_model_name_or_path", mode="before")(packaged_asset)

    pretrained_model_name_or_path: str  # diffusers folder, Hub id, or a single-file .safetensors checkpoint
    pretrained_vae_model_name_or_path: str | None = None  # e.g. an fp16-safe SDXL VAE
    revision: str | None = None
    variant: str | None = None  # e.g. fp16
    single_file_config: str | None = None  # folder with the configs of a single-file checkpoint, for work offline
    prediction_type: Literal["epsilon", "v_prediction", "sample"] | None = None  # null: the scheduler config's
    attention: Literal["auto", "cudnn", "flash", "efficient", "xformers", "math"] = "auto"
    gradient_checkpointing: Literal["none", "selective", "full"] = "none"  # true means full, false none
    compile: bool = False  # torch.compile of each transformer and resnet block
    channels_last: bool = False  # convolutions in NHWC
    fused_kernels: bool = False  # Triton kernels for GroupNorm with SiLU, and GEGLU; needs channels_last

    @field_validator("gradient_checkpointing", mode="before")
    @classmethod
    def _switch(cls, value: Any) -> Any:
        return {True: "full", False: "none"}[value] if isinstance(value, bool) else value


class TuningSection(_Section):
    """What is trained, and what it is compared with."""

    method: Literal["lora", "full", "user_attention"] = "lora"
    rank: Count = 16
    alpha: Positive | None = None  # null: equal to rank
    target_modules: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    resume_lora: str | None = None  # start from these LoRA weights
    reference: str | None = None  # tuned weights of the reference, from which the policy starts too; null: the base
    user_tokens: Count = 4  # tokens that user attention makes of a user (IP-Adapter's 4)
    user_scale: Positive = 1.0  # of what user attention adds to the text's

    @property
    def lora_alpha(self) -> float:
        """alpha, or the rank where none is given."""
        return float(self.rank if self.alpha is None else self.alpha)


class DataSection(_Section):
    """The preference pairs and how they become latents."""

    _shipped = field_validator("path", "users", mode="before")(packaged_asset)

    path: str  # file, folder or Hub id
    format: str = "auto"
    split: str = "train"
    columns: dict[str, str] = {}  # part -> column where names differ, e.g. {prompt: text, chosen: winner}
    max_pairs: Count | None = None
    invert_preference: bool = False
    # files of scores by `diffalign data score`, in place of score columns: one, several, or named axes with weights
    scores: Scores | None = None
    aggregate: Aggregate = "sum"  # how several axes of scores become a pair's two
    relabel: bool = False  # the image with the higher of these scores is the chosen one, whatever the labels say
    users: str | None = None  # file of users' embeddings, where the pairs name their user by an id
    resolution: Annotated[int, Field(ge=8, multiple_of=8)] | None = None  # pixels; null: the model family's
    center_crop: bool = True
    random_flip: bool = False
    proportion_empty_prompts: Fraction = 0.0
    verify: Literal["none", "header", "full"] = "header"
    cache_dir: str | None = None  # encode once, train without VAE and text encoders
    cache_variants: Count = 1  # crops/flips of each pair kept in the cache
    cache_dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # of moments and embeddings in the cache
    cache_trajectories: bool = False  # keep the reference's inversions in the cache, for objectives that look at them
    draws_per_pair: Count | None = None  # a pair's visits repeat after so many: latent, t, noise; null: never
    cache_reference_errors: bool = False  # ask the reference once for each draw and keep its errors in the cache
    dataloader_num_workers: Annotated[int, Field(ge=0)] = 0
    curriculum: CurriculumSection | None = None  # null: every pair from the start

    _scores = field_validator("scores", mode="before")(checked_scores)

    @property
    def axes(self) -> list[Axis]:
        """The files of scores with names and weights; empty without any."""
        return axes_of(self.scores)


class TrainingSection(_Section):
    """Optimisation, precision, checkpoints, logging."""

    max_train_steps: Count = 2000
    max_unet_forwards: Count | None = None  # end before the step that would exceed so many images through the UNet
    train_batch_size: Count = 1  # pairs per device and micro-step
    gradient_accumulation_steps: Count = 1
    reference_batch_size: Count | None = None  # pairs in one forward of the reference; null: train_batch_size
    learning_rate: Positive = 1e-5
    scale_lr: bool = False  # learning_rate × processes × accumulation × batch
    lr_scheduler: Literal["constant", "constant_with_warmup", "linear", "cosine", "polynomial"] = "constant_with_warmup"
    lr_warmup_steps: Annotated[int, Field(ge=0)] = 0
    optimizer: Literal["adamw", "adamw_8bit", "adamw_bf16", "adamw_8bit_bf16", "adafactor"] = "adamw"
    adam_beta1: Fraction = 0.9
    adam_beta2: Fraction = 0.999
    adam_weight_decay: Annotated[float, Field(ge=0)] = 1e-2
    adam_epsilon: Positive = 1e-8
    max_grad_norm: Positive | None = 1.0  # null: no clipping; the norm is logged either way
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    allow_tf32: bool = False
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None  # null: no EMA
    checkpointing_steps: Count | None = None  # null: only the final weights
    checkpoints_total_limit: Count | None = None
    resume_from_checkpoint: str | None = None  # a checkpoint folder, or "latest"
    logging_steps: Count = 10
    report_to: Literal["tensorboard", "wandb", "none"] = "tensorboard"

    @field_validator("mixed_precision", mode="before")
    @classmethod
    def _yaml_no(cls, value: Any) -> Any:
        return "no" if value is False else value  # YAML reads a bare no as false

    @property
    def bf16_weights(self) -> bool:
        """Whether the trained weights are bfloat16 themselves, without a float32 master."""
        return self.optimizer in ("adamw_bf16", "adamw_8bit_bf16")


class ValidationSection(_Section):
    """Pictures made during training."""

    prompts: tuple[str, ...] = ()
    every: Count = 100  # optimiser steps
    steps: Count = 25
    guidance_scale: Annotated[float, Field(ge=0)] = 5.0
    seed: int = 0
    user: str | None = None  # an id in data.users: for whom the pictures are, with user attention


class Config(_Section):
    """A whole run."""

    output_dir: str
    overwrite_output_dir: bool = False  # false: a folder that holds a run is resumed or refused, never lost
    seed: int = 0
    model: ModelSection
    tuning: TuningSection = TuningSection()
    objective: Any  # an objective's dataclass
    source: Any = None  # the settings of a source that makes pairs while training; null: the pairs of `data`
    data: DataSection
    training: TrainingSection = TrainingSection()
    validation: ValidationSection = ValidationSection()
    health: HealthSection = HealthSection()

    @field_validator("objective", mode="before")
    @classmethod
    def _objective(cls, node: Any) -> Any:
        return _parse_named(node, OBJECTIVES, "objective")

    @field_validator("source", mode="before")
    @classmethod
    def _source(cls, node: Any) -> Any:
        return None if node is None else _parse_named(node, SOURCES, "source")

    @model_validator(mode="after")
    def _whole(self) -> Config:
        training = self.training
        if training.lr_scheduler == "constant" and training.lr_warmup_steps:
            raise DiffalignError(
                "training.lr_warmup_steps: lr_scheduler constant has no warm-up; use constant_with_warmup"
            )
        reference_batch_fits(self)
        if training.optimizer == "adafactor":
            idle = [n for n in ADAM_ONLY if getattr(training, n) != TrainingSection.model_fields[n].default]
            if idle:
                raise DiffalignError(f"training.{', training.'.join(idle)}: adafactor has no such setting")
        if self.model.compile and self.model.gradient_checkpointing == "selective":
            raise DiffalignError(
                "model.compile: a compiled block already makes its cheap activations again; use gradient_checkpointing "
                "none, or full"
            )
        if self.model.fused_kernels:
            can_fuse_kernels(self.model)
        if training.bf16_weights:
            can_train_in_bf16(self)
        if self.data.cache_variants > 1 and self.data.cache_dir is None:
            raise DiffalignError("data.cache_variants needs data.cache_dir: without a cache every visit crops anew")
        if self.data.aggregate != "sum" and len(self.data.axes) < 2:
            raise DiffalignError(f"data.aggregate: {self.data.aggregate} needs several axes in data.scores")
        if self.data.relabel and self.data.scores is None:
            raise DiffalignError("data.relabel needs data.scores, a file that `diffalign data score` writes")
        if self.data.cache_trajectories:
            can_keep_trajectories(self)
        if self.data.cache_reference_errors:
            can_keep_errors(self)
        check_tuning(self.tuning)
        check_users(self)
        if self.tuning.reference is not None:
            can_have_a_reference(self)
        if self.source is not None:
            usable_together(self)
        can_roll_back(self.health, self.training, self.source)
        return self

    def resolved(self) -> dict[str, Any]:
        """The config as plain YAML-ready values, defaults filled in."""
        plain = self.model_dump(mode="json", exclude={"objective", "source"})
        source = None if self.source is None else _plain(self.source)
        return {**plain, "objective": _plain(self.objective), "source": source}


class PreferenceModelSection(_Section):
    """A step-aware preference model, trained to judge what the base is heading for at any timestep."""

    _shipped = field_validator("pretrained_model_name_or_path", mode="before")(packaged_asset)

    pretrained_model_name_or_path: str = "yuvalkirstain/PickScore_v1"  # the CLIP it starts from: folder or Hub id
    tokenizer: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"  # where that folder holds none
    guidance_scale: Annotated[float, Field(ge=0)] = 5.0  # of the base's predictions (the SPO release's)
    relabel_with: str | None = None  # a scorer whose verdict on the clean pictures replaces the labels
    relabel_gap: Fraction = 0.1  # difference of probabilities within which that verdict is a tie


class PreferenceModelConfig(_Section):
    """A whole run that trains a preference model instead of the base."""

    output_dir: str
    overwrite_output_dir: bool = False
    seed: int = 0
    model: ModelSection
    preference_model: PreferenceModelSection
    data: DataSection
    training: TrainingSection = TrainingSection()

    @model_validator(mode="after")
    def _whole(self) -> PreferenceModelConfig:
        for name, keys in OBJECTIVE_ONLY.items():
            section = getattr(self, name)
            idle = [k for k in keys if getattr(section, k) != type(section).model_fields[k].default]
            if idle:
                raise DiffalignError(f"{name}.{f', {name}.'.join(idle)}: a preference model's run has no such setting")
        if self.training.bf16_weights:
            name = self.training.optimizer
            raise DiffalignError(f"training.optimizer: {name} is for a base's UNet; use adamw for a preference model")
        if self.training.mixed_precision == "fp16":
            raise DiffalignError("training.mixed_precision: a preference model trains in bf16, or in float32 with no")
        return self

    def resolved(self) -> dict[str, Any]:
        """The config as plain YAML-ready values, defaults filled in."""
        return self.model_dump(mode="json")


AnyConfig = Config | PreferenceModelConfig


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> AnyConfig:
    """Reads a YAML file, applies `key.sub=value` overrides and checks the result.

    With a section `preference_model` in place of `objective` it is a PreferenceModelConfig.

    Raises ConfigError naming every fault at once.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"{path}: no such config file; `diffalign list` names the ones that come with the package")
    try:
        tree = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as e:
        raise ConfigError(f"{path}: not valid YAML: {e}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: a config is a mapping of sections, found {type(tree).__name__}")
    for text in sorted(overrides, key=lambda text: text.partition("=")[0] not in SWITCHES):
        override(tree, text)
    return parse_config(tree, where=str(path))


def parse_config(tree: dict[str, Any], where: str = "config") -> AnyConfig:
    """A checked config from nested dictionaries. Raises ConfigError naming every fault at once."""
    kind = PreferenceModelConfig if "preference_model" in tree else Config
    try:
        return kind.model_validate(tree)
    except ValidationError as e:
        lines = [f"  {describe(fault, kind)}" for fault in e.errors()]
        raise ConfigError(f"{where}: {len(lines)} fault(s)\n" + "\n".join(lines)) from None


def settings_of(section: type[_Settings], values: Mapping[str, Any], where: str) -> _Settings:
    """A section of a config from values by name. Raises ConfigError naming every fault at once."""
    try:
        return section.model_validate(dict(values))
    except ValidationError as e:
        raise ConfigError(f"{where}: " + "; ".join(describe(fault, section) for fault in e.errors())) from None


def save_config(config: AnyConfig, path: Path) -> None:
    """Writes the resolved config; loading it gives the same config back."""
    path.write_text(yaml.safe_dump(config.resolved(), sort_keys=False, allow_unicode=True))


def packaged_configs() -> list[tuple[Path, str]]:
    """The configs that come with diffalign, each with the first line of its header: what it is for."""
    package = Path(__file__).resolve().parent
    for folder in (package.parent / "training_configs", package / "_training_configs"):
        if folder.is_dir():
            files = sorted(folder.rglob("*.yaml"))
            return [(file, file.read_text().partition("\n")[0].lstrip("# ")) for file in files]
    return []


def configs_by_objective() -> dict[str, list[str]]:
    """The packaged configs of each objective, e.g. world/dpo.yaml; those of preference models have none."""
    found: dict[str, list[str]] = {}
    for path, _ in packaged_configs():
        node = yaml.safe_load(path.read_text()).get("objective")
        if node is not None:
            found.setdefault(node["name"], []).append(path.as_posix().rpartition("training_configs/")[2])
    return found


def packaged_config(name: str) -> Path:
    """The packaged config called e.g. world/dpo.yaml. Raises ConfigError where it is not installed."""
    for file, _ in packaged_configs():
        if file.as_posix().endswith(f"/{name}"):
            return file
    raise ConfigError(f"no config {name} comes with this installation; reinstall diffalign")


def _parse_named(node: Any, known: Mapping[str, Any], what: str) -> Any:
    """The dataclass called `name` in a table, made from the node's other keys."""
    if dataclasses.is_dataclass(node) and not isinstance(node, type):
        _complete(node, what)
        name_of(type(node), known)  # a saved config must find it again
        return node
    if not isinstance(node, dict) or "name" not in node:
        raise DiffalignError(f"give a mapping with a name, one of: {', '.join(known)}")
    name = node["name"]
    cls = resolve(str(name), known, what)
    if not dataclasses.is_dataclass(cls):
        raise DiffalignError(f"{what} {name!r} is no dataclass; its fields are its settings")
    _complete(cls, what)
    allowed = [f.name for f in dataclasses.fields(cls)]
    settings = {k: v for k, v in node.items() if k != "name"}
    faults = [f"{k}: {name} has no such setting{nearest(k, allowed)}" for k in settings if k not in allowed]
    if not faults:
        try:
            return TypeAdapter(cls).validate_python(settings)
        except ValidationError as e:
            faults = [f"{'.'.join(map(str, f['loc'])) or name}: {message(f)}" for f in e.errors()]
    raise DiffalignError("; ".join(faults))


def _complete(settings: Any, what: str) -> None:
    """Raises DiffalignError for a class that lacks what every objective or source has."""
    missing = [name for name in _NEEDED[what] if not hasattr(settings, name)]
    if missing:
        cls = settings if isinstance(settings, type) else type(settings)
        raise DiffalignError(
            f"{what} {cls.__qualname__} lacks {', '.join(missing)}; CONTRIBUTING.md shows what one consists of"
        )


_NEEDED = {
    "objective": ("name", "paper", "needs_reference", "needs_uncond", "probe", "score"),
    "source": ("name", "paper", "data", "objectives", "own_reference", "build", "small"),
}


def _plain(settings: Any) -> dict[str, Any]:
    """A dataclass of settings with its name, as YAML-ready values."""
    values = {f.name: getattr(settings, f.name) for f in dataclasses.fields(settings)}
    known = OBJECTIVES if hasattr(settings, "score") else SOURCES
    return {
        "name": name_of(type(settings), known),
        **{k: list(v) if isinstance(v, tuple) else v for k, v in values.items()},
    }
