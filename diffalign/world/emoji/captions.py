"""What a caption of the emoji world says: a thing (24), a background (8), and a style (3) or none, in two phrasings.

    a red apple on a blue background
    a glossy red apple in front of blue

Captions without a style leave it open: three styles are then equally right, and a preference may choose among them.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from diffalign.errors import DiffalignError

THINGS = (
    *("red apple", "banana", "strawberry", "watermelon", "pineapple", "carrot", "pumpkin", "pizza"),
    *("hamburger", "doughnut", "cactus", "tulip", "sunflower", "mushroom", "octopus", "crab"),
    *("frog", "penguin", "cat", "pig", "whale", "rocket", "car", "crown"),
)
STYLES = ("classic", "flat", "glossy")  # Noto, Twemoji, Fluent 3D
BACKGROUNDS = ("white", "black", "grey", "blue", "green", "yellow", "pink", "purple")
TEMPLATES = ("{article} {subject} on a {background} background", "{article} {subject} in front of {background}")
SPLITS = ("train", "heldout", "final")


class Combination(NamedTuple):
    """One meaning that a caption can have."""

    thing: str
    background: str
    style: str | None = None  # None: the caption does not say


def combinations(split: str) -> tuple[Combination, ...]:
    """The pairs of thing and background of a split, without a style.

    A Latin arrangement: (thing + background) mod 8 is 0 for `heldout` (24, for development) and 1 for `final` (24, for
    last figures), so each of them has every thing once and every background three times. `train` has the other 144.
    Raises DiffalignError for another split.
    """
    if split not in SPLITS:
        raise DiffalignError(f"split is {split!r}; it must be one of {', '.join(SPLITS)}")
    chosen = []
    for i, thing in enumerate(THINGS):
        for k, background in enumerate(BACKGROUNDS):
            if SPLITS[{0: 1, 1: 2}.get((i + k) % len(BACKGROUNDS), 0)] == split:
                chosen.append(Combination(thing, background))
    return tuple(chosen)


def caption(combination: Combination, template: int = 0) -> str:
    """The combination in words; `template` indexes TEMPLATES."""
    subject = f"{combination.style} {combination.thing}" if combination.style else combination.thing
    article = "an" if subject[0] in "aeiou" else "a"
    return TEMPLATES[template].format(article=article, subject=subject, background=combination.background)


def prompts(split: str) -> list[str]:
    """One caption for each combination of a split, phrasings dealt out in turn."""
    return [caption(c, i % len(TEMPLATES)) for i, c in enumerate(combinations(split))]


_PATTERNS = tuple(
    re.compile(
        template.format(
            article="an?",
            subject=f"(?:(?P<style>{'|'.join(STYLES)}) )?(?P<thing>{'|'.join(THINGS)})",
            background=f"(?P<background>{'|'.join(BACKGROUNDS)})",
        )
    )
    for template in TEMPLATES
)


def parse(text: str) -> Combination:
    """The combination that a caption names. Raises DiffalignError for a text that is no caption of this world."""
    for pattern in _PATTERNS:
        if found := pattern.fullmatch(text.strip().lower()):
            return Combination(found["thing"], found["background"], found["style"])
    raise DiffalignError(
        f"{text!r} is no caption of the emoji world. Its captions look like "
        f"{caption(Combination('octopus', 'pink'))!r} or {caption(Combination('cat', 'blue', 'glossy'), 1)!r}. "
        f"Things: {', '.join(THINGS)}. Styles: {', '.join(STYLES)}, or none. Backgrounds: {', '.join(BACKGROUNDS)}. "
        "Score other prompts with another scorer"
    )


def vocabulary() -> list[str]:
    """Every word that a caption can contain, in a fixed order."""
    fixed = [w for t in TEMPLATES for w in t.split() if not w.startswith("{")]
    things = [w for thing in THINGS for w in thing.split()]
    return list(dict.fromkeys(("a", "an", *fixed, *STYLES, *things, *BACKGROUNDS)))
