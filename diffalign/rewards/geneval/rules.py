"""GenEval's rules on the detections of one image: which objects count, their number, their positions, their colours.

By the paper and its release (github.com/djghosh13/geneval at af4902f):

    an object counts    confidence above .3, above .9 for counting; the 16 most confident of a class; overlap is allowed
    presence, colour    judged on the most confident objects of the class, as many as are asked for
    counting            exactly the number asked for
    position            of the most confident object of each class: with centre offset d and o = d shrunk towards 0 by
                        .1 (sizes of both boxes) on each axis, "left of" is o_x / |d| < -.5; the others likewise

By hand: boxes (0,0,10,10) and (30,0,40,10) -> d = (-30,0), o = (-28,0), o/|d| = (-.93,0): the first is left of the
second.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from diffalign.rewards.geneval.prompts import Wanted

CONFIDENCE, COUNTING_CONFIDENCE = 0.3, 0.9
MOST = 16  # objects of a class
SHRINK = 0.1  # share of both sizes that an offset must exceed
DIRECTION = 0.5  # share of the offset's length

Box = tuple[float, float, float, float]  # left, top, right, bottom; pixels
ColourOf = Callable[[Box, str], str]  # box, class -> the colour of the object in it


@dataclass(frozen=True)
class Detection:
    """One object that a detector found."""

    name: str  # of `prompts.CLASSES`
    confidence: float  # 0 to 1
    box: Box


def why_wrong(wanted: Wanted, detections: Sequence[Detection], colour_of: ColourOf) -> str | None:
    """Why the image does not show what is wanted; None where it does. `colour_of` is asked only about colours."""
    least = COUNTING_CONFIDENCE if wanted.skill == "counting" else CONFIDENCE
    shown = []
    for thing in wanted.things:
        boxes = counted_boxes(detections, thing.name, least)
        if len(boxes) < wanted.count or (wanted.skill == "counting" and len(boxes) > wanted.count):
            return f"{len(boxes)} of {thing.name}, not {wanted.count}"
        if thing.colour is not None and (colour := colour_of(boxes[0], thing.name)) != thing.colour:
            return f"the {thing.name} is {colour}, not {thing.colour}"
        shown.append(boxes[0])
    if wanted.position is not None and wanted.position not in (found := positions(*shown)):
        return f"the {wanted.things[0].name} is {' and '.join(sorted(found)) or 'nowhere in particular'}"
    return None


def counted_boxes(detections: Sequence[Detection], name: str, least: float) -> list[Box]:
    """The boxes of a class above a confidence, the most confident first."""
    found = [each for each in detections if each.name == name and each.confidence > least]
    return [each.box for each in sorted(found, key=lambda each: -each.confidence)[:MOST]]


def positions(box: Box, other: Box) -> set[str]:
    """Where the first box is, relative to the second: none, one or two of `prompts.POSITIONS`."""
    found = set()
    offsets = [(box[i] + box[i + 2] - other[i] - other[i + 2]) / 2 for i in (0, 1)]
    for i, (before, after) in enumerate((("left of", "right of"), ("above", "below"))):
        sizes = abs(box[i + 2] - box[i]) + abs(other[i + 2] - other[i])
        beyond = max(abs(offsets[i]) - SHRINK * sizes, 0.0)
        if beyond > DIRECTION * math.hypot(*offsets):
            found.add(before if offsets[i] < 0 else after)
    return found
