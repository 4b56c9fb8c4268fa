"""One self-contained HTML page: its style, scripts, data and images are in the file.

A policy in the page (Content-Security-Policy) refuses every request, and every script but those that the page was
written with. Text that comes from data goes through `escape`, data for scripts through `data`, which escapes it too.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape as _escape
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from diffalign.errors import DiffalignError
from diffalign.io.files import save_text

_ASSETS = Path(__file__).parent / "assets"
SMALL = 128  # pixels: images up to this side are stored without loss
PIXELS = 48  # and up to this side they are enlarged to squares, not smoothed


@dataclass(frozen=True)
class ImageCoding:
    """How an image is stored in a page.

    side: the longer side is shrunk to this many pixels; None: never. Smaller images stay as they are.
    quality: of JPEG and WebP, 1 to 100. WebP of 100 has no loss, and so has WebP of an image that `is_small`.
    """

    format: Literal["webp", "jpeg", "png"] = "webp"
    side: int | None = None
    quality: int = 85

    def __post_init__(self) -> None:
        if self.format not in ("webp", "jpeg", "png"):
            raise DiffalignError(f"image format {self.format!r}: give webp, jpeg or png")
        if not 1 <= self.quality <= 100 or (self.side is not None and self.side < 1):
            raise DiffalignError(f"image quality {self.quality} and side {self.side}: give 1 to 100, and 1 or more")


def html_page(
    title: str,
    body: str,
    *,
    style: str = "",
    scripts: Sequence[str] = (),
    data: Mapping[str, Any] | None = None,
    served: bool = False,
) -> str:
    """The text of a page that needs no other file.

    title: plain text.
    body: HTML, in which the caller escaped the texts that come from data.
    style: CSS behind that of all pages (`assets/style.css`).
    scripts: JavaScript, run in this order when the body is there; `eval` is refused.
    data: JSON for scripts by name: `JSON.parse(document.getElementById(name).textContent)`.
    served: a server of ours sends the page, which may load images from it and send requests to it.

    Raises DiffalignError for numbers that JSON does not have (NaN, infinity), and for a script that ends its element.
    """
    for script in scripts:
        if "</script" in script.lower() or "<!--" in script:
            raise DiffalignError("a script contains </script or <!--, which ends its element; write it in two parts")
    if "</style" in style.lower():
        raise DiffalignError("a style contains </style, which ends its element; leave it out")
    own = " 'self'" if served else ""
    hashes = " ".join(f"'sha256-{_sha256(script)}'" for script in scripts) or "'none'"
    policy = (
        f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data: blob:{own}; "
        f"connect-src {own.strip() or chr(39) + 'none' + chr(39)}; base-uri 'none'; form-action 'none'"
    )
    blocks = [
        f'<script type="application/json" id="{escape(name)}">{_json(name, value)}</script>'
        for name, value in (data or {}).items()
    ]
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="referrer" content="no-referrer">',
            '<link rel="icon" href="data:,">',  # else a server is asked for /favicon.ico
            f"<title>{escape(title)}</title>",
            f"<style>{asset('style.css')}{style}</style>\n</head>\n<body>",
            body,
            *blocks,
            *(f"<script>{script}</script>" for script in scripts),
            "</body>\n</html>\n",
        ]
    )


def save_page(file: Path, page: str) -> int:
    """Writes a page, whole or not at all, in place of one that is there; returns its size in bytes."""
    save_text(file, page)
    return len(page.encode())


def asset(name: str) -> str:
    """The text of a style or script of the package."""
    return (_ASSETS / name).read_text(encoding="utf-8")


def escape(text: object) -> str:
    """Any text as it is shown, in an element or in a quoted attribute."""
    return _escape(str(text), quote=True)


def image_uri(image: Image.Image, coding: ImageCoding = ImageCoding()) -> str:
    """An image as a data URI, without the metadata of its file."""
    lossless = coding.format == "webp" and (coding.quality == 100 or is_small(image))
    image = image.convert("RGB")
    if coding.side is not None and max(image.size) > coding.side:
        image.thumbnail((coding.side, coding.side), Image.Resampling.LANCZOS)
    image.info = {}
    stream = io.BytesIO()
    image.save(stream, format=coding.format.upper(), quality=coding.quality, optimize=True, lossless=lossless)
    return f"data:image/{coding.format};base64,{base64.b64encode(stream.getvalue()).decode()}"


def is_small(image: Image.Image) -> bool:
    """Whether an image has so few pixels that each of them counts."""
    return max(image.size) <= SMALL


def shows_pixels(image: Image.Image) -> bool:
    """Whether an image has so few pixels that a page shows them as squares."""
    return max(image.size) <= PIXELS


def _sha256(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _json(name: str, value: Any) -> str:
    """JSON that cannot end the element it is in."""
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    except ValueError as error:
        raise DiffalignError(f"data '{name}' of a page: {error}; write None for a number that does not exist") from None
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
