"""Records move to a device without copying twice what both sides share."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch

from diffalign.data.loader.loaded import Loaded  # noqa: F401 - a record
from diffalign.errors import DiffalignError
from diffalign.sources.rounds import Records  # noqa: F401 - a record
from diffalign.types import Conditioning, Probe, Record, Terms, Transitions, cat, sides_share
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


def records() -> list[type[Record]]:
    """Every record class of the package."""
    found, left = [], [Record]
    while left:
        found += (new := [cls for cls in left.pop().__subclasses__() if cls.__module__.startswith("diffalign.")])
        left += new
    return found


@pytest.mark.parametrize("cls", records(), ids=lambda cls: cls.__name__)
def test_every_tensor_of_a_record_declares_its_axes_in_the_one_order(cls: type[Record]) -> None:
    order = ["side", "pair", "[point]"]
    tensors = [f for f in fields(cls) if "Tensor" in str(f.type)]
    assert tensors
    for declared in tensors:
        names = [name for name in declared.metadata["axes"] if name in order]
        assert names == sorted(names, key=order.index), declared.name
        assert "pair" in names, declared.name


def test_batches_are_joined_along_their_pairs() -> None:
    """Whatever is cut off is put back: nested records, tuples, and views that the sides share."""
    whole = replace(
        toy_batch(5),
        ids=tuple("abcde"),
        terms=Terms(weight=torch.arange(5.0), mask=torch.rand(5, 6, 6)),
        reference=torch.rand(2, 5),
    )
    parts = [whole.select(pair=slice(0, 2)), whole.select(pair=slice(2, 3)), whole.select(pair=slice(3, 5))]
    joined = cat(parts)
    assert joined.ids == whole.ids
    assert torch.equal(joined.keys, whole.keys)
    for got, expected in zip(joined.tensors(), whole.tensors(), strict=True):
        assert torch.equal(got, expected)
        assert sides_share(got) == sides_share(expected)
    assert cat(parts[:1]) is parts[0]


def test_a_field_that_only_some_batches_have_is_refused() -> None:
    one, other = toy_batch(1), replace(toy_batch(1), terms=Terms(weight=torch.ones(1)))
    with pytest.raises(DiffalignError, match=r"Terms\.weight is set in 1 of 2 batches; set it in all or in none"):
        cat([one, other])


def test_points_are_selected_where_there_are_some() -> None:
    cond = Conditioning(torch.rand(2, 3, 5, 6))
    xt, t = torch.rand(2, 3, 4, 1, 2, 2), torch.arange(12).view(3, 4)
    probe = Probe(xt, t, 2 * xt, cond, weight=torch.rand(3, 4), terms=Terms(mask=torch.rand(3, 2, 2)))
    part = probe.select(point=slice(1, 3))
    assert torch.equal(part.xt, xt[:, :, 1:3])
    assert torch.equal(part.t, t[:, 1:3])
    assert part.weight is not None
    assert part.weight.shape == (3, 2)
    assert torch.equal(part.cond.prompt_embeds, cond.prompt_embeds)
    without = Probe(xt[:, :, 0], t[:, 0], xt[:, :, 0], cond).select(point=slice(1, 3))
    assert torch.equal(without.xt, xt[:, :, 0])


def test_stored_tensors_have_the_pair_axis_first() -> None:
    batch = replace(toy_batch(3), uncond=None, terms=Terms(weight=torch.arange(3.0)))
    stored = batch.pair_first()
    assert {name: len(x) for name, x in stored.items()} == dict.fromkeys(stored, 3)
    assert torch.equal(stored["clean"], batch.transitions.clean.transpose(0, 1))  # type: ignore[union-attr]
    assert torch.equal(stored["weight"], torch.arange(3.0))


def test_pinned_copies_keep_what_the_sides_share(monkeypatch: pytest.MonkeyPatch) -> None:
    """A loader pins what its workers read; a copy of both sides would be asked for twice by every network."""
    pinned: list[int] = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: pinned.append(x.numel()) or x.clone())
    batch = toy_batch(3)
    copy = batch.pin_memory()
    assert pinned == [x[:1].numel() if sides_share(x) else x.numel() for x in batch.tensors()]
    assert [sides_share(x) for x in copy.tensors()] == [sides_share(x) for x in batch.tensors()]
    assert copy.ids == batch.ids
