"""A pair on disk: two image references and a prompt; and the fault of a row that cannot be used."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from PIL import Image, ImageOps

from diffalign.errors import DiffalignError, printable

MIN_SIDE = 8  # pixels: the edge of one latent cell of the common VAEs; smaller images have no content
DRAWN = ("EPS", "WMF", "EMF")  # Pillow leaves these to Ghostscript or to the system
MAX_PIXELS = 89_478_485  # of one image: 256 MB of RGB, decoded at every visit; Pillow warns from there on

# Fault kinds, in the order in which a row is examined: a row is reported once, with its first fault.
BAD_ROW = "bad row"
NO_LABEL = "no label"
BAD_LABEL = "bad label"
TIE = "tie"
EMPTY_PROMPT = "empty prompt"
BAD_PROMPT = "bad prompt"
MISSING_SIDE = "missing side"
NOT_IMAGE = "not an image"
OUTSIDE = "path outside the data folder"
IDENTICAL = "identical images"
CORRUPT = "corrupt image"
TINY = "tiny image"
HUGE = "huge image"
BAD_TERM = "bad weight, margin or mask"
DUPLICATE = "duplicate id"
DISAGREEMENT = "axes disagree"  # a verdict on a usable pair, made when scores are taken up


class DataError(DiffalignError):
    """A file or folder cannot be read as pairs at all; the message has the reason and the remedy."""


class ImageError(DiffalignError):
    """One image cannot be used. `kind` is one of the fault kinds; the message names the row."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind


@dataclass(frozen=True)
class Problem:
    """A row with a fault. `where` names its file and row or line."""

    where: str
    kind: str
    reason: str
    dropped: bool = True  # False: the row is used, and only reported (duplicate ids)

    def __str__(self) -> str:
        return printable(f"{self.where}: {self.kind}: {self.reason}")


@dataclass(frozen=True)
class ImageRef:
    """An encoded image that has not been opened: bytes in memory, a file, or a span of a file (tar member)."""

    data: bytes | None
    path: str | None
    where: str  # row and column, for messages
    span: tuple[int, int] | None = None  # (offset, size) in bytes inside `path`

    def read(self) -> bytes:
        """The encoded bytes. Raises ImageError for a missing or unreadable file."""
        if self.data is not None:
            return self.data
        try:
            with open(str(self.path), "rb") as file:
                if self.span is None:
                    return file.read()
                file.seek(self.span[0])
                return file.read(self.span[1])
        except OSError as error:
            raise self._missing(error) from error

    def open(self) -> Image.Image:
        """The decoded image: RGB, upright (EXIF applied), transparency composed on white.

        Raises ImageError: "missing side" when the file is not there, "corrupt image" when it does not decode.
        """
        with self._opened() as image:
            return to_rgb(ImageOps.exif_transpose(image))

    def size(self) -> tuple[int, int]:
        """(width, height) as displayed, from the header alone. Raises ImageError as `open` does."""
        with self._opened() as image:
            # asked for only where the header has it: PNG's getexif() decodes the image to find it
            orientation = image.getexif().get(0x0112, 1) if "exif" in image.info else 1
            return (image.height, image.width) if orientation in (5, 6, 7, 8) else image.size

    @contextmanager
    def _opened(self) -> Iterator[Image.Image]:
        whole_file = self.data is None and self.span is None
        try:
            with Image.open(str(self.path) if whole_file else io.BytesIO(self.read())) as image:
                _check_header(image, self.where)
                yield image
        except ImageError:
            raise
        except FileNotFoundError as error:
            raise self._missing(error) from error
        except Image.DecompressionBombError as error:
            raise ImageError(HUGE, f"{self.where}: {error}; save a smaller copy") from error
        except Exception as error:  # PIL decoders raise OSError, SyntaxError, ValueError, struct.error, ...
            raise self._corrupt(error) from error

    def _corrupt(self, error: Exception) -> ImageError:
        there = self.data is not None or os.path.isfile(str(self.path))
        if there and (instead := stand_in(self.read()[:64])) is not None:
            return ImageError(CORRUPT, f"{self.where}: {instead}")
        reason = re.sub(r"<_io.BytesIO[^>]*>", "the bytes", " ".join(str(error).split()))[:120]
        return ImageError(CORRUPT, f"{self.where}: does not open as an image ({reason}); replace it or remove the row")

    def _missing(self, error: OSError) -> ImageError:
        return ImageError(MISSING_SIDE, f"{self.where}: cannot read {self.path} ({error.strerror}); restore the file")


@dataclass(frozen=True)
class PairRow:
    """One usable pair. `scores` are (chosen, rejected) values of some scorer, where the data have them."""

    id: str
    prompt: str
    chosen: ImageRef
    rejected: ImageRef
    scores: tuple[float, float] | None
    where: str
    tie: bool = False  # only with keep_ties; "chosen" is then just the first of the two
    others: tuple[ImageRef, ...] = ()  # of a ranked list: the images below `rejected`, the second best, in rank order

    @property
    def images(self) -> tuple[ImageRef, ...]:
        """All images, the best first."""
        return (self.chosen, self.rejected, *self.others)


def stand_in(start: bytes) -> str | None:
    """What a download left in place of a file, by its first bytes; None for any other file."""
    if start.startswith(b"version https://git-lfs"):
        return (
            "it is a Git-LFS pointer and not the file itself; run `git lfs install` and `git lfs pull` in its "
            "repository, or get the data with `hf download --repo-type dataset`"
        )
    if start.lstrip().lower().startswith((b"<!doctype html", b"<html")):
        return "it is a web page and not the file itself; download it again, from the address of the file"
    return None


def check_size(size: tuple[int, int], where: str) -> None:
    """Raise ImageError ("tiny image") for an image with a side below MIN_SIDE pixels."""
    if min(size) < MIN_SIDE:
        raise ImageError(TINY, f"{where}: {size[0]}x{size[1]} pixels; each side needs at least {MIN_SIDE}")


def _check_header(image: Image.Image, where: str) -> None:
    """Raise ImageError for an image that is too large, that another program would draw, or whose numbers have no known
    range; nothing is decoded."""
    if image.format in DRAWN:
        raise ImageError(NOT_IMAGE, f"{where}: {image.format} is drawn by another program; save it as PNG or JPEG")
    if image.width * image.height > MAX_PIXELS:
        raise ImageError(
            HUGE,
            f"{where}: {image.width}x{image.height} is {image.width * image.height} pixels, and at most "
            f"MAX_PIXELS = {MAX_PIXELS} are decoded; save a smaller copy",
        )
    # PIL calls some 16-bit PNG and PPM files "I"; in a TIFF that mode is 32-bit, with values of any scale
    if image.mode == "F" or (image.mode == "I" and image.format not in ("PNG", "PPM")):
        kind = "float" if image.mode == "F" else "32-bit integer"
        raise ImageError(CORRUPT, f"{where}: {kind} images have no known range; save them as 8- or 16-bit")


def to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB of any PIL image: alpha on white, 16-bit scaled by its own range, the rest by PIL's rules."""
    if image.mode == "RGB":
        image.load()
        return image
    if image.mode.startswith("I"):  # 16-bit PNG and TIFF; PIL's own convert would clip at 255
        return image.convert("I").point(lambda value: value * (1 / 257)).convert("L").convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")
