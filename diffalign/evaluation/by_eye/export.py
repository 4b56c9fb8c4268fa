"""Pairs from votes, in layouts that `data.path` reads: a parquet file with Pick-a-Pic's columns, or a folder.

Which image stands first in the file is drawn by the plan's seed, so nothing but the label tells the preferred one. The
images are those of the source, byte for byte.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from diffalign.data.formats.pickapic import write_pickapic
from diffalign.data.row import ImageRef
from diffalign.data.table.pairs import PairTable
from diffalign.errors import DiffalignError, ExistingFileError
from diffalign.evaluation.by_eye.plan import ImagePair, Material, digest
from diffalign.evaluation.by_eye.votes import MAJORITY, Event
from diffalign.io.files import hash_file, list_files, written_whole

Label = Literal["first", "second", "tie"]
WRITTEN = "written.json"
_ENDINGS = {b"\x89PNG": ".png", b"\xff\xd8\xff": ".jpg", b"RIFF": ".webp", b"GIF8": ".gif", b"BM": ".bmp"}


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
    scored = old is not None and old.layout.scores is not None
    if out.suffix == ".parquet":
        write_pickapic(
            out, (_row(each, material, label, old if scored else None, before) for each in chosen), scored=scored
        )
    else:
        _write_folder(out, [each for each in chosen if label[each.id] != "tie"], material, label)
    return Written(len(chosen) - ties, ties, unjudged, len(chosen) - len(found), out.suffix != ".parquet")


def check_pairs_out(out: Path, votes: Path) -> None:
    """Raises DiffalignError unless pairs can be written to a file or folder of this name, before anybody judges.

    Raises ExistingFileError for a folder that is not empty, unless these votes wrote it.
    """
    if out.suffix not in (".parquet", ""):
        raise DiffalignError(f"{out}: pairs are written to a .parquet file, or to a folder, whose name has no ending")
    if not out.suffix and out.exists() and not is_ours(out, votes) and (out.is_file() or any(out.iterdir())):
        raise ExistingFileError(f"{out} is not an empty folder; pairs are not mixed with what is there. Name a new one")


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
    """A hash of a file, or of each file of a folder by its name."""
    return hash_file(out) if out.is_file() else {name: facts["sha256"] for name, facts in list_files(out).items()}


def _row(
    each: ImagePair, material: Material, label: Mapping[str, Label], old: PairTable | None, places: Mapping[str, int]
) -> dict[str, object]:
    """The columns of one pair."""
    swapped = digest("export", material.plan.seed, each.id)[0] & 1
    data = [ref.read() for ref in material.images(each.id)]
    first = {"first": 1.0, "second": 0.0, "tie": 0.5}[label[each.id]]
    columns: dict[str, list[object]] = {
        "jpg": [*data],
        "label": [first, 1.0 - first],
        "uid": [hashlib.blake2b(each, digest_size=16).hexdigest() for each in data],
    }
    if old is not None:
        columns["score"] = [*(old.scores(places[each.id]) or (float("nan"), float("nan")))]
    names = {"jpg": "jpg_{}", "label": "label_{}", "uid": "image_{}_uid", "score": "score_{}"}
    row: dict[str, object] = {"caption": each.prompt, "has_label": True, "are_different": True}
    for part, sides in columns.items():
        row |= {names[part].format(place): side for place, side in enumerate(sides[::-1] if swapped else sides)}
    return row


def _write_folder(out: Path, pairs: list[ImagePair], material: Material, label: Mapping[str, Label]) -> None:
    width = len(str(len(pairs)))
    with written_whole(out, what="the pairs") as partial:
        for side in ("chosen", "rejected"):
            (partial / side).mkdir(parents=True)
        captions = {f"{number:0{width}}": each.prompt for number, each in enumerate(pairs)}
        text = json.dumps(captions, ensure_ascii=False, indent=1)
        (partial / "captions.json").write_text(text + "\n", encoding="utf-8")
        for number, each in enumerate(pairs):
            images, name = material.images(each.id), f"{number:0{width}}"
            for side, ref in zip(("chosen", "rejected"), images if label[each.id] == "first" else images[::-1]):
                data = ref.read()
                (partial / side / f"{name}{_ending(data, ref)}").write_bytes(data)


def _ending(data: bytes, ref: ImageRef) -> str:
    """The file ending of encoded bytes, as they begin; that of the source's file for formats that begin otherwise."""
    known = next((ending for start, ending in _ENDINGS.items() if data.startswith(start)), None)
    ending = known or Path(ref.path or "").suffix
    if not ending:
        raise DiffalignError(f"{ref.where}: the image's format is not known; write the pairs to a .parquet file")
    return ending
