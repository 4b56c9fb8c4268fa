"""Held-out pairs: which pairs of a table a run does not train on, chosen by prompt.

Images of one prompt resemble each other, so a prompt is on one side only. The choice depends on the seed and the
texts of the prompts, and not on the order of the rows.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence

from diffalign.data.row import DataError
from diffalign.data.table.pairs import PairTable
from diffalign.data.table.prompts import Table

LEAST_PROMPTS = 2  # of the held-out pairs: one prompt alone gives no interval


def prompt_key(prompt: str) -> str:
    """What prompts that differ in case or white space alone have in common."""
    return " ".join(prompt.split()).casefold()


def split_by_prompt(
    prompts: Sequence[str], share: float, seed: int, limit: int | None = None, setting: str = "validation.pairs"
) -> tuple[list[int], list[int]]:
    """Indices of the pairs to train on and of the held-out ones, each ascending.

    At most `share` of all are held out, and at most `limit`. Prompts are taken in the order of a hash of seed and text,
    those that would exceed these left out. setting: of the share, for messages.
    Raises DataError where fewer than LEAST_PROMPTS prompts fit the share.
    """
    groups: defaultdict[str, list[int]] = defaultdict(list)
    for index, prompt in enumerate(prompts):
        groups[prompt_key(prompt)].append(index)
    wanted = max(round(share * len(prompts)), 1)
    if limit is not None:
        wanted = min(wanted, limit)
    heldout: list[int] = []
    taken = 0
    for key in sorted(groups, key=lambda key: hashlib.blake2b(f"{seed}\x1f{key}".encode()).digest()):
        if len(heldout) + len(groups[key]) <= wanted:
            heldout += groups[key]
            taken += 1
    if taken < LEAST_PROMPTS or taken == len(groups):
        of_limit = "" if limit is None else f" (validation.max_pairs: {limit})"
        sizes = sorted(len(group) for group in groups.values())
        raise DataError(
            f"{setting}: a share of {share:g} is {wanted} of {len(prompts)} pairs{of_limit}; these have "
            f"{len(groups)} prompts, each with {sizes[0]} to {sizes[-1]} pairs, and at least {LEAST_PROMPTS} prompts "
            "must be held out and one trained on. Give another share, or the path of other pairs"
        )
    chosen = set(heldout)
    return [index for index in range(len(prompts)) if index not in chosen], sorted(heldout)


def overlap(train: Table, heldout: PairTable) -> int:
    """How many held-out pairs have a prompt that is trained on.

    Raises DataError, naming the first, for held-out pairs that are trained on themselves.
    """
    trained, prompts = set(zip(train.ids, train.prompts, strict=True)), set(map(prompt_key, train.prompts))
    both = [i for i, pair in enumerate(zip(heldout.ids, heldout.prompts, strict=True)) if pair in trained]
    if both:
        raise DataError(
            f"validation.pairs: {len(both)} of the {len(heldout)} pairs are trained on as well (first: "
            f"{heldout.where(both[0])}), so they are not held out; remove them from one of the two, or give "
            "validation.pairs a share of the training pairs, e.g. 0.1"
        )
    return sum(prompt_key(prompt) in prompts for prompt in heldout.prompts)
