"""The entries of the arena, their settings, and what is the same for all.

Every registered objective takes part: with its packaged config `world/NAME.yaml` where there is one, with its own
defaults on Diffusion-DPO's otherwise. What the protocol fixes (base, pairs, prompts, batch, steps, precision, warm-up)
replaces what a config says; learning rate and one scale of each method come from the sweep.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffalign.config.schema import Config, load_config, packaged_asset, packaged_config
from diffalign.config.strict_yaml import ConfigError
from diffalign.errors import DiffalignError, MissingFileError
from diffalign.objectives import OBJECTIVES

BASE = "assets/world/base"
TUNED = "assets/arena/tuned.json"  # what the sweep chose; `diffalign arena --sweep` writes it

BATCH = 32  # pairs of an optimiser step
LIST_IMAGES = 4  # of each list, where an objective compares lists; a step has as many images as one of BATCH pairs
WARMUP = 10  # optimiser steps
RATES = (5e-6, 1e-5, 2e-5, 4e-5, 8e-5)  # learning rates of the sweep; 1e-4 breaks Diffusion-DPO here (docs/world.md)

PREFERENCES = ("world", "world-size")  # scorers: the pairs' labels, and what online methods are judged by


@dataclass(frozen=True)
class Entry:
    """One line of the leaderboard."""

    name: str
    config: str  # packaged config that it starts from
    changes: tuple[str, ...] = ()  # overrides that make it what it is
    scale: str | None = None  # the setting that the sweep varies besides the learning rate
    scales: tuple[Any, ...] = ()  # its other values
    rates: tuple[float, ...] = RATES  # learning rates that the sweep tries
    finalists: int = 2  # settings that the sweep tries on further seeds; 1: its first seed alone decides
    control: str = ""  # why it is there, where it is no method
    shuffled: bool = False  # its pairs have random labels
    settings_of: str | None = None  # the entry whose settings from the sweep it has; None: its own
    own_judge: bool = False  # its judge is its config's, trained on the first preference, which alone it takes part in


@dataclass(frozen=True)
class Protocol:
    """What is the same for every entry."""

    steps: int  # optimiser steps of BATCH pairs
    seeds: tuple[int, ...]  # of training
    forwards_seeds: tuple[int, ...]  # of `seeds`, at the UNet forwards of Diffusion-DPO's steps; none: no such view
    second_seeds: tuple[int, ...]  # of training on the second preference; none: no such view
    pictures: int  # of each prompt and model, on paired starting noise
    split: str  # of the world's captions

    @property
    def unet_forwards(self) -> int:
        """Images through the UNet in Diffusion-DPO's steps: two sides, policy and reference."""
        return 4 * BATCH * self.steps


FULL = Protocol(steps=60, seeds=(0, 1, 2), forwards_seeds=(0,), second_seeds=(0,), pictures=12, split="final")
QUICK = Protocol(steps=40, seeds=(0,), forwards_seeds=(), second_seeds=(), pictures=12, split="final")
SWEEP = Protocol(steps=40, seeds=(0, 1), forwards_seeds=(), second_seeds=(), pictures=6, split="heldout")

_BETAS = (125.0, 500.0)  # below the 2000 of the world's configs; 8000 gained least in an earlier sweep
_NEWER = RATES[1:]  # of methods that came when 5e-6 was known to gain least
_DEAR = RATES[:4]  # of methods of which a trial takes over two minutes: fewer rates, on one seed
_SPECIAL = {
    # objective -> its own second setting in the sweep; others have the learning rate alone
    "dpo": Entry("dpo", "world/dpo.yaml", scale="objective.beta", scales=_BETAS),
    "cdpo": Entry("cdpo", "world/cdpo.yaml", scale="objective.beta", scales=_BETAS),
    "ipo": Entry("ipo", "world/ipo.yaml", scale="objective.tau", scales=(60.0, 250.0)),
    "robust_dpo": Entry("robust_dpo", "world/robust_dpo.yaml", scale="objective.beta", scales=_BETAS),
    "poly_dpo": Entry("poly_dpo", "world/poly_dpo.yaml", scale="objective.beta", scales=_BETAS, rates=_NEWER),
    "linear_dpo": Entry(
        "linear_dpo", "world/linear_dpo.yaml", scale="objective.beta", scales=(50.0, 1000.0), rates=_NEWER
    ),
    "dmpo": Entry("dmpo", "world/dmpo.yaml", scale="objective.beta", scales=_BETAS, rates=_NEWER),
    "dspo": Entry("dspo", "world/dspo.yaml", scale="objective.beta", scales=(0.1, 1.0), rates=_NEWER),
    "kto": Entry("kto", "world/kto.yaml", scale="objective.beta", scales=(60.0, 250.0)),
    "mapo": Entry("mapo", "world/mapo.yaml", scale="objective.beta", scales=(0.005, 0.02)),
    "f_dpo": Entry("f_dpo", "world/f_dpo.yaml", scale="objective.beta", scales=_BETAS),
    "dso_dro": Entry("dso_dro", "world/dso_dro.yaml", scale="objective.margin", scales=(0.003, 0.03)),
    "listwise_dpo": Entry(
        "listwise_dpo", "world/listwise_dpo.yaml", scale="objective.beta", scales=_BETAS, rates=_NEWER
    ),
    "inversion_dpo": Entry("inversion_dpo", "world/inversion_dpo.yaml", rates=_DEAR, finalists=1),
    "diffusion_nft": Entry("diffusion_nft", "world/diffusion_nft.yaml", rates=_DEAR, finalists=1),
}
_BY_SOURCE = (  # known by where their pairs come from
    Entry("spin", "world/spin.yaml"),
    Entry("raft", "world/raft.yaml", rates=_DEAR, finalists=1),
    Entry("lpo", "world/lpo.yaml", own_judge=True),
    Entry("online_dpo", "world/online_dpo.yaml", rates=_DEAR, finalists=1),
    Entry("advantage", "world/advantage.yaml", rates=_DEAR, finalists=1),
)
_CONTROLS = (
    Entry(
        "shuffled",
        "world/dpo.yaml",
        control="Diffusion-DPO on random labels: nothing to learn",
        shuffled=True,
        settings_of="dpo",
    ),
    Entry(
        "flipped",
        "world/dpo.yaml",
        ("data.invert_preference=true",),
        control="Diffusion-DPO with its sign turned: must be worse than the base",
        settings_of="dpo",
    ),
)


