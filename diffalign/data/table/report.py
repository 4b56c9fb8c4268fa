"""The report of `diffalign data check PATH`: how many pairs are usable, why the others are not, sizes, a sample."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

from PIL import Image, ImageDraw, ImageFont, ImageOps

from diffalign.data.buckets.sizes import Shapes, cropped, in_buckets, square
from diffalign.data.formats.rankings import RankedColumns
from diffalign.data.formats.two_prompts import FORMAT
from diffalign.data.row import ImageError, Problem
from diffalign.data.spec import AS_FOUND, DataSpec
from diffalign.data.table.lists import count_lists
from diffalign.data.table.open import open_pairs
from diffalign.data.table.pairs import PairTable
from diffalign.data.table.score_aggregation import Aggregate, Axis, use_axes
from diffalign.data.transforms import EXTREME, Size
from diffalign.errors import printable
from diffalign.io.files import written_whole

NAMED = 5  # rows named per kind of problem in the text; the json has all
CELL, CAPTION = 256, 48  # pixels of an image and of the prompt below it on the contact sheet
HEADING = 20  # pixels above the images, for the names of the columns


@dataclass(frozen=True)
class Report:
    """The findings about one data set. `text()` is for people, `json()` for programs."""

    path: str
    verify: str
    resolution: int | None
    table: PairTable
    buckets: Shapes | None = None  # of the pairs, where the resolution and a table of buckets were given

    @property
    def usable(self) -> int:
        """Number of usable pairs, ties among them."""
        return len(self.table)

    @property
    def problems(self) -> list[Problem]:
        """Every row with a fault."""
        return self.table.problems

    @cached_property
    def sizes(self) -> list[tuple[int, int]]:
        """(width, height) of every image of a usable pair, by area; none with verify="none"."""
        return sorted(self.table.sizes, key=lambda size: size[0] * size[1])

    @property
    def size_range(self) -> tuple[str, str, str] | None:
        """ "WxH" of the smallest, median and largest image by area."""
        sizes = self.sizes
        return (_size(sizes[0]), _size(sizes[len(sizes) // 2]), _size(sizes[-1])) if sizes else None

    @property
    def prompt_range(self) -> tuple[int, int, int] | None:
        """Characters of the prompts: min, median, max."""
        lengths = sorted(map(len, self.table.prompts))
        return (lengths[0], int(median(lengths)), lengths[-1]) if lengths else None

    @cached_property
    def extreme(self) -> list[tuple[str, str]]:
        """Row and "WxH" of pairs with an image more than EXTREME times as long as wide."""
        sides = self.table.sizes
        pairs = ((index, sides[2 * index : 2 * index + 2]) for index in range(len(sides) // 2))
        longest = ((index, max(both, key=lambda size: max(size) / min(size))) for index, both in pairs)
        return [(self.table.where(i), _size(size)) for i, size in longest if max(size) > EXTREME * min(size)]

    @property
    def by_kind(self) -> dict[str, list[Problem]]:
        """Problems by kind, most frequent kind first."""
        kinds = Counter(problem.kind for problem in self.problems)
        return {kind: [each for each in self.problems if each.kind == kind] for kind, _ in kinds.most_common()}

    @property
    def smaller(self) -> int | None:
        """Images whose shorter side is below the resolution and will be enlarged."""
        return None if self.resolution is None else sum(min(size) < self.resolution for size in self.sizes)

    @cached_property
    def cropped(self) -> dict[str, float] | None:
        """The mean share of an image's pixels that is cropped, as a square and in buckets; None without sizes."""
        if not self.sizes:
            return None
        found = {"square": cropped(self.table, square(1))}
        return found if self.buckets is None else found | {"aspect_buckets": cropped(self.table, self.buckets)}

    @cached_property
    def rankings(self) -> tuple[Counter[int], Counter[str]] | None:
        """Of rows that are rankings: usable lists by length, and the others by kind of fault; None for other data.

        By their order alone; their images are those of the pairs.
        """
        columns = self.table.columns
        return count_lists(columns) if isinstance(columns, RankedColumns) else None

    def json(self) -> dict[str, Any]:
        """Everything in `text()`, with every problem."""
        table, sizes, lengths = self.table, self.size_range, self.prompt_range
        return {
            "path": self.path,
            "format": table.format,
            "storage": table.storage,
            "verify": self.verify,
            "rows": table.total_rows,
            "rows_examined": table.index.examined_rows,
            "usable_pairs": self.usable,
            "ties_kept": table.ties,
            "problems": {
                kind: [{"row": each.where, "reason": each.reason, "dropped": each.dropped} for each in found]
                for kind, found in self.by_kind.items()
            },
            "sizes": dict(zip(("smallest", "median", "largest"), sizes)) if sizes else None,
            "extreme_aspect_ratios": [{"row": where, "size": size} for where, size in self.extreme],
            "resolution": self.resolution,
            "images_smaller_than_resolution": self.smaller,
            "cropped": self.cropped,
            "aspect_buckets": None
            if self.buckets is None
            else {_size(size): pairs for size, pairs in self.buckets.counts},
            "ranked_lists": None
            if self.rankings is None
            else {"by_length": dict(sorted(self.rankings[0].items())), "not_usable": dict(self.rankings[1])},
            "prompt_characters": dict(zip(("min", "median", "max"), lengths)) if lengths else None,
            "unique_prompts": len(set(table.prompts)),
        }

    def text(self) -> str:
        """A page for the terminal."""
        table, layout = self.table, self.table.layout
        lines = [
            f"{self.path}: {table.format} columns in {table.storage}",
            f"columns       prompt: {layout.prompt}; images: {', '.join(layout.images)}"
            + (f"; label: {layout.labels[0]}" if layout.labels[0] else ""),
            f"rows          {table.total_rows}"
            + (f" = 2 for each of {table.total_rows // 2}" if table.format == FORMAT else "")
            + (f" ({table.index.examined_rows} examined)" if table.index.examined_rows < table.total_rows else ""),
            f"usable pairs  {self.usable}" + (f" (of them {table.ties} ties)" if table.ties else ""),
        ]
        if layout.terms:
            named = ", ".join(f"{part} (column {column})" for part, column in layout.terms.items())
            lines.append(f"pair terms    {named}")
        if self.rankings is not None:
            usable, unusable = self.rankings
            lists = ", ".join(f"{n} of {length}" for length, n in sorted(usable.items())) or "none"
            rest = "".join(f"; {n} x {kind}" for kind, n in unusable.items())
            lines.append(f"ranked lists  {lists} images for an objective of lists{rest}")
        lines += self._problem_lines()
        if sizes := self.size_range:
            lines.append(f"image sizes   {sizes[0]} smallest, {sizes[1]} median, {sizes[2]} largest")
        if self.extreme:
            some = ", ".join(f"{where} ({size})" for where, size in self.extreme[:NAMED])
            share = f"{len(self.extreme)} of {self.usable} pairs have an image over {EXTREME} times as long as wide"
            lines.append(f"              {share}, cropped to a square without aspect buckets: {some}")
        if self.smaller is not None and self.sizes:
            lines.append(
                f"              {self.smaller} of {len(self.sizes)} images are smaller than {self.resolution} px"
            )
        lines += self._bucket_lines()
        if lengths := self.prompt_range:
            lines.append(f"prompts       {lengths[0]} to {lengths[2]} characters, median {lengths[1]}")
            prompts = Counter(table.prompts)
            prompt, times = prompts.most_common(1)[0]
            repeated = f"; most repeated, {times} times: {_short(prompt)}" if times > 1 else ""
            lines.append(f"              {len(prompts)} different{repeated}")
            lines.append("sample")
            lines += [
                f"  {table.where(index)}  [{table.ids[index][:24]}]  {_short(table.prompts[index])}"
                for index in spread(self.usable, 3)
            ]
        return printable("\n".join(lines))

    def _bucket_lines(self) -> list[str]:
        if self.buckets is None or self.cropped is None:
            return []
        square_share, share = (f"{100 * self.cropped[name]:.1f} %" for name in ("square", "aspect_buckets"))
        counts = self.buckets.counts
        most = max(pairs for _, pairs in counts)
        lines = [
            f"buckets       {len(counts)} of {len(self.buckets.sizes)} sizes have pairs; {share} of the pixels are "
            f"cropped, of squares {square_share}"
        ]
        for size, pairs in counts:
            lines.append(f"  {_size(size):>10} {pairs:>8} {'▇' * max(1, round(40 * pairs / most))}")
        return lines

    def _problem_lines(self) -> list[str]:
        lines = []
        for kind, found in self.by_kind.items():
            kept = "" if found[0].dropped else " (kept)"
            lines.append(f"  {len(found)} x {kind}{kept}")
            lines += [f"      {each.where}: {without(each.where, each.reason)}" for each in found[:NAMED]]
            if len(found) > NAMED:
                lines.append(f"      … and {len(found) - NAMED} more")
        return ["not usable" if any(p.dropped for p in self.problems) else "notes", *lines] if lines else []

    def contact_sheet(self, path: str | Path, pairs: int = 6) -> Path:
        """Write a PNG with some pairs, spread over the data: chosen left, rejected right, the prompt below."""
        indices = spread(self.usable, pairs)
        sheet = Image.new("RGB", (2 * CELL, HEADING + max(1, len(indices)) * (CELL + CAPTION)), "white")
        draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=12)
        for column, side in enumerate(("chosen", "rejected")):
            draw.text((column * CELL + 4, 4), side, fill="black", font=font)
        for place, index in enumerate(indices):
            top = HEADING + place * (CELL + CAPTION)
            caption = textwrap.wrap(self.table.prompts[index], 80)[:2]
            try:
                row = self.table[index]
                for column, ref in enumerate((row.chosen, row.rejected)):
                    image = ImageOps.pad(ref.open(), (CELL - 4, CELL - 4), color="white")
                    sheet.paste(image, (column * CELL + 2, top + 2))
            except ImageError as error:
                caption = textwrap.wrap(f"unreadable: {error}", 80)[:2]
            draw.multiline_text((4, top + CELL), "\n".join(caption), fill="black", font=font)
        place_to = Path(path)
        with written_whole(place_to) as partial:
            sheet.save(partial, "PNG")
        return place_to


