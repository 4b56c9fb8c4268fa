"""The folder of an arena: its pairs, and the base's images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import cast

from diffalign.arena.entries import Protocol
from diffalign.arena.jobs import Job
from diffalign.world.captions import prompts
from diffalign.world.pairs import PairRecipe, Reward, write_pairs

PAIRS, PAIRS_SEED = 1024, 0  # the packaged pairs' number and seed: the same images under every preference


@dataclass(frozen=True)
class ArenaFolder:
    """A folder, and how many runs work in it at a time."""

    folder: Path
    workers: int

    def pairs(self, preference: str, shuffled: bool = False) -> Path:
        """The pairs as the preference labels them, written once."""
        file = self.folder / "pairs" / f"{preference}{'-shuffled' if shuffled else ''}.parquet"
        if not file.is_file():
            partial = file.with_suffix(".partial")
            recipe = PairRecipe(PAIRS, PAIRS_SEED, reward=cast("Reward", preference), shuffle_labels=shuffled)
            write_pairs(partial, recipe, overwrite=True)
            partial.replace(file)
        return file

    def base(self, protocol: Protocol) -> Job:
        """The base's images for a protocol, which every entry is compared with."""
        return Job(
            self.folder / "base" / f"{protocol.split}-{protocol.pictures}",
            None,
            tuple(prompts(protocol.split)),
            tuple(range(protocol.pictures)),
        )
