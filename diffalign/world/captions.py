"""What a caption of the world may say: 4 shapes x 6 colours x 5 backgrounds in a few phrasings, and the split of each.

Left out on purpose: position words. The UNet has no position embedding and learns them badly.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from diffalign.errors import DiffalignError

SHAPES = ("circle", "square", "triangle", "cross")
COLOURS = ("red", "yellow", "green", "cyan", "blue", "magenta")
BACKGROUNDS = ("black", "grey", "white", "navy", "brown")  # no word is both a colour and a background

TEMPLATES = (
    "a {colour} {shape} on a {background} background",
    "a picture of a {colour} {shape} on {background}",
    "{background} background with a {colour} {shape}",
    "the {shape} is {colour} and the background is {background}",
)

SPLITS = ("train", "heldout", "final")


class Combination(NamedTuple):
    """One meaning a caption can have."""

    shape: str
    colour: str
    background: str


COMBINATIONS = tuple(Combination(s, c, b) for s in SHAPES for c in COLOURS for b in BACKGROUNDS)


def _pattern(template: str) -> re.Pattern[str]:
    groups = {"shape": SHAPES, "colour": COLOURS, "background": BACKGROUNDS}
    return re.compile(template.format(**{k: f"(?P<{k}>{'|'.join(v)})" for k, v in groups.items()}))


_PATTERNS = tuple(_pattern(t) for t in TEMPLATES)


def caption(combination: Combination, template: int = 0) -> str:
    """The combination in words; `template` indexes TEMPLATES."""
    return TEMPLATES[template].format(**combination._asdict())


def parse(text: str) -> Combination:
    """The combination a caption names. ValueError for any text that is not a caption of the world."""
    for pattern in _PATTERNS:
        if found := pattern.fullmatch(text.strip().lower()):
            return Combination(**found.groupdict())
    raise DiffalignError(
        f"{text!r} is not a caption of the embedded world. Its captions look like {caption(COMBINATIONS[0])!r}: "
        f"shape one of {', '.join(SHAPES)}; colour one of {', '.join(COLOURS)}; background one of "
        f"{', '.join(BACKGROUNDS)}; phrasings in diffalign.world.captions.TEMPLATES. Score other prompts with another "
        "scorer"
    )


def splits() -> dict[str, tuple[Combination, ...]]:
    """`train` (72, base training and every pair), `heldout` (24, for development), `final` (24, for last figures).

    A Latin arrangement: (shape + colour + background) mod 5 is 0 for heldout and 1 for final, so each of these has
    every shape-colour couple exactly once and every background, and training has each couple on three backgrounds.
    """
    groups: dict[str, list[Combination]] = {name: [] for name in SPLITS}
    for c in COMBINATIONS:
        residue = (SHAPES.index(c.shape) + COLOURS.index(c.colour) + BACKGROUNDS.index(c.background)) % 5
        groups[{0: "heldout", 1: "final"}.get(residue, "train")].append(c)
    return {name: tuple(members) for name, members in groups.items()}


def prompts(split: str, per_combination: int = 1) -> list[str]:
    """Captions of a split, `per_combination` phrasings of each combination, phrasings dealt out evenly."""
    if split not in SPLITS:
        raise DiffalignError(f"split is {split!r}; it must be one of {', '.join(SPLITS)}")
    if not 1 <= per_combination <= len(TEMPLATES):
        raise DiffalignError(f"per_combination is {per_combination}; there are 1 to {len(TEMPLATES)} phrasings")
    return [caption(c, (i + k) % len(TEMPLATES)) for i, c in enumerate(splits()[split]) for k in range(per_combination)]


def vocabulary() -> list[str]:
    """Every word a caption can contain, in a fixed order."""
    words = [w for t in TEMPLATES for w in t.split() if not w.startswith("{")]
    return list(dict.fromkeys((*words, *SHAPES, *COLOURS, *BACKGROUNDS)))
