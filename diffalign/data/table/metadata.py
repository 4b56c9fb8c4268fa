"""The small columns of stored pairs, read whole: prompts, labels, ids, scores, weights and margins."""

from __future__ import annotations

import math
from typing import Any

from diffalign.data.cells import read_prompt
from diffalign.data.formats.columns import Columns
from diffalign.data.formats.pickapic import Layout, judge
from diffalign.data.formats.text_files import odd
from diffalign.data.row import BAD_ROW, ImageError
from diffalign.data.weights import TERMS, Number


class SmallColumns:
    """What a row says besides its images."""

    def __init__(self, columns: Columns, layout: Layout) -> None:
        def read(name: str | None) -> Any:
            return None if name is None else columns.column(name)

        self._prompt_column, self._prompts = layout.prompt, columns.column(layout.prompt)
        self._labels = [read(name) for name in layout.labels]
        self._has_label = read(layout.has_label)
        self._uids = [columns.column(name) for name in layout.uids]
        self._scores = [columns.column(name) for name in layout.scores or ()]
        self._numbers: dict[str, tuple[Number, Any]] = {
            part: (number, read(layout.terms[part]))
            for part, number in TERMS.items()
            if number is not None and part in layout.terms
        }
        self._where = columns.where

    def prompt(self, row: int) -> str:
        """Raises ImageError (empty prompt, bad prompt)."""
        return read_prompt(self._prompts[row], self._prompt_column)

    def preferred(self, row: int) -> int | tuple[str, str]:
        one, two = self._labels
        if one is None:
            return 0
        # an absent second column means 1 - label_0; an empty cell in a present one is a bad label
        second = None if two is None else (math.nan if two[row] is None else two[row])
        return judge(one[row], second, True if self._has_label is None else self._has_label[row])

    def uids(self, row: int) -> tuple[str, ...]:
        """Raises ImageError (bad row) for one that is not text."""
        cells = [column[row] for column in self._uids]
        values = tuple("" if cell is None or cell != cell else str(cell) for cell in cells)
        if fault := next(filter(None, map(odd, values)), None):
            raise ImageError(BAD_ROW, f"its uid {fault}: {values!a:.80}; write a string in UTF-8, or leave it empty")
        return values if all(values) else ()

    def scores(self, row: int) -> tuple[float, float] | None:
        """Scores in stored order; nan where one is missing; None where the data have no score columns."""
        if not self._scores:
            return None
        one, two = (_score(column[row]) for column in self._scores)
        return one, two

    def numbers(self, row: int) -> dict[str, float]:
        """The terms that are numbers, those of them that the data have. Raises ImageError."""
        where = self._where(row)
        return {part: number.read(column[row], part, where) for part, (number, column) in self._numbers.items()}


def _score(value: Any) -> float:
    """A finite number, or nan."""
    try:
        score = float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan
    return score if math.isfinite(score) else math.nan
