"""The folder of an arena: its pairs, and the base's images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import cast

from diffalign.arena.entries import LIST_IMAGES, Entry, Protocol, compares_lists
from diffalign.arena.jobs import Job
from diffalign.world.captions import prompts
from diffalign.world.lists import ListRecipe, write_lists
from diffalign.world.pairs import PairRecipe, Reward, write_pairs

PAIRS, PAIRS_SEED = 1024, 0  # the packaged pairs' number and seed: the same images under every preference


@dataclass(frozen=True)
class ArenaFolder:
    """A folder, and how many runs work in it at a time."""

    folder: Path
    workers: int

    def pairs(self, preference: str, shuffled: bool = False) -> Path:
        """The pairs as the preference labels them, written once; see `data` for lists."""
        file = self.folder / "pairs" / f"{preference}{'-shuffled' if shuffled else ''}.parquet"
        if not file.is_file():
            partial = file.with_suffix(".partial")
            recipe = PairRecipe(PAIRS, PAIRS_SEED, reward=cast("Reward", preference), shuffle_labels=shuffled)
            write_pairs(partial, recipe, overwrite=True)
            partial.replace(file)
        return file

    def data(self, entry: Entry, preference: str) -> Path:
        """What an entry is trained on: the pairs, or as many images in lists where its objective compares lists."""
        if not compares_lists(entry):
            return self.pairs(preference, entry.shuffled)
        file = self.folder / "pairs" / f"{preference}-lists.parquet"
        if not file.is_file():
            partial = file.with_suffix(".partial")
            lists = 2 * PAIRS // LIST_IMAGES
            recipe = ListRecipe(lists, PAIRS_SEED, LIST_IMAGES, cast("Reward", preference))
            write_lists(partial, recipe, overwrite=True)
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
