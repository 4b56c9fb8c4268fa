"""The protocol between a run and a scorer elsewhere: JSON over HTTP, version 1.

    GET  /health  ->  {"protocol": 1, "name": "my-judge", "unit": "points", "tie": 0.1, "span": [0, 10], "batch": 8}
    POST /score       {"protocol": 1, "prompts": ["a fox", ...], "images": ["<base64 of a PNG>", ...]}
                  ->  {"protocol": 1, "scores": [7.5, ...]}

One finite score for each image, higher is better; a judge gives the same score in any batch. `tie`, `span` and `batch`
(images in a request, at most) may be left out. A fault is a status of 400 and above with {"error": "what to do"}; 429
and 5xx are tried again. A token is sent as `Authorization: Bearer TOKEN`.
"""

from __future__ import annotations

import base64
import binascii
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from diffalign.rewards.base import ScorerError, is_finite_number

VERSION = 1
TOKEN = "DIFFALIGN_SCORER_TOKEN"  # environment variable, on both sides
BATCH = 8  # images in a request
LARGEST_REQUEST = 64 * 2**20  # bytes
LARGEST_ANSWER = 2**20
LARGEST_IMAGE = 64_000_000  # pixels


@dataclass(frozen=True)
class Health:
    """What a server says of its scorer."""

    name: str
    unit: str = ""
    tie: float | None = None
    span: tuple[float, float] | None = None
    batch: int = BATCH


def read_health(body: bytes, where: str) -> Health:
    """A server's health. Raises ScorerError naming the field that is missing or wrong."""
    found = read_object(body, where)
    name, unit, tie, span, batch = (found.get(key) for key in ("name", "unit", "tie", "span", "batch"))
    faults = {
        "protocol": found.get("protocol") != VERSION,
        "name": not (isinstance(name, str) and 0 < len(name) <= 100 and name.isprintable()),
        "unit": not (unit is None or isinstance(unit, str)),
        "tie": not (tie is None or (is_finite_number(tie) and tie >= 0)),
        "span": not (span is None or _is_span(span)),
        "batch": not (batch is None or (isinstance(batch, int) and not isinstance(batch, bool) and batch > 0)),
    }
    for field, wrong in faults.items():
        if wrong:
            raise ScorerError(
                f"{where} has {field} = {found.get(field)!r:.100}; protocol {VERSION} is in docs/scorers.md"
            )
    limits = (float(span[0]), float(span[1])) if span else None
    return Health(str(name), unit or "", None if tie is None else float(tie), limits, min(batch or BATCH, BATCH))


def read_scores(body: bytes, count: int, where: str) -> list[float]:
    """`count` scores. Raises ScorerError for another number of them, and for one that is no finite number."""
    found = read_object(body, where)
    scores = found.get("scores")
    if found.get("protocol") != VERSION or not isinstance(scores, list):
        raise ScorerError(f'{where} answered {_short(body)}; expected {{"protocol": {VERSION}, "scores": [...]}}')
    if len(scores) != count:
        raise ScorerError(f"{where} gave {len(scores)} scores for {count} images; it must give one for each")
    for place, score in enumerate(scores):
        if not is_finite_number(score):
            raise ScorerError(f"{where} gave {score!r:.100} to image {place + 1} of {count}; scores are finite numbers")
    return [float(score) for score in scores]


def read_object(body: bytes, where: str) -> dict[str, Any]:
    """A JSON object. Raises ScorerError for anything else."""
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):  # also bytes that are no UTF-8
        found = None
    if not isinstance(found, dict):
        raise ScorerError(f"{where} gave {_short(body)} and no JSON object; is it a scorer of docs/scorers.md?")
    return found


def request_of(images: Sequence[str], prompts: Sequence[str]) -> bytes:
    """The body of a request: images as `encoded` gives them, one prompt each."""
    return json.dumps({"protocol": VERSION, "prompts": list(prompts), "images": list(images)}).encode()


def read_request(body: bytes) -> tuple[list[Image.Image], list[str]]:
    """The images and prompts of a request. Raises ScorerError naming what is wrong with it."""
    found = read_object(body, "the request")
    prompts, images = found.get("prompts"), found.get("images")
    if found.get("protocol") != VERSION:
        raise ScorerError(f"the request has protocol {found.get('protocol')!r:.20}; this server speaks {VERSION}")
    if not isinstance(prompts, list) or not isinstance(images, list) or len(prompts) != len(images):
        raise ScorerError("the request needs `prompts` and `images`, two lists of the same length")
    if len(images) > BATCH:
        raise ScorerError(f"the request has {len(images)} images; at most {BATCH} are taken")
    if not all(isinstance(prompt, str) for prompt in prompts):
        raise ScorerError("the request has a prompt that is no text")
    return [decoded(image, place) for place, image in enumerate(images)], prompts


def encoded(image: Image.Image) -> str:
    """base64 of an RGB PNG."""
    file = io.BytesIO()
    image.convert("RGB").save(file, "PNG", compress_level=1)
    return base64.b64encode(file.getvalue()).decode("ascii")


def decoded(text: Any, place: int) -> Image.Image:
    """An image from base64 of a PNG. Raises ScorerError with its place in the request."""
    try:
        image = Image.open(io.BytesIO(base64.b64decode(text, validate=True)), formats=["PNG"])
        if image.width * image.height > LARGEST_IMAGE:
            raise ScorerError(
                f"image {place + 1} has {image.width} x {image.height} pixels, more than {LARGEST_IMAGE:,}"
            )
        return image.convert("RGB")
    except (TypeError, ValueError, binascii.Error, OSError, SyntaxError, Image.DecompressionBombError) as error:
        if isinstance(error, ScorerError):
            raise
        raise ScorerError(f"image {place + 1} of the request is not base64 of a PNG") from error


def _is_span(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(is_finite_number, value)) and value[0] < value[1]


def _short(body: bytes) -> str:
    return repr(body[:80].decode("utf-8", "replace"))
