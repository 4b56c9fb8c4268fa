"""Records move to a device without copying twice what both sides share."""

from __future__ import annotations

from dataclasses import replace

import torch

from diffalign.types import Conditioning, Transitions
from tests.toy import toy_batch


def test_shared_sides_stay_shared_on_the_way_to_a_device() -> None:
    embeds = torch.randn(1, 3, 5, 6).expand(2, -1, -1, -1)
    own = torch.randn(2, 3, 6)
    moved = Conditioning(embeds, time_ids=own).to("meta")
    assert moved.prompt_embeds.shape == (2, 3, 5, 6)
    assert moved.prompt_embeds.untyped_storage().nbytes() == embeds[0].numel() * 4
    assert moved.time_ids is not None
    assert moved.time_ids.untyped_storage().nbytes() == own.numel() * 4


def test_what_is_looked_at_stays_on_the_cpu() -> None:
    moved = toy_batch(3).to("meta")
    assert moved.latents.is_meta
    assert moved.cond.prompt_embeds.is_meta
    assert moved.uncond is not None
    assert moved.uncond.prompt_embeds.is_meta
    assert not moved.keys.is_meta
    assert moved.scores is not None
    assert not moved.scores.is_meta


def test_select_and_flatten_are_side_major() -> None:
    cond = Conditioning(torch.arange(12.0).view(2, 3, 2, 1), pooled=torch.arange(6.0).view(2, 3, 1))
    assert cond.select(side=slice(1, 2), pair=slice(2, 3)).pooled.flatten().tolist() == [5.0]
    assert cond.flatten().pooled.flatten().tolist() == [0, 1, 2, 3, 4, 5]
    assert cond.flatten().prompt_embeds.shape == (6, 2, 1)
    assert cond.flatten().distinct_prompts is None


def test_prompts_that_sides_share_come_along_once() -> None:
    """Row i of the flat batch has prompt i mod pairs; a choice of rows, or two batches in one, say nothing of that."""
    prompts = torch.arange(6.0).view(3, 2, 1)
    cond = Conditioning(prompts.expand(2, -1, -1, -1))
    flat = cond.flatten()
    assert flat.distinct_prompts is not None
    assert torch.equal(flat.distinct_prompts, prompts)
    assert torch.equal(flat.prompt_embeds, flat.distinct_prompts.repeat(2, 1, 1))
    assert flat.map(lambda x: x[1:]).distinct_prompts is None
    assert flat.followed_by(flat).distinct_prompts is None
    assert Conditioning(prompts.expand(2, -1, -1, -1)).select(side=slice(0, 1)).flatten().distinct_prompts is None


def test_transitions_follow_their_pairs() -> None:
    start = torch.randn(1, 3, 4, 2, 2).expand(2, -1, -1, -1, -1)
    moves = Transitions(start, torch.randn(2, 3, 4, 2, 2), torch.tensor([9, 5, 1]), torch.tensor([5, 1, -1]))
    batch = replace(toy_batch(3), transitions=moves)
    one = batch.select(pair=slice(1, 2)).transitions
    assert one is not None
    assert (one.t.tolist(), one.t_prev.tolist()) == ([5], [1])
    assert torch.equal(one.clean, moves.clean[:, 1:2])
    moved = batch.to("meta").transitions
    assert moved is not None
    assert moved.noisy.untyped_storage().nbytes() == start[0].numel() * 4
    assert not moved.t.is_meta
