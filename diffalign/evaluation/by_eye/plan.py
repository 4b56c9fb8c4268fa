"""What is compared by eye, and in which order: fixed by the images and a seed, and written beside the votes.

The order of each annotator, and which image stands on the left, are hashes of (seed, annotator, id of the pair). They
do not depend on how many pairs there are, or on when the server was started.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from diffalign.data.row import ImageRef
from diffalign.errors import DiffalignError, ExistingFileError, MissingFileError
from diffalign.io.files import written_whole

PLAN = "plan.json"
VERSION = 1
Kind = Literal["label", "relabel", "blind"]


@dataclass(frozen=True)
class ImagePair:
    """Two images of one prompt, a first and a second. `names` say whose they are; the page does not show them."""

    id: str
    prompt: str
    names: tuple[str, str]


@dataclass(frozen=True)
class VotePlan:
    """The comparisons of one folder of votes.

    `identical`: those whose images are equal to the byte. Nobody is asked; `blind` counts them as ties.
    """

    kind: Kind
    seed: int
    comparisons: Sequence[ImagePair]
    identical: Sequence[ImagePair] = ()

    def record(self) -> dict[str, Any]:
        """The plan as JSON has it."""

        def rows(some: Sequence[ImagePair]) -> list[dict[str, Any]]:
            return [{"id": each.id, "prompt": each.prompt, "names": list(each.names)} for each in some]

        return {
            "version": VERSION,
            "kind": self.kind,
            "seed": self.seed,
            "comparisons": rows(self.comparisons),
            "identical": rows(self.identical),
        }


@dataclass(frozen=True)
class Material:
    """A plan with its images, which are opened when they are shown."""

    plan: VotePlan
    images: Callable[[str], tuple[ImageRef, ImageRef]]  # the first and second image of a comparison, by its id
    notes: Sequence[str] = ()  # what is in no comparison, and why


@dataclass(frozen=True)
class Shown:
    """A comparison at its place in an annotator's order."""

    comparison: ImagePair
    left: int  # which of its images stands on the left


def digest(*parts: str | int) -> bytes:
    """A hash of texts and numbers, each of them apart from the next."""
    return hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=16).digest()


def order_of(plan: VotePlan, annotator: str) -> list[Shown]:
    """The comparisons in the order in which an annotator sees them."""
    keys = [digest("order", plan.seed, annotator, each.id) for each in plan.comparisons]
    found = sorted(zip(keys, plan.comparisons), key=lambda pair: pair[0])
    return [Shown(each, digest("side", plan.seed, annotator, each.id)[0] & 1) for _, each in found]


def store_plan(folder: Path, plan: VotePlan) -> None:
    """Writes the plan to a folder of votes, or checks that the one that is there is the same.

    Raises DiffalignError for another plan: votes on other images, or in another order, would be mixed; and
    ExistingFileError for a folder that has other files.
    """
    record = plan.record()
    if (folder / PLAN).is_file():
        there = _record(folder)
        for field, value in record.items():
            if there.get(field) != value:
                raise DiffalignError(_other(folder, field, there.get(field), value))
        return
    if (
        odd := sorted(each.name for each in folder.iterdir() if not each.name.startswith("."))
        if folder.is_dir()
        else []
    ):
        raise ExistingFileError(f"{folder} has other files ({odd[0]}), and no votes; name a new folder for the votes")
    with written_whole(folder / PLAN) as partial:
        partial.write_text(json.dumps(record, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def read_plan(folder: Path) -> VotePlan:
    """The plan of a folder of votes. Raises MissingFileError without one, and DiffalignError."""
    record = _record(folder)

    def some(field: str) -> list[ImagePair]:
        return [ImagePair(row["id"], row["prompt"], (row["names"][0], row["names"][1])) for row in record[field]]

    try:
        return VotePlan(record["kind"], record["seed"], some("comparisons"), some("identical"))
    except (KeyError, TypeError, IndexError) as error:
        raise DiffalignError(f"{folder / PLAN} is not a plan ({error!r:.80}); restore the file") from None


def _record(folder: Path) -> dict[str, Any]:
    file = folder / PLAN
    if not file.is_file():
        raise MissingFileError(
            f"{file} does not exist; name the folder of votes of `diffalign label --by-eye` or `compare --blind`"
        )
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise DiffalignError(f"{file}: not JSON ({error}); restore the file") from None
    if not isinstance(record, dict) or record.get("version") != VERSION:
        raise DiffalignError(f"{file} is not a plan of this version of diffalign; restore the file")
    return record


def _other(folder: Path, field: str, there: Any, here: Any) -> str:
    """The message for another plan in a folder."""
    if isinstance(here, list):
        known = {row["id"] for row in there if isinstance(row, dict)} if isinstance(there, list) else set()
        ids = {row["id"] for row in here}
        now = f"{len(here)} {field} now and {len(known)} then, {len(ids & known)} of them the same"
    else:
        now = f"{field} is {here!r} now and was {there!r} then"
    return (
        f"{folder} has the votes of another comparison: {now}. Give the same folders, files and options as then, or "
        "another folder for the votes"
    )
