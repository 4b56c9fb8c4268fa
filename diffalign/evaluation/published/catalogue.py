"""The list of released weights and published figures, `published.json`, as records.

Figures are copied from their sources with the protocol that each source states; protocols never mix. A row of a table
belongs to the release of the same name and base.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

FILE = Path(__file__).with_name("published.json")
# A column of a table -> the scorer that measures it, and what its score is multiplied by to be in the table's unit.
# Columns that name no version (HPSv2, CLIP), and those of another detector (GenEval), are not compared.
MEASURED_BY = {
    "PickScore": ("pickscore", 1),
    "HPSv2.1": ("hpsv2.1", 100),
    "HPSv2.1 (by its size)": ("hpsv2.1", 100),
    "ImageReward": ("imagereward", 1),
    "Aesthetic": ("aesthetic", 1),
}


@dataclass(frozen=True)
class PublishedBase:
    """A base that checkpoints were released for."""

    title: str
    model: str  # Hub id
    cross_attention_dim: int  # of its UNet; tells the bases apart in a repository for several


@dataclass(frozen=True)
class Release:
    """Weights that somebody released."""

    name: str  # of the method, as in the tables
    base: str  # a key of `Catalogue.bases`
    repository: str  # Hub id
    layout: str  # unet, lora, or pickle (which is not loaded)
    path: str  # of the UNet folder or LoRA file in the repository; * stands for any characters
    paper: str
    note: str = ""


@dataclass(frozen=True)
class PublishedTable:
    """Figures of one source under one protocol."""

    id: str
    title: str
    source: str
    weights: str  # whose weights were measured
    prompts: str
    sampling: str
    metrics: list[str]  # the columns
    figures: dict[str, dict[str, list[float]]]  # by base and method; the method "base" is the base itself

    @property
    def protocol(self) -> str:
        """How the figures were made, in one phrase."""
        return f"{self.prompts}; sampling {self.sampling}; weights {self.weights}"


@dataclass(frozen=True)
class Band:
    """Where a released method's gain, and its base's mean, are expected by one metric: a check of a pipeline."""

    metric: str
    method: str
    gain: dict[str, list[float]]  # by base: lowest and highest
    base: dict[str, list[float]]


@dataclass(frozen=True)
class Catalogue:
    """All of it."""

    bases: dict[str, PublishedBase]
    weights: list[Release]
    tables: list[PublishedTable]
    band: Band
    remarks: list[Mapping[str, str]]  # source and text: win rates and users' votes

    def unreadable(self, base: str) -> list[Release]:
        """Those of a base's releases that are not loaded."""
        return [each for each in self.releases(base).values() if each.layout == "pickle"]

    def releases(self, base: str) -> dict[str, Release]:
        """The weights released for a base, by name."""
        return {each.name: each for each in self.weights if each.base == base}


@cache
def catalogue() -> Catalogue:
    """The packaged list."""
    found = json.loads(FILE.read_text(encoding="utf-8"))
    return Catalogue(
        bases={name: PublishedBase(**base) for name, base in found["bases"].items()},
        weights=[Release(**each) for each in found["weights"]],
        tables=[PublishedTable(**each) for each in found["tables"]],
        band=Band(**found["band"]),
        remarks=found["remarks"],
    )
