"""What a prompt of GenEval's form asks for, read from its text, so that any prompt of these forms can be checked.

single_object   a photo of a bench
two_object      a photo of a bench and a sports ball
counting        a photo of three buses
colors          a photo of a red bench
position        a photo of a bench left of a bear
color_attr      a photo of a red bench and a yellow bear
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from diffalign.rewards.base import ScorerError

SKILLS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
POSITIONS = ("left of", "right of", "above", "below")
NUMBERS = {
    word: n for n, word in enumerate(("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"), 2)
}
# COCO's 80 classes by GenEval's names: three of COCO's are ambiguous in a prompt (mouse, remote, keyboard)
CLASSES = (
    *("person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light"),
    *("fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow"),
    *("elephant", "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee"),
    *("skis", "snowboard", "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard"),
    *("tennis racket", "bottle", "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple"),
    *("sandwich", "orange", "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch"),
    *("potted plant", "bed", "dining table", "toilet", "tv", "laptop", "computer mouse", "tv remote"),
    *("computer keyboard", "cell phone", "microwave", "oven", "toaster", "sink", "refrigerator", "book", "clock"),
    *("vase", "scissors", "teddy bear", "hair drier", "toothbrush"),
)
# Labels of detectors that name a class differently (COCO itself, and the older list that RT-DETR has) -> our name
ALIASES = {
    "mouse": "computer mouse",
    "remote": "tv remote",
    "keyboard": "computer keyboard",
    "aeroplane": "airplane",
    "motorbike": "motorcycle",
    "sofa": "couch",
    "pottedplant": "potted plant",
    "diningtable": "dining table",
    "tvmonitor": "tv",
    "hair dryer": "hair drier",
}


@dataclass(frozen=True)
class Thing:
    """One kind of object that an image must show."""

    name: str  # of CLASSES
    colour: str | None = None  # of COLOURS


@dataclass(frozen=True)
class Wanted:
    """What a prompt asks for."""

    skill: str  # of SKILLS
    things: tuple[Thing, ...]  # each at least once
    count: int = 1  # of the only thing; above 1: exactly so many
    position: str | None = None  # of the first thing relative to the second


def _plurals(name: str) -> tuple[str, ...]:
    """Every spelling of a plural; GenEval appends -s, or -es to a word in -s, also where English does not."""
    return f"{name}es" if name.endswith("s") else f"{name}s", f"{name}es", re.sub(r"f(e?)$", "ves", name)


_ONE = f"an? (?:({'|'.join(COLOURS)}) )?({'|'.join(sorted(CLASSES, key=len, reverse=True))})"
_SEVERAL = {plural: name for name in CLASSES for plural in _plurals(name)}
_COUNTED = re.compile(f"a photo of ({'|'.join(NUMBERS)}) (.+)")
_SHOWN = re.compile(f"a photo of {_ONE}(?: (and|{'|'.join(POSITIONS)}) {_ONE})?")


def read_prompt(prompt: str) -> Wanted:
    """What the prompt asks for. Raises ScorerError for one that is not of GenEval's form."""
    text = prompt.strip().rstrip(".")
    if (counted := _COUNTED.fullmatch(text)) and counted[2] in _SEVERAL:
        return Wanted("counting", (Thing(_SEVERAL[counted[2]]),), count=NUMBERS[counted[1]])
    if (shown := _SHOWN.fullmatch(text)) is not None:
        colour, name, link, second_colour, second = shown.groups()
        if link is None:
            return Wanted("colors" if colour else "single_object", (Thing(name, colour),))
        both = Thing(name, colour), Thing(second, second_colour)
        if link in POSITIONS and colour is second_colour is None:
            return Wanted("position", both, position=link)
        if link == "and" and (colour is None) == (second_colour is None):
            return Wanted("color_attr" if colour else "two_object", both)
    raise ScorerError(
        f"the prompt {prompt!r} is not of GenEval's form ('a photo of a red bench', 'a photo of two dogs', 'a photo of "
        "a cat left of a chair', with COCO's classes); give --prompts geneval, or another scorer"
    )
