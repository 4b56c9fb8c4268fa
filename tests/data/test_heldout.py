"""Held-out pairs: no prompt on both sides, the same choice in any order of the rows."""

from __future__ import annotations

import pytest

from diffalign.data.heldout import overlap, prompt_key, split_by_prompt
from diffalign.data.row import DataError
from diffalign.data.spec import DataSpec
from diffalign.data.table.open import open_pairs
from diffalign.world import pairs_path

PROMPTS = [f"A {word}  {number % 7}" for number, word in enumerate(["cat", "dog", "fox"] * 20)]


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5])
def test_a_prompt_is_on_one_side_whatever_the_order(share: float) -> None:
    train, heldout = split_by_prompt(PROMPTS, share, seed=3)
    assert sorted(train + heldout) == list(range(60))
    assert 0 < len(heldout) <= 60 * share
    assert not {PROMPTS[i] for i in train} & {PROMPTS[i] for i in heldout}
    _, backwards = split_by_prompt(PROMPTS[::-1], share, seed=3)
    assert {PROMPTS[::-1][i] for i in backwards} == {PROMPTS[i] for i in heldout}
    assert split_by_prompt(PROMPTS, share, seed=4) != (train, heldout)
    assert len(split_by_prompt(PROMPTS, share, seed=3, limit=6)[1]) <= 6


def test_case_and_white_space_make_no_other_prompt() -> None:
    assert prompt_key(" A  cat\n") == prompt_key("a CAT")
    prompts = ["a cat", "A cat ", "a dog", "a  dog", "a fox", "a FOX"]
    train, heldout = split_by_prompt(prompts, 0.7, seed=0)
    assert (len(train), len(heldout)) == (2, 4)
    assert {prompt_key(prompts[i]) for i in train} & {prompt_key(prompts[i]) for i in heldout} == set()


@pytest.mark.parametrize("prompts", [["a cat"] * 10, ["a cat"] * 5 + ["a dog"] * 5, ["a", "b", "c"]])
def test_too_few_prompts_are_refused(prompts: list[str]) -> None:
    with pytest.raises(DataError, match=r"validation\.pairs: a share of 0.2 is .* Give another share, or the path"):
        split_by_prompt(prompts, 0.2, seed=0)


def test_pairs_that_are_trained_on_are_refused() -> None:
    table = open_pairs(pairs_path(), DataSpec(max_pairs=40, verify="none"))
    train, heldout = table.part(range(20)), table.part(range(20, 40))
    assert [part.ids[0] for part in (train, heldout)] == [table.ids[0], table.ids[20]]
    assert heldout[3].chosen.read() == table[23].chosen.read()
    shared = overlap(train, heldout)
    assert shared == sum(prompt in train.prompts for prompt in heldout.prompts)
    with pytest.raises(DataError, match=r"1 of the 2 pairs are trained on as well \(first: .*19"):
        overlap(train, table.part([19, 20]))