def entries(only: tuple[str, ...] | None = None) -> list[Entry]:
    """All entries, or those named. Raises ValueError for a name that is none."""
    every = [*(_entry(name) for name in OBJECTIVES), *_BY_SOURCE, *_CONTROLS]
    if only is None:
        return every
    known = {entry.name: entry for entry in every}
    if unknown := [name for name in only if name not in known]:
        raise DiffalignError(f"no entry is called {', '.join(unknown)}; there are: {', '.join(known)}")
    return [known[name] for name in only]


def compares_lists(entry: Entry) -> bool:
    """Whether the objective of an entry compares ranked lists, and it is trained on those."""
    config = load_config(packaged_config(entry.config), entry.changes)
    return isinstance(config, Config) and config.objective.compares == "lists"


def config_of(
    entry: Entry, protocol: Protocol, preference: str, seed: int, pairs: Path, tuned: dict[str, Any]
) -> dict[str, Any]:
    """The resolved config of one training run, without its output and cache folders.

    pairs: a parquet file of the preference's pairs, or of its lists for an objective of lists; online entries take its
        prompts, and the preference's scorer.
    tuned: settings by key that replace the config's, as the sweep chose them.
    """
    changes = [
        *entry.changes,
        f"seed={seed}",
        f"model.pretrained_model_name_or_path={BASE}",
        f"data.path={pairs}",
        f"training.max_train_steps={protocol.steps}",
        f"training.train_batch_size={BATCH}",
        "training.lr_scheduler=constant_with_warmup",
        f"training.lr_warmup_steps={WARMUP}",
        "training.learning_rate=1.0e-5",
        "training.checkpointing_steps=null",
        "training.checkpoints_total_limit=null",
        "training.logging_steps=1",
        "training.report_to=none",
        "training.mixed_precision=no",  # the same run on any machine
    ]
    config = load_config(packaged_config(entry.config), changes)
    if not isinstance(config, Config):
        raise ConfigError(f"{entry.config} trains no policy, and cannot take part in the arena")
    own = ["model.gradient_checkpointing=none"]
    own += [f"source.scorer={preference}"] if hasattr(config.source, "scorer") and not entry.own_judge else []
    own += [f"training.train_batch_size={2 * BATCH // LIST_IMAGES}"] if compares_lists(entry) else []
    own += [f"{key}={value}" for key, value in tuned.items()]
    plain = load_config(packaged_config(entry.config), changes, own).resolved()
    plain["data"]["cache_dir"] = None
    plain["model"]["pretrained_model_name_or_path"] = BASE  # as written: the same on any machine
    return {key: value for key, value in plain.items() if key not in ("output_dir", "overwrite_output_dir")}


def at_equal_forwards(config: dict[str, Any], limit: int) -> dict[str, Any]:
    """The same run, as long as it takes for so many images through the UNet; what a step needs is made in the step."""
    training = {**config["training"], "max_unet_forwards": limit, "max_train_steps": limit}
    return {**config, "training": training, "data": {**config["data"], "cache_trajectories": False}}


def tuned_settings() -> dict[str, dict[str, Any]]:
    """By entry: the settings that the committed sweep chose. Raises FileNotFoundError where it is not installed."""
    file = Path(packaged_asset(TUNED))
    if not file.is_file():
        raise MissingFileError(f"{TUNED} is not there; `diffalign arena --sweep` writes it (about an hour)")
    return {name: found["chosen"] for name, found in json.loads(file.read_text())["entries"].items()}


def _entry(objective: str) -> Entry:
    """An objective's entry; without a config of its own it is trained as Diffusion-DPO is, with its defaults."""
    if objective in _SPECIAL:
        return _SPECIAL[objective]
    try:
        packaged_config(f"world/{objective}.yaml")
    except ConfigError:
        return Entry(objective, "world/dpo.yaml", (f"objective.name={objective}",))
    return Entry(objective, f"world/{objective}.yaml")
