"""Captions: what is written is read back, other text is refused, and the splits share nothing."""

from __future__ import annotations

import pytest

from diffalign.errors import DiffalignError
from diffalign.world.emoji.captions import (
    BACKGROUNDS,
    SPLITS,
    STYLES,
    TEMPLATES,
    THINGS,
    Combination,
    caption,
    combinations,
    parse,
    prompts,
    vocabulary,
)


def test_every_caption_is_read_back() -> None:
    for split in SPLITS:
        for c in combinations(split):
            for style in (None, *STYLES):
                for k in range(len(TEMPLATES)):
                    assert parse(caption(c._replace(style=style), k)) == c._replace(style=style)


def test_articles_are_english() -> None:
    assert caption(Combination("octopus", "pink")) == "an octopus on a pink background"
    assert caption(Combination("octopus", "pink", "flat"), 1) == "a flat octopus in front of pink"


@pytest.mark.parametrize(
    "text",
    ["a red apple", "a red apple on a brown background", "a shiny cat in front of blue", "a cat in front of blue!"],
)
def test_other_text_is_refused_with_what_would_be_right(text: str) -> None:
    with pytest.raises(DiffalignError, match=r"is no caption of the emoji world.*Things: red apple"):
        parse(text)


def test_splits_are_disjoint_and_even() -> None:
    parts = [combinations(split) for split in SPLITS]
    assert [len(part) for part in parts] == [144, 24, 24]
    assert len({c for part in parts for c in part}) == len(THINGS) * len(BACKGROUNDS)
    for part in parts[1:]:
        assert {c.thing for c in part} == set(THINGS)
        assert all(sum(c.background == b for c in part) == 3 for b in BACKGROUNDS)
    with pytest.raises(DiffalignError, match="'test'; it must be one of train, heldout, final"):
        combinations("test")


def test_prompts_use_only_the_vocabulary() -> None:
    words = set(vocabulary())
    assert all(set(text.split()) <= words for split in SPLITS for text in prompts(split))
