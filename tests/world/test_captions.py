"""Captions have one meaning each, and the splits share none of them."""

from __future__ import annotations

from collections import Counter

import pytest

from diffalign.world.captions import (
    BACKGROUNDS,
    COLOURS,
    COMBINATIONS,
    SHAPES,
    TEMPLATES,
    caption,
    parse,
    prompts,
    splits,
    vocabulary,
)


def test_every_caption_parses_back() -> None:
    for combination in COMBINATIONS:
        for template in range(len(TEMPLATES)):
            assert parse(caption(combination, template)) == combination
    assert len({caption(c, k) for c in COMBINATIONS for k in range(len(TEMPLATES))}) == 120 * len(TEMPLATES)


@pytest.mark.parametrize("text", ["", "a cat", "a red circle", "a red circle on a pink background", "red on red"])
def test_other_text_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ValueError, match=r"not a caption of the embedded world.*a red circle on a black background"):
        parse(text)


def test_splits_are_disjoint_and_cover_everything() -> None:
    members = [c for group in splits().values() for c in group]
    assert sorted(members) == sorted(COMBINATIONS)
    assert {name: len(group) for name, group in splits().items()} == {"train": 72, "heldout": 24, "final": 24}


@pytest.mark.parametrize("split", ["train", "heldout", "final"])
def test_splits_are_balanced(split: str) -> None:
    group = splits()[split]
    each = len(group) // 24
    assert Counter((c.shape, c.colour) for c in group) == {(s, c): each for s in SHAPES for c in COLOURS}
    backgrounds = Counter(c.background for c in group)
    assert min(backgrounds[b] for b in BACKGROUNDS) >= 0.75 * len(group) / len(BACKGROUNDS)


def test_prompts_deal_out_the_phrasings() -> None:
    texts = prompts("heldout", per_combination=2)
    assert len(set(texts)) == 48
    assert Counter(parse(t) for t in texts) == dict.fromkeys(splits()["heldout"], 2)
    with pytest.raises(ValueError, match=r"split is 'test'.*train, heldout, final"):
        prompts("test")
    with pytest.raises(ValueError, match="per_combination is 9"):
        prompts("train", per_combination=9)


def test_vocabulary_covers_every_caption() -> None:
    words = {w for c in COMBINATIONS for k in range(len(TEMPLATES)) for w in caption(c, k).split()}
    assert words == set(vocabulary())
