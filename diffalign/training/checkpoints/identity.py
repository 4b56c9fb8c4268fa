"""Hashes of a run's data and base model. A checkpoint records them, and a run that resumes compares them.

Settings name paths; these hashes are of what is stored there. They are cheap (everything is loaded and examined anyway)
and compared before anything is encoded or sampled.
"""

from __future__ import annotations

from pathlib import Path

from diffalign.config.schema import AnyConfig, Config
from diffalign.data.table.identity import WORDS, data_identity
from diffalign.data.table.prompts import Table
from diffalign.models.adapters.save_load import find_tuned
from diffalign.models.loading.base import Base
from diffalign.models.loading.fingerprint import outline, outline_files
from diffalign.training.checkpoints.checkpoint import CheckpointError, find_checkpoint, identity_of

Identity = dict[str, dict[str, str]]


def run_identity(config: AnyConfig, table: Table, base: Base) -> Identity:
    """Hashes of a run's data and base, and of its reference's weights where it has its own, by part.

    `base` as it was loaded.
    """
    model = {"unet": outline(base.unet), "noise schedule": _table_of(base)}
    if base.vae is not None:
        model["vae"] = outline(base.vae)
    for place, encoder in enumerate(base.text.models if base.text is not None else ()):
        model[f"text encoder {place + 1}"] = outline(encoder)
    identity = {"data": data_identity(table, contents=_has_cache(config)), "base": model}
    if table.heldout is not None:
        identity["heldout"] = data_identity(table.heldout, contents=_has_cache(config))
    if isinstance(config, Config) and config.tuning.reference is not None:
        identity["reference"] = {"weights": outline_files(find_tuned(config.tuning.reference).path)}
    return identity


def refuse_others(config: AnyConfig, identity: Identity) -> None:
    """Raises CheckpointError naming each part that differs from that of the checkpoint to resume from.

    Parts that the checkpoint does not record (it is of an older version) are not compared.
    """
    resumed = config.training.resume_from_checkpoint
    if resumed is not None and (folder := find_checkpoint(Path(config.output_dir), resumed)) is not None:
        _compare(config, folder, identity)


def _compare(config: AnyConfig, folder: Path, identity: Identity) -> None:
    was = identity_of(folder)
    lines = [
        _line(config, section, name, was[section][name], now)
        for section, parts in identity.items()
        for name, now in parts.items()
        if was.get(section, {}).get(name, now) != now
    ]
    if lines:
        listed = "\n".join(f"  {line}" for line in lines)
        raise CheckpointError(
            f"{folder} is of a run with other data or another base, and resuming would mix them:\n{listed}\n"
            "restore what was there, or start a new run in another output_dir"
        )


def _line(config: AnyConfig, section: str, name: str, was: str, now: str) -> str:
    if section in ("data", "heldout"):
        numbers = f": {was} then, {now} now" if name == "pairs" else " changed"
        path = f"data.path {config.data.path}" if section == "data" else "validation.pairs"
        return f"{path}: {WORDS[name]}{numbers}"
    if section == "reference":
        return f"tuning.reference {getattr(config, 'tuning').reference}: other weights"  # noqa: B009
    what = "another noise schedule" if name == "noise schedule" else f"another {name}"
    return f"model.pretrained_model_name_or_path {config.model.pretrained_model_name_or_path}: {what}"


def _table_of(base: Base) -> str:
    s = base.schedule
    shares = " ".join(f"{float(x):.6g}" for x in s.alphas_cumprod[:: max(1, len(s.alphas_cumprod) // 50)])
    return f"{s.prediction_type} {s.timestep_spacing} {s.steps_offset} {float(s.final_alpha_cumprod):.6g} {shares}"


def _has_cache(config: AnyConfig) -> bool:
    return isinstance(config, Config) and config.data.cache_dir is not None
