"""One YAML file is one run: parsed, overridden from the command line, validated, and written back with all defaults.

Field names follow diffusers and TRL. Unknown keys and wrong values are errors, reported all at once, each with the
nearest right name or the allowed values. The nodes `tuning`, `objective` and `source` become dataclasses of their own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, InstanceOf, ValidationError, field_validator, model_validator

from diffalign.config.compatibility import check_together
from diffalign.config.data_sections import packaged_asset as packaged_asset
from diffalign.config.health_section import HealthSection
from diffalign.config.named_classes import (
    parse_named,
    parse_objective,
    parse_tuning,
    plain_fields,
    plain_named,
    plain_objective_node,
)
from diffalign.config.overrides import describe_fault, override
from diffalign.config.sections import (
    OBJECTIVE_ONLY,
    STORED_BEFORE,
    DataSection,
    ModelSection,
    PreferenceModelSection,
    TrainingSection,
    ValidationSection,
)
from diffalign.config.strict_yaml import ConfigError, dump_yaml, read_yaml
from diffalign.config.value_types import PathText, Section, Seed, Switch
from diffalign.errors import DiffalignError
from diffalign.io.files import save_text
from diffalign.models.adapters.core_methods import LoRA
from diffalign.models.adapters.methods import TuningMethod
from diffalign.sources import SOURCES

_Settings = TypeVar("_Settings", bound=BaseModel)


class Config(Section):
    """The settings of a run."""

    output_dir: PathText
    overwrite_output_dir: Switch = False  # false: a folder with a run is resumed or refused, never lost
    seed: Seed = 0
    model: ModelSection
    tuning: InstanceOf[TuningMethod] = LoRA()  # what is trained, and what it is compared with
    objective: Any  # an objective's dataclass
    source: Any = None  # the settings of a source that makes pairs while training; null: the pairs of `data`
    data: DataSection
    training: TrainingSection = TrainingSection()
    validation: ValidationSection = ValidationSection()
    health: HealthSection = HealthSection()

    @field_validator("tuning", mode="before")
    @classmethod
    def _tuning(cls, node: Any) -> Any:
        return parse_tuning(node)

    @field_validator("objective", mode="before")
    @classmethod
    def _objective(cls, node: Any) -> Any:
        return parse_objective(node)

    @field_validator("source", mode="before")
    @classmethod
    def _source(cls, node: Any) -> Any:
        return None if node is None else parse_named(node, SOURCES, "source")

    @model_validator(mode="after")
    def _compatible(self) -> Config:
        check_together(self)
        return self

    def resolved(self) -> dict[str, Any]:
        """The config as plain YAML-ready values, defaults included."""
        return {
            **self.model_dump(mode="json", exclude={"tuning", "objective", "source"}),
            "tuning": {"method": self.tuning.method, **plain_fields(self.tuning)},
            "objective": plain_objective_node(self.objective),
            "source": None if self.source is None else plain_named(self.source, SOURCES),
        }


class PreferenceModelConfig(Section):
    """The settings of a run that trains a preference model instead of the base."""

    output_dir: PathText
    overwrite_output_dir: Switch = False
    seed: Seed = 0
    model: ModelSection
    preference_model: PreferenceModelSection
    data: DataSection
    training: TrainingSection = TrainingSection()

    @model_validator(mode="after")
    def _whole(self) -> PreferenceModelConfig:
        for name, keys in OBJECTIVE_ONLY.items():
            section = getattr(self, name)
            defaults = {k: type(section).model_fields[k].default for k in keys}
            idle = [k for k in keys if getattr(section, k) not in (defaults[k], STORED_BEFORE.get(k, defaults[k]))]
            if idle:
                raise DiffalignError(
                    f"{name}.{f', {name}.'.join(idle)}: the run of a preference model has no such setting; remove it"
                )
        if self.training.bf16_weights:
            name = self.training.optimizer
            raise DiffalignError(
                f"training.optimizer: {name} is for the UNet of a base model; use adamw for a preference model"
            )
        if self.training.mixed_precision == "fp16":
            raise DiffalignError(
                "training.mixed_precision: a preference model trains in bf16, or in float32 with "
                "no; fp16 is not supported"
            )
        return self

    def resolved(self) -> dict[str, Any]:
        """The config as plain YAML-ready values, defaults included."""
        return self.model_dump(mode="json")


AnyConfig = Config | PreferenceModelConfig


def load_config(path: str | Path, overrides: Sequence[str] = (), later: Sequence[str] = ()) -> AnyConfig:
    """Reads a YAML file, applies `key.sub=value` overrides and checks the result.

    A key is overridden once in each of the two lists; `later` wins over `overrides`.

    With a section `preference_model` in place of `objective` it is a PreferenceModelConfig.

    Raises ConfigError naming every fault at once.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"{path}: no such config file; `diffalign list` shows the packaged ones")
    tree = read_yaml(path)
    override(tree, overrides)
    override(tree, later)
    return parse_config(tree, where=str(path))


def parse_config(tree: dict[str, Any], where: str = "config", *, recorded: bool = False) -> AnyConfig:
    """A checked config from nested dictionaries. Raises ConfigError naming every fault at once.

    recorded: a run wrote it, so no warning asks for today's names of its keys.
    """
    kind = PreferenceModelConfig if "preference_model" in tree else Config
    try:
        return kind.model_validate(tree, context={"recorded": recorded})
    except ValidationError as e:
        lines = [f"  {describe_fault(fault, kind)}" for fault in e.errors()]
        raise ConfigError(f"{where}: {len(lines)} error(s)\n" + "\n".join(lines)) from None


def settings_of(section: type[_Settings], values: Mapping[str, Any], where: str) -> _Settings:
    """A section of a config from values by name. Raises ConfigError naming every fault at once."""
    try:
        return section.model_validate(dict(values))
    except ValidationError as e:
        raise ConfigError(f"{where}: " + "; ".join(describe_fault(fault, section) for fault in e.errors())) from None


def save_config(config: AnyConfig, path: Path) -> None:
    """Writes the resolved config; loading it gives the same config back."""
    save_text(path, dump_yaml(config.resolved()))


def packaged_configs() -> list[tuple[Path, str]]:
    """The runs' configs that come with diffalign, each with the first line of its header: what it is for."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package.parent / "training_configs", package / "_training_configs"):
        if folder.is_dir():
            files = sorted(file for file in folder.rglob("*.yaml") if file.parent != folder / "accelerate")
            return [(file, file.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ")) for file in files]
    return []


def configs_by_objective() -> dict[str, list[str]]:
    """The packaged configs of each objective, e.g. world/dpo.yaml; configs of preference models are not included."""
    found: dict[str, list[str]] = {}
    for path, _ in packaged_configs():
        node = read_yaml(path).get("objective")
        if node is not None:
            found.setdefault(node["name"], []).append(path.as_posix().rpartition("training_configs/")[2])
    return found


def packaged_config(name: str) -> Path:
    """The packaged config called e.g. world/dpo.yaml. Raises ConfigError where it is not installed."""
    for file, _ in packaged_configs():
        if file.as_posix().endswith(f"/{name}"):
            return file
    raise ConfigError(f"no config {name} in this installation; reinstall diffalign")
