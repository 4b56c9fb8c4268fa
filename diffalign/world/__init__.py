"""The embedded world: captions, renders and an oracle whose reward of any image is known from its pixels.

Nothing heavy is imported here; see `diffalign.world.captions`, `render`, `oracle`, `pairs`, `scorer`, `vae`,
`base_model`, `judge` and `fairness` for the parts, and docs/world.md for what it is good for.
"""

from __future__ import annotations

from pathlib import Path

from diffalign.errors import MissingFileError
from diffalign.world.captions import splits

__all__ = ["base_path", "judge_path", "latent_judge_path", "pairs_path", "splits"]


def base_path() -> Path:
    """Folder of the committed base model, in diffusers' SDXL layout."""
    return _asset("base")


def pairs_path() -> Path:
    """The committed 1,024 preference pairs of renders (Pick-a-Pic columns, parquet)."""
    return _asset("pairs/renders.parquet")


def judge_path() -> Path:
    """Folder of the committed step-aware preference model of the world."""
    return _asset("judge/step_aware")


def latent_judge_path() -> Path:
    """Folder of the committed judge of the world's noisy latents."""
    return _asset("judge/latent")


def _asset(name: str) -> Path:
    remedy = (
        "write it with `python -m diffalign.world.base_model --out ...` (base) "
        "or `python -m diffalign.world.pairs --out ...` (pairs)"
    )
    return committed(f"world/{name}", f"the embedded world's {name!r}", remedy)


def committed(path: str, what: str, remedy: str) -> Path:
    """A file or folder below `assets/`, of a checkout or of an installed wheel.

    Raises MissingFileError, which calls it `what` and says how it is written, `remedy`.
    """
    package = Path(__file__).resolve().parents[1]
    places = (package.parent / "assets" / path, package / "_assets" / path)
    for place in places:
        if place.exists():
            return place
    raise MissingFileError(
        f"{what} is neither at {places[0]} (a checkout) nor at {places[1]} (an installed wheel); reinstall diffalign, "
        f"or {remedy}"
    )
