"""Pairs from votes, in the layouts of `data/write_pairs.py`.

Which image stands first in the file is drawn by the plan's seed, so nothing but the label tells the preferred one. The
images are those of the source, byte for byte.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from diffalign.data.table.pairs import PairTable
from diffalign.data.write_pairs import Label, LabelledPair, check_pairs_out, images_of, write_pairs
from diffalign.errors import DiffalignError
from diffalign.evaluation.by_eye.plan import ImagePair, Material, digest
from diffalign.evaluation.by_eye.votes import MAJORITY, Event
from diffalign.io.files import hash_file, list_files

WRITTEN = "written.json"
SCORES = ("score_0", "score_1")
_OTHER: dict[Label, Label] = {"first": "second", "second": "first", "tie": "tie"}


@dataclass(frozen=True)
class Written:
    """What became of the comparisons."""

    pairs: int
    ties: int  # written with labels .5 and .5 (parquet), or left out (folder)
    unjudged: int  # comparisons without a vote, or skipped
    kept: int  # pairs written with their old label
    in_folder: bool  # which has no place for ties

    def __str__(self) -> str:
        ties = "left out (a folder has no place for them)" if self.in_folder else "written with the labels .5 and .5"
        kept = f"; {self.kept} with their old label" if self.kept else ""
        return f"{self.pairs} pairs, and {self.ties} ties {ties}; {self.unjudged} not judged{kept}"


def labels(votes: Mapping[str, Mapping[str, Event]], of: str = MAJORITY) -> dict[str, Label]:
    """The label of each pair that somebody judged: by one annotator, or the side with more votes than the other.

    votes: by annotator and pair. Raises DiffalignError for an annotator that there is not.
    """
    if of != MAJORITY and of not in votes:
        raise DiffalignError(f"annotator {of!r:.60} has no votes; there are those of {', '.join(votes) or 'nobody'}")
    chosen = votes if of == MAJORITY else {of: votes[of]}
    ahead: dict[str, int] = {}  # votes for the first side less those for the second
    for some in chosen.values():
        for pair, event in some.items():
            if event.vote != "skip":
                ahead[pair] = ahead.get(pair, 0) + {"first": 1, "second": -1, "tie": 0}[event.vote]
    return {pair: "first" if n > 0 else "second" if n < 0 else "tie" for pair, n in ahead.items()}


def write_labelled(
    out: Path, material: Material, found: Mapping[str, Label], old: PairTable | None = None, *, keep: bool = False
) -> Written:
    """Writes the labelled pairs to `out`, complete or not at all.

    old: the table that the comparisons come from, whose scores are written again. keep: pairs without a label have
    their old one. Raises DiffalignError where no pair is left, and ImageError for an image that cannot be read.
    """
    label: dict[str, Label] = dict(found)
    before = {id: place for place, id in enumerate(old.ids)} if old is not None else {}
    every = material.plan.comparisons
    unjudged = sum(each.id not in label for each in every)
    if keep and old is not None:
        every = [ImagePair(id, prompt, ("chosen", "rejected")) for id, prompt in zip(old.ids, old.prompts, strict=True)]
        label = {id: "tie" if old.tie(place) else "first" for id, place in before.items()} | label
    chosen = [each for each in every if each.id in label]
    ties = sum(label[each.id] == "tie" for each in chosen)
    if len(chosen) == ties:
        raise DiffalignError(f"{out}: no pair has a preferred image ({len(chosen)} ties); judge some pairs first")
    scored = old if old is not None and old.layout.scores is not None and out.suffix else None
    pairs = (_labelled(each, material, label[each.id], scored, before) for each in chosen)
    write_pairs(out, pairs, () if scored is None else SCORES)
    return Written(len(chosen) - ties, ties, unjudged, len(chosen) - len(found), not out.suffix)


def check_labelled_out(out: Path, votes: Path) -> None:
    """Raises DiffalignError unless pairs can be written to a file or folder of this name, before anybody judges.

    Raises ExistingFileError for a folder that is not empty, unless these votes wrote it.
    """
    check_pairs_out(out, replace=is_ours(out, votes))


def remember(out: Path, votes: Path) -> None:
    """Notes in the folder of votes what was written, so that the next session may replace it."""
    (votes / WRITTEN).write_text(json.dumps({"path": str(out.resolve()), "content": _content(out)}) + "\n")


def is_ours(out: Path, votes: Path) -> bool:
    """Whether `out` is what these votes wrote last, and nobody has changed it since."""
    try:
        noted = json.loads((votes / WRITTEN).read_text())
    except (OSError, ValueError):
        return False
    return out.exists() and noted == {"path": str(out.resolve()), "content": _content(out)}


def _content(out: Path) -> object:
    """A hash of a file, or of each file of a folder by its name; of a listing with its images."""
    if out.suffix == ".jsonl":
        return [hash_file(out), _content(images_of(out))]
    return hash_file(out) if out.is_file() else {name: facts["sha256"] for name, facts in list_files(out).items()}


def _labelled(
    each: ImagePair, material: Material, label: Label, old: PairTable | None, places: Mapping[str, int]
) -> LabelledPair:
    """A pair as it is written, its sides in an order that the seed draws. old: with scores, which stay with them."""
    scores = () if old is None else old.scores(places[each.id]) or (float("nan"), float("nan"))
    images = material.images(each.id)
    if digest("export", material.plan.seed, each.id)[0] & 1:
        images, label, scores = images[::-1], _OTHER[label], scores[::-1]
    return LabelledPair(each.prompt, images, label, more=dict(zip(SCORES, scores)))
