"""Decisions about the labels of pairs, and the pairs with these decisions applied.

    id,decision,prompt,chosen_image
    1c5f…,swap,a red fox,0

A file of decisions has the columns `id` and `decision` (keep, swap or drop). With `prompt` and `chosen_image` (which of
the stored images was the chosen one, 0 or 1) it is checked that these are the pairs that were decided about, and that a
swap is not applied twice. Other columns are not read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from diffalign.data.row import DataError
from diffalign.data.table.open import open_columns
from diffalign.data.table.pairs import PairTable
from diffalign.data.write_pairs import Label, LabelledPair

Choice = Literal["keep", "swap", "drop"]
CHOICES: tuple[Choice, ...] = get_args(Choice)
OF_LABEL = ("margin", "mask")  # terms that state by how much, or where, the chosen image is the better one


@dataclass(frozen=True)
class Decision:
    """What is done with the label of one pair."""

    id: str
    choice: Choice
    where: str  # row of the file, for messages
    prompt: str | None = None  # of the pair; None: not stated
    chosen_image: int | None = None  # which of the stored images was the chosen one; None: not stated


def read_decisions(file: Path) -> dict[str, Decision]:
    """The decisions in a csv or jsonl file, by id of the pair.

    Raises DataError naming the row of a decision that is none, of an id that is there twice and of a line that cannot
    be read, and for a file without the columns.
    """
    rows = open_columns(file)
    if lost := [name for name in ("id", "decision") if name not in rows.names]:
        raise DataError(
            f"{file} has the columns {', '.join(rows.names)} and no {' and no '.join(lost)}; decisions are saved "
            "by the page of `diffalign data doubtful --page`"
        )
    columns = {name: rows.column(name) for name in ("id", "decision", "prompt", "chosen_image") if name in rows.names}
    found: dict[str, Decision] = {}
    for row in range(len(rows)):
        where = rows.where(row)
        if (fault := rows.fault(row)) is not None:
            raise DataError(f"{where}: {fault}")
        each = _decision({name: values[row] for name, values in columns.items()}, where)
        if (other := found.setdefault(each.id, each)) is not each:
            raise DataError(f"{where}: the pair {each.id!r:.80} is decided about in {other.where} already; remove one")
    return found


def _decision(cells: Mapping[str, Any], where: str) -> Decision:
    id, choice, place = (cells.get(name) for name in ("id", "decision", "chosen_image"))
    if id is None or str(id) == "":
        raise DataError(f"{where}: there is no id of a pair; each decision needs one")
    if choice not in CHOICES:
        raise DataError(f"{where}: decision = {choice!r:.60}; it is one of {', '.join(CHOICES)}")
    if place not in (None, "", 0, 1, "0", "1"):
        raise DataError(f"{where}: chosen_image = {place!r:.60}; it is 0 or 1, or empty")
    prompt = cells.get("prompt")
    return Decision(str(id), choice, where, prompt, None if place in (None, "") else int(place))


def check_decisions(decisions: Mapping[str, Decision], table: PairTable, pairs: str) -> None:
    """Raises DataError for decisions that are not about the pairs of `table`, or cannot be applied to them.

    That is: an id that the table does not have, another prompt, another chosen image, and a swap of a pair with a
    margin or a mask. pairs: the table's path, for messages.
    """
    places = {id: place for place, id in enumerate(table.ids)}
    unknown = [each for id, each in decisions.items() if id not in places]
    if unknown:
        raise DataError(
            f"{unknown[0].where}: {pairs} has no usable pair {unknown[0].id!r:.80} ({len(unknown)} of "
            f"{len(decisions)} decisions are about others); give the pairs that were decided about"
        )
    for id, each in decisions.items():
        place = places[id]
        if each.prompt is not None and each.prompt != table.prompts[place]:
            raise DataError(
                f"{each.where}: the prompt is {each.prompt!r:.60}, and {table.where(place)} of {pairs} has "
                f"{table.prompts[place]!r:.60}; give the pairs that were decided about"
            )
        if each.chosen_image not in (None, table.index.first[place]):
            raise DataError(
                f"{each.where}: image {each.chosen_image} of the pair was the chosen one, and in {pairs} "
                f"({table.where(place)}) image {table.index.first[place]} is: the decisions were applied already, or "
                "the run read the pairs with invert_preference or relabel"
            )
    if (swap := next((each for each in decisions.values() if each.choice == "swap"), None)) is not None:
        check_swaps(table, pairs, swap.where)


def check_swaps(table: PairTable, pairs: str, where: str) -> None:
    """Raises DataError for pairs with margins or masks, whose labels cannot be swapped. where: what would swap them."""
    if lost := [name for name in OF_LABEL if name in table.terms]:
        raise DataError(
            f"{where} swaps labels, and {pairs} has the column {' and '.join(lost)}, which belongs to the old ones; "
            f"give PAIRS, and leave it out with --without {' '.join(lost)}"
        )


def columns_of(table: PairTable) -> tuple[str, ...]:
    """The columns that relabelled pairs of a table have besides images and label; see `write_pairs`."""
    layout = table.layout
    scores = ("score_0", "score_1") if layout.scores is not None else ()
    users = [name for name in ("user", "user_embed") if getattr(layout, name) is not None]
    return (*scores, *table.terms, *users)


def relabelled(table: PairTable, decisions: Mapping[str, Decision]) -> Iterator[LabelledPair]:
    """The pairs of a table with checked decisions applied, in their order. Pairs without a decision stay as they are.

    Images stay in their stored order with their uids and scores: a swap changes the label alone.
    """
    layout = table.layout
    uids = [table.column(name) for name in layout.uids] if len(layout.uids) == 2 else []
    users = {name: table.column(column) for name in ("user", "user_embed") if (column := getattr(layout, name))}
    for place, id in enumerate(table.ids):
        choice = decisions[id].choice if id in decisions else "keep"
        if choice == "drop":
            continue
        more: dict[str, Any] = {**table.numbers(place)}
        if layout.scores is not None and table.index.scores is not None:
            more |= dict(zip(("score_0", "score_1"), table.index.scores[place], strict=True))
        if (mask := table.mask(place)) is not None:
            more["mask"] = mask.tolist()
        more |= {name: values[place] for name, values in users.items()}
        if more.get("user") is not None:
            more["user"] = str(more["user"])  # ids may be numbers, and are compared as text
        own = tuple(str(values[place]) for values in uids)
        one, two = table.stored(place)
        yield LabelledPair(
            table.prompts[place],
            (one, two),
            _label(table, place, choice),
            uids=(own[0], own[1]) if own and all(own) and "None" not in own else None,
            more=more,
        )


def _label(table: PairTable, place: int, choice: Choice) -> Label:
    if table.tie(place):
        return "tie"
    return "second" if table.index.first[place] ^ (choice == "swap") else "first"


def counts(table: PairTable, decisions: Mapping[str, Decision]) -> str:
    """What the decisions do, in words."""
    of = Counter(each.choice for each in decisions.values())
    said = (
        f"{len(table) - of['drop']} pairs: {of['swap']} with the label swapped, {len(table) - of['swap'] - of['drop']} "
    )
    said += f"as they were; {of['drop']} dropped"
    kinds = Counter(problem.kind for problem in table.problems if problem.dropped)
    if kinds:
        rows = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
        said += f"; rows that are no usable pairs are left out ({rows})"
    if lost := lost_columns(table):
        said += f"; without the columns {', '.join(lost)}"
    return said


def lost_columns(table: PairTable) -> list[str]:
    """The columns of a table that pairs are written without; a uid of the whole pair, not of its images, is one."""
    layout = table.layout
    uids = layout.uids if len(layout.uids) == 2 else ()
    parts = (layout.prompt, *layout.images, *layout.labels, layout.has_label, *uids, *(layout.scores or ()))
    known = {*parts, *layout.terms.values(), layout.user, layout.user_embed, "are_different"}
    return [name for name in table.columns.names if name not in known]