def check_pairs(
    path: str | Path,
    spec: DataSpec = AS_FOUND,
    *,
    resolution: int | None = None,
    buckets: tuple[str, tuple[Size, ...]] | None = None,
    axes: Sequence[Axis] = (),
    aggregate: Aggregate = "sum",
) -> Report:
    """Examine a data set as `open_pairs` does, and report.

    resolution: count the images that training at this size would enlarge.
    buckets: name and sizes of a table of aspect buckets: count the pairs of each.
    axes, aggregate: files of scores as a config's data.scores; pairs that all_agree leaves out are among the problems.
    Raises DataError when the file or folder cannot be read as pairs at all.
    """
    table = open_pairs(path, spec)
    if axes:
        use_axes(table, axes, aggregate, relabel=False)
    shapes = None if buckets is None else in_buckets(table, *buckets)
    return Report(str(path), spec.verify, resolution, table, shapes)


def spread(n: int, count: int) -> list[int]:
    """Up to `count` indices spread evenly over n."""
    return sorted({round(i * (n - 1) / max(1, count - 1)) for i in range(count)}) if n else []


def _size(size: Sequence[int]) -> str:
    return f"{size[0]}x{size[1]}"


def _short(text: str) -> str:
    return textwrap.shorten(text, 70, placeholder=" …") or repr(text)


def without(where: str, reason: str) -> str:
    """The reason without the row's name, where it begins with it."""
    return reason.removeprefix(where).lstrip(" :") or reason
