"""What prompts of GenEval's form ask for, one of each form; all 553 of the release were read as its metadata says."""

from __future__ import annotations

import pytest

from diffalign.rewards.base import ScorerError
from diffalign.rewards.geneval.prompts import CLASSES, Thing, Wanted, read_prompt


@pytest.mark.parametrize(
    ("prompt", "wanted"),
    [
        ("a photo of an airplane", Wanted("single_object", (Thing("airplane"),))),
        ("a photo of an orange", Wanted("single_object", (Thing("orange"),))),
        ("a photo of a hot dog and a dog", Wanted("two_object", (Thing("hot dog"), Thing("dog")))),
        ("a photo of three buses", Wanted("counting", (Thing("bus"),), count=3)),
        ("a photo of two toothbrushs", Wanted("counting", (Thing("toothbrush"),), count=2)),  # as GenEval writes it
        ("a photo of four knives", Wanted("counting", (Thing("knife"),), count=4)),
        ("a photo of an orange orange", Wanted("colors", (Thing("orange", "orange"),))),
        ("a photo of a tv remote above a tv", Wanted("position", (Thing("tv remote"), Thing("tv")), position="above")),
        (
            "a photo of a red cup and a pink bed",
            Wanted("color_attr", (Thing("cup", "red"), Thing("bed", "pink"))),
        ),
    ],
)
def test_a_prompt_of_each_form(prompt: str, wanted: Wanted) -> None:
    assert read_prompt(prompt) == wanted
    assert read_prompt(f" {prompt}.") == wanted


@pytest.mark.parametrize(
    "prompt",
    [
        "a lighthouse at dusk",
        "a photo of a lighthouse",
        "a photo of eleven dogs",
        "a photo of two cats and a dog",
        "a photo of a red cup and a bed",
        "a photo of a red cup above a bed",
        "a photo of a cup, a bed",
    ],
)
def test_another_prompt_is_refused(prompt: str) -> None:
    with pytest.raises(ScorerError, match="not of GenEval's form"):
        read_prompt(prompt)


def test_there_are_80_classes() -> None:
    assert len(set(CLASSES)) == 80
