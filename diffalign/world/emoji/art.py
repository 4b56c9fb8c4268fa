"""The emoji world's art: 24 things in three styles, 64x64 with transparency, in one sheet.

    npm pack emoji-datasource-google@16.0.0 emoji-datasource-twitter@16.0.0 @lobehub/fluent-emoji-3d@1.1.0
    python -m diffalign.world.emoji.art --tarballs . --out assets/emoji/art.png

Rows of the sheet are things, columns are styles, in the order of `captions`. The art is not ours: see
assets/emoji/LICENSES.md.
"""

from __future__ import annotations

import argparse
import io
import tarfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from PIL import Image

from diffalign.errors import MissingFileError
from diffalign.world.emoji import asset
from diffalign.world.emoji.captions import STYLES, THINGS

CELL = 64  # pixels of one drawing in the sheet

_CODES = {
    **{"red apple": "1f34e", "banana": "1f34c", "strawberry": "1f353", "watermelon": "1f349", "pineapple": "1f34d"},
    **{"carrot": "1f955", "pumpkin": "1f383", "pizza": "1f355", "hamburger": "1f354", "doughnut": "1f369"},
    **{"cactus": "1f335", "tulip": "1f337", "sunflower": "1f33b", "mushroom": "1f344", "octopus": "1f419"},
    **{"crab": "1f980", "frog": "1f438", "penguin": "1f427", "cat": "1f431", "pig": "1f437", "whale": "1f433"},
    **{"rocket": "1f680", "car": "1f697", "crown": "1f451"},
}
_SOURCES = {  # style: tarball, name of a drawing in it
    "classic": ("emoji-datasource-google-16.0.0.tgz", "package/img/google/64/{}.png"),
    "flat": ("emoji-datasource-twitter-16.0.0.tgz", "package/img/twitter/64/{}.png"),
    "glossy": ("lobehub-fluent-emoji-3d-1.1.0.tgz", "package/assets/{}.webp"),
}


@cache
def drawings() -> tuple[tuple[Image.Image, ...], ...]:
    """The drawings, premultiplied RGBa 64x64, indexed by thing and style in the order of `captions`."""
    with Image.open(asset("art.png")) as sheet:
        whole = sheet.convert("RGBA")
    return tuple(
        tuple(
            whole.crop((s * CELL, t * CELL, (s + 1) * CELL, (t + 1) * CELL)).convert("RGBa") for s in range(len(STYLES))
        )
        for t in range(len(THINGS))
    )


def write_sheet(tarballs: Path, out: Path) -> None:
    """Writes the sheet from the three npm tarballs in the folder `tarballs`.

    Each drawing is cropped to what is not transparent and scaled to 64 pixels on its longer side. Raises
    MissingFileError for a tarball that is not there.
    """
    sheet = Image.new("RGBA", (CELL * len(STYLES), CELL * len(THINGS)))
    for column, style in enumerate(STYLES):
        for row, drawing in enumerate(_read(tarballs, style)):
            sheet.paste(drawing, (column * CELL, row * CELL))
    out.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(out, optimize=True)


def _read(tarballs: Path, style: str) -> Iterator[Image.Image]:
    name, member = _SOURCES[style]
    if not (tarballs / name).is_file():
        raise MissingFileError(f"{tarballs / name} does not exist; fetch it with `npm pack`: see {__name__}")
    with tarfile.open(tarballs / name) as archive:
        for thing in THINGS:
            file = archive.extractfile(member.format(_CODES[thing]))
            assert file is not None  # KeyError of getmember otherwise
            with Image.open(io.BytesIO(file.read())) as image:
                yield _fit(image.convert("RGBA"))


def _fit(image: Image.Image) -> Image.Image:
    image = image.crop(image.getchannel("A").point(lambda a: 255 * (a > 8)).getbbox())
    scale = CELL / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    small = image.convert("RGBa").resize(size, Image.Resampling.LANCZOS).convert("RGBA")
    square = Image.new("RGBA", (CELL, CELL))
    square.paste(small, ((CELL - size[0]) // 2, (CELL - size[1]) // 2))
    return square


def main() -> None:
    """Command line of this module."""
    parser = argparse.ArgumentParser(prog="python -m diffalign.world.emoji.art", description="write the sheet of art")
    parser.add_argument("--tarballs", required=True, type=Path, help="folder with the three npm tarballs")
    parser.add_argument("--out", required=True, type=Path, help="the sheet, a .png file")
    arguments = parser.parse_args()
    write_sheet(arguments.tarballs, arguments.out)


if __name__ == "__main__":
    main()
