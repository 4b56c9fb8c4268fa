"""Scores of pairs in a file of their own, for data that have none: written by `diffalign data score`.

    {"scorer": "pickscore", "span": [11.54, 28.2]}             the first line; where its scores lie, if known
    {"id": "…", "score_0": 21.3, "score_1": 20.9}              a pair; images in stored order, null where unreadable

Lines are appended as they are made, so that an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

from PIL.Image import Image

from diffalign.data.formats.text_files import lines_of, parse_json, read_text
from diffalign.data.row import DataError, ImageError
from diffalign.data.table.pairs import PairTable
from diffalign.io.files import save_text
from diffalign.io.folder_lock import folder_lock
from diffalign.io.progress import Progress

NAMED = 3  # pairs without scores that a message names
BATCH = 32  # pairs opened at a time

Score = Callable[[Sequence[Image], Sequence[str]], Sequence[float]]
Scores = dict[str, tuple[float, float]]  # of both images in stored order, by id of the pair


def score_pairs(
    table: PairTable, scorer: str, score: Score, out: Path, span: tuple[float, float] | None = None
) -> tuple[int, int]:
    """Scores both images of every pair that `out` does not have yet; returns how many were scored and unreadable.

    score: images and their prompts -> one number each. `span`: where they lie, for checks of ranges.
    Raises DataError when `out` is another scorer's, or when a score is not finite.
    """
    with folder_lock(out.parent, "a process that scores pairs", f".{out.name}.lock"):
        return _score_pairs(table, scorer, score, out, span)


def _score_pairs(
    table: PairTable, scorer: str, score: Score, out: Path, span: tuple[float, float] | None
) -> tuple[int, int]:
    there = read_scores(out, scorer) if out.exists() else {}
    if not there:
        save_text(out, json.dumps({"scorer": scorer} | ({} if span is None else {"span": span})) + "\n")
    todo = [index for index, name in enumerate(table.ids) if name not in there]
    scored = unreadable = 0
    with (
        out.open("a") as file,
        Progress(total=len(table), initial=len(table) - len(todo), desc=scorer, unit=" pairs") as bar,
    ):
        for first in range(0, len(todo), BATCH):
            some = todo[first : first + BATCH]
            opened = {index: both for index in some if (both := _open(table, index)) is not None}
            images = [image for pair in opened.values() for image in pair]
            values = list(score(images, [table.prompts[i] for i in opened for _ in range(2)])) if images else []
            found = {i: (float(values[2 * k]), float(values[2 * k + 1])) for k, i in enumerate(opened)}
            for index in some:
                pair = found.get(index)
                if pair is not None and not all(map(math.isfinite, pair)):
                    raise DataError(f"scorer {scorer} gave {pair} to the images of {table.where(index)}")
                one, two = pair if pair is not None else (None, None)
                file.write(json.dumps({"id": table.ids[index], "score_0": one, "score_1": two}) + "\n")
            file.flush()
            scored, unreadable = scored + len(found), unreadable + len(some) - len(found)
            bar.update(len(some))
    return scored, unreadable


def read_scores(path: str | Path, scorer: str | None = None) -> Scores:
    """The scores in a file; nan where an image could not be read. A half-written last line does not count.

    Raises DataError for a file of another form, or of another scorer than the one asked for.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(
            f"there is no file of scores {path}; make it with `diffalign data score PAIRS --scorer NAME --out {path}`"
        )
    *lines, unfinished = lines_of(read_text(path))
    try:
        made_by = parse_json(lines[0])["scorer"]
        rows = [parse_json(line) for line in lines[1:] if line.strip()]
        found = {row["id"]: (_number(row["score_0"]), _number(row["score_1"])) for row in rows}
    except (IndexError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise DataError(f"{path} is not a file of scores ({error!r}); `diffalign data score` writes one") from error
    if scorer is not None and made_by != scorer:
        raise DataError(f"{path} has scores by {made_by}, and {scorer} was requested; name another file")
    if unfinished:
        save_text(path, "".join(f"{line}\n" for line in lines))
    return found


def span_in(path: str | Path) -> tuple[float, float] | None:
    """The range of the scores in a file, as their scorer stated it; None in older files and where it stated none."""
    with Path(path).open() as file:
        span = json.loads(file.readline()).get("span")
    if span is None:
        return None
    try:
        low, high = map(float, span)
    except (TypeError, ValueError) as error:
        raise DataError(f"{path}: its first line has span = {span!r}; it is two numbers") from error
    if not -math.inf < low < high < math.inf:
        raise DataError(f"{path}: its first line has span = {span!r}; it is two finite numbers, the lower first")
    return low, high


def use_scores(table: PairTable, scores: Scores, *, relabel: bool, where: str) -> None:
    """Gives a table its scores; with `relabel` the image with the higher one is the chosen one from now on.

    Raises DataError naming pairs that have none.
    """
    require_scores(table, scores, where)
    table.take_scores([scores[name] for name in table.ids], relabel=relabel)


def require_scores(table: PairTable, scores: Scores, where: str) -> None:
    """Raise DataError naming pairs that have no line in a file of scores."""
    missing = [name for name in table.ids if name not in scores]
    if missing:
        named = ", ".join(missing[:NAMED])
        raise DataError(
            f"{where} has no scores for {len(missing)} of {len(table)} pairs (first: {named}); run the "
            "same `diffalign data score` again, it continues where it stopped"
        )


def _open(table: PairTable, index: int) -> tuple[Image, Image] | None:
    """Both images of a pair in stored order; None where one does not open."""
    try:
        one, two = table.stored(index)
        return one.open(), two.open()
    except ImageError:
        return None


def _number(value: float | None) -> float:
    """A finite number, or nan."""
    score = math.nan if value is None else float(value)
    return score if math.isfinite(score) else math.nan
