"""Which images are compared, and in which order they are shown."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from diffalign.evaluation.by_eye.plan import order_of
from diffalign.evaluation.by_eye.sources import Selection, from_images
from tests.cli.test_images import paint
from tests.evaluation.by_eye.helpers import material


def test_images_of_a_prompt_meet_in_rounds(tmp_path: Path) -> None:
    """Of 2 to 7 images: the first round shows each once (but one of an odd number), all rounds each pair once."""
    greys = {f"{n} images": list(range(n)) for n in range(1, 8)}
    folder = paint(tmp_path / "images", greys)
    once, every = (from_images([folder], Selection(per_prompt=n)).plan.comparisons for n in (None, 100))
    for prompt, images in greys.items():
        n = len(images)
        shown = [name for each in once if each.prompt == prompt for name in each.names]
        assert len(shown) == len(set(shown)) == n // 2 * 2
        pairs = {frozenset(each.names) for each in every if each.prompt == prompt}
        assert len(pairs) == sum(each.prompt == prompt for each in every) == n * (n - 1) // 2
    notes = from_images([folder, folder]).notes
    assert "1 prompts have one image" in notes
    assert "28 images equal another of their prompt" in notes
    assert "3 images of other prompts are in no comparison (--per-prompt makes more)" in notes


def test_a_limit_draws_the_same_pairs_for_everybody(tmp_path: Path) -> None:
    folder = paint(tmp_path / "images", {f"prompt {i}": [i, 100 + i] for i in range(20)})
    some = from_images([folder], Selection(seed=3, limit=8))
    assert [each.id for each in some.plan.comparisons] == [
        each.id for each in from_images([folder], Selection(seed=3, limit=8)).plan.comparisons
    ]
    assert "12 comparisons are left out by --limit" in some.notes
    other = from_images([folder], Selection(seed=4, limit=8))
    assert {each.id for each in some.plan.comparisons} != {each.id for each in other.plan.comparisons}


def test_the_order_does_not_depend_on_how_many_pairs_there_are() -> None:
    """Each annotator has one order; more pairs come in between, and no pair changes its sides."""
    plan = material([f"prompt {i}" for i in range(60)]).plan
    whole, part = (order_of(each, "ana") for each in (plan, replace(plan, comparisons=plan.comparisons[:30])))
    kept = {each.id for each in plan.comparisons[:30]}
    assert [shown for shown in whole if shown.comparison.id in kept] == part
    assert 15 < sum(shown.left for shown in whole) < 45
    assert order_of(plan, "ana") == whole
    assert order_of(plan, "ben") != whole
    assert order_of(replace(plan, seed=1), "ana") != whole
