"""What is exported: the tuned weights at a path, and the base that they were tuned from."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from diffalign import __version__
from diffalign.config.schema import Config, PreferenceModelConfig, load_config
from diffalign.config.sections import ModelSection
from diffalign.export.names import ExportError
from diffalign.io.manifest import read_manifest
from diffalign.models.adapters.merge import MERGE_FILE
from diffalign.models.adapters.save_load import TunedWeights, find_tuned
from diffalign.models.loading.family import ModelError
from diffalign.models.spec import ModelSpec

_CONFIG = "config.yaml"  # the settings that a run, and each of its checkpoints, keeps beside its weights


@dataclass(frozen=True)
class TunedRun:
    """Tuned weights and the settings that load their base."""

    tuned: TunedWeights
    base: ModelSection
    config: Config | None  # None where no config.yaml says what was trained

    @property
    def objective(self) -> str | None:
        """The objective's name; None where no run is recorded."""
        return None if self.config is None else self.config.objective.name

    @property
    def steps(self) -> int | None:
        """Optimiser steps that the run took to these weights; None where nothing records them."""
        content = read_manifest(self.folder)
        return None if self.config is None or isinstance(content, str) else content.get("step")

    @property
    def hashes(self) -> list[str]:
        """The SHA-256 of each file of the weights, as the run's manifest has them; empty where there is none."""
        content = read_manifest(self.folder)
        files = {} if isinstance(content, str) else content.get("files", {})
        mine = {name: facts for name, facts in files.items() if name.split("/")[0] == self.tuned.path.name}
        return [facts["sha256"] for name, facts in sorted(mine.items()) if name.endswith(".safetensors")]

    @property
    def folder(self) -> Path:
        """Where the weights, the settings and the rest of the run are."""
        return self.tuned.path.parent

    @property
    def finished(self) -> datetime:
        """When the weights were written."""
        files = [self.tuned.path] if self.tuned.path.is_file() else [*self.tuned.path.glob("*.safetensors")]
        return datetime.fromtimestamp(int(max(file.stat().st_mtime for file in files)), UTC)

    def base_spec(self, vae: str | None = None) -> ModelSpec:
        """What `load_base` and `outline_base` take, with another VAE if given in place of the model's own."""
        return replace(self.base.spec, pretrained_vae_model_name_or_path=vae)

    def provenance(self) -> dict[str, str]:
        """Where the weights came from, for a file's metadata: keys of our own."""
        facts = {
            "diffalign.version": __version__,
            "diffalign.tuned": f"{shown(str(self.folder))}/{self.tuned.path.name}",
            "diffalign.base": shown(self.base.pretrained_model_name_or_path),
        }
        if self.base.merge_lora:
            facts["diffalign.merge_lora"] = ", ".join(f"{shown(p)}={w:g}" for p, w in self.base.merge_lora.items())
        return facts | ({"diffalign.objective": self.objective} if self.objective else {})


def shown(place: str) -> str:
    """A Hub id as it is; of a place on this machine its last name, which says nothing of whose it is."""
    path = Path(place)
    if path.is_absolute() or path.exists() or place.startswith("."):
        path = path.absolute()
        return "" if path == Path.home() else path.name
    return place


def find_tuned_run(run: str | Path, base: str | None = None) -> TunedRun:
    """The tuned weights at `run`, as `find_tuned` takes them, and their base: `base`, or the one that the run names.

    A `base` stands for the run's own at another place: of the run's settings, VAE, prediction type and single-file
    config stay, revision and variant go. Raises ExportError for weights no other program can use, for a checkpoint's
    raw weights where the run keeps an average of them, and where nobody names the base.
    """
    found = recorded_run(run, base)
    tuned, config = found.tuned, found.config
    if tuned.layout.adds_layers:
        user = " Images for a user: diffalign generate --users FILE --user ID" if tuned.layout.needs_user else ""
        raise ExportError(
            f"{tuned.path} is {tuned.layout.label}, a layer that no other program has; export covers LoRA and full "
            f"tuning.{user}"
        )
    averaged = config is not None and config.training.ema_decay is not None and _is_checkpoint(Path(run))
    if averaged and not tuned.path.samefile(run):  # named is not the file or folder itself, but where a run has put it
        raise ExportError(
            f"{run} is a checkpoint of a run with EMA: its weights are the raw ones, and their average is only in the "
            "state that resuming needs. Export the finished run, whose weights are the average; or the raw ones by "
            f"naming them: {tuned.path}"
        )
    return found


def recorded_run(run: str | Path, base: str | None = None) -> TunedRun:
    """As `find_tuned_run`, of weights in any layout."""
    config = _config(run)
    if isinstance(config, PreferenceModelConfig):
        raise ExportError(f"{run} trained a preference model, a judge and not a generator: there is nothing to export")
    tuned = find_tuned(run)
    return TunedRun(tuned, _base(run, tuned, config, base), config)


def recorded_base(run: str | Path) -> str | None:
    """The base that the run or merge at `run` names; None where neither is recorded beside the weights."""
    config = _config(run)
    if config is not None:
        return config.model.pretrained_model_name_or_path
    merged = find_tuned(run).path.parent / MERGE_FILE
    return str(json.loads(merged.read_text())["base"]) if merged.is_file() else None


def _config(run: str | Path) -> Config | PreferenceModelConfig | None:
    path = Path(run)
    for folder in (path, path.parent) if path.is_file() or (path / "config.json").is_file() else (path,):
        if (folder / _CONFIG).is_file():
            return load_config(folder / _CONFIG)
    return None


def _is_checkpoint(folder: Path) -> bool:
    return (folder / "training_state.pt").is_file()


def _base(run: str | Path, tuned: TunedWeights, config: Config | None, base: str | None) -> ModelSection:
    if config is not None:
        moved = {} if base is None else {"pretrained_model_name_or_path": base, "revision": None, "variant": None}
        return config.model.model_copy(update=moved)
    base = base or recorded_base(run)
    if base is None:
        raise ModelError(
            f"nothing at {run} says which base the weights were tuned from (no {_CONFIG} or {MERGE_FILE} beside "
            f"{tuned.path}); give it with --base: a diffusers folder, a Hub id or one .safetensors file"
        )
    return ModelSection(pretrained_model_name_or_path=base)
