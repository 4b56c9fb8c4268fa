"""The emoji world: 64x64 images of real art in three styles, with a true reward that is read from their pixels.

Nothing heavy is imported here. The parts: `captions`, `art`, `render`, `vae`, `base_model`, `judge`, `reward`,
`scorer`, `pairs`. docs/emoji.md says what the world is good for.
"""

from __future__ import annotations

from pathlib import Path

from diffalign.world import committed

__all__ = ["asset", "base_path", "pairs_path"]


def base_path() -> Path:
    """Folder of the committed base model, in diffusers' SDXL layout."""
    return asset("base")


def pairs_path() -> Path:
    """The committed preference pairs of the base's own samples (Pick-a-Pic's columns, parquet)."""
    return asset("pairs/samples.parquet")


def asset(name: str) -> Path:
    """Path of a committed file or folder of this world. Raises MissingFileError when it is not there."""
    remedy = "write it again: assets/README.md has the command of each file"
    return committed(f"emoji/{name}", f"the emoji world's {name!r}", remedy)
