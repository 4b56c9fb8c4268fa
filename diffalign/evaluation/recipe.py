"""What an image depends on besides its prompt and seed: the model, the tuned weights, and how it is sampled."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from diffalign.errors import DiffalignError, MissingFileError
from diffalign.evaluation.sampling import Sampling

PATHS = ("model", "tuned", "negative_tuned", "vae")  # where the weights are; their fingerprints identify them
WEIGHTS = (".safetensors", ".bin", ".json", ".txt")
BIG = 1 << 30  # bytes; larger files count by size and time of change, because reading them takes seconds


@dataclass(frozen=True)
class Tuned:
    """Tuned weights and how they are used. `Tuned()` is the base itself.

    path: a full UNet folder, a LoRA file or the output folder of a run, to be put on the base; None: the base alone.
    negative: the same for the unconditional branch of guidance, which otherwise has the weights of the other branch
        (Diffusion-NPO, arXiv 2505.11245); needs a guidance_scale above 1.
    user: the embedding of the user for whom images are generated, with weights that were tuned for users only.
    strength: the weights of `path` are base + strength · (tuned − base), for a LoRA the factor of its update.

    Raises DiffalignError for a strength without a path, or one that is not finite.
    """

    path: str | Path | None = None
    negative: str | Path | None = None
    user: Sequence[float] | None = None
    strength: float = 1.0

    def __post_init__(self) -> None:
        if not math.isfinite(self.strength):
            raise DiffalignError(f"the strength is {self.strength}; give a finite number (1: as tuned)")
        if self.strength != 1 and self.path is None:
            raise DiffalignError(f"a strength of {self.strength:g} was given without tuned weights; name the weights")


@dataclass(frozen=True)
class ImageRecipe:
    """A model, tuned weights on it, and how images are sampled.

    Raises DiffalignError for negative weights without guidance, ModelError for a path without tuned weights.
    """

    model: str
    tuned: Tuned
    sampling: Sampling

    def __post_init__(self) -> None:
        if self.tuned.negative is not None and self.sampling.guidance_scale <= 1:
            raise DiffalignError(
                f"the negative weights {self.tuned.negative} compute the unconditional branch, and guidance_scale "
                f"{self.sampling.guidance_scale} has none; give one above 1"
            )
        if self.tuned.negative is not None and self.sampling.merge_lora:
            raise DiffalignError(
                "merge_lora is not supported beside negative weights, whose branch has a base of its own"
            )
        _ = self.settings  # a path without weights is an error now

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The recipe as it is written to a manifest; the weights count by their fingerprint."""
        weights = {
            "model": self.model,
            "vae": self.sampling.vae,
            "tuned": _weights_at(self.tuned.path),
            "negative_tuned": _weights_at(self.tuned.negative),
        }
        return {
            **weights,
            "fingerprint": {name: weights_fingerprint(path) for name, path in weights.items() if path},
            "merge_lora": _merged(self.sampling.merge_lora),
            **self.sampling.recorded(),
            "user": None if self.tuned.user is None else _user_hash(self.tuned.user),
            "strength": None if self.tuned.strength == 1 else self.tuned.strength,
        }

    @property
    def tag(self) -> str:
        """8 hex digits of the settings; paths do not count, the weights found there do."""
        return tag_of(self.settings)


def tag_of(settings: Mapping[str, Any]) -> str:
    """The `tag` of a recipe with these settings, as a result or a manifest has them."""
    given = {
        k: v
        for k, v in settings.items()
        if v is not None or k not in ("user", "strength", "text", "scheduler_config", "merge_lora")
    }
    known = {k: v for k, v in given.items() if k not in PATHS}
    return hashlib.blake2b(json.dumps(known, sort_keys=True).encode(), digest_size=4).hexdigest()


def as_tuned(tuned: str | Path | Tuned | None) -> Tuned:
    """Weights that are named by their path alone, or by a record."""
    return tuned if isinstance(tuned, Tuned) else Tuned(tuned)


def _merged(loras: Mapping[str, float] | None) -> dict[str, float] | None:
    """The weight of each LoRA by its fingerprint."""
    return {weights_fingerprint(str(_weights_at(path))): weight for path, weight in loras.items()} if loras else None


def _weights_at(path: str | Path | None) -> str | None:
    if path is None:
        return None
    from diffalign.models.adapters.save_load import find_tuned

    return str(find_tuned(path).path)


def _user_hash(user: Sequence[float]) -> str:
    """16 hex digits of an embedding as float32; the embedding itself may be long."""
    return hashlib.blake2b(torch.as_tensor(user, dtype=torch.float32).numpy().tobytes(), digest_size=8).hexdigest()


def weights_fingerprint(model: str | Path) -> str:
    """16 hex digits that change when the weights do, so that images of other weights are never used again.

    `model` is a pipeline folder, a folder of one network, a single file, or a Hub id (which counts by its name:
    nothing is downloaded to find out). Raises MissingFileError for a folder without weights.
    """
    path = Path(model)
    digest = hashlib.blake2b(digest_size=8)
    if not path.exists():
        digest.update(str(model).encode())
        return digest.hexdigest()
    for file in model_files(path):
        name = file.name if path.is_file() else file.relative_to(path).as_posix()
        status = file.stat()
        digest.update(f"{name} {status.st_size}\n".encode())
        if status.st_size > BIG:
            digest.update(str(status.st_mtime_ns).encode())
        else:
            digest.update(file.read_bytes())
    return digest.hexdigest()


def model_files(path: Path) -> list[Path]:
    """The files of the model at `path`, sorted: of a pipeline those of its components, one level down."""
    if path.is_file():
        beside = path.with_name("adapter_config.json")  # a peft file's alpha
        return [path, beside] if path.name == "adapter_model.safetensors" and beside.is_file() else [path]
    files = list(path.iterdir())
    if (path / "model_index.json").is_file():
        files = [path / "model_index.json", *path.glob("*/*")]
    files = sorted(file for file in files if file.is_file() and file.suffix in WEIGHTS)
    if not files:
        raise MissingFileError(
            f"{path} contains no weights ({', '.join(WEIGHTS)}) and no model_index.json; check the path"
        )
    return files
