"""Round files: written ones are read in one order; cut-off and foreign files are refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from diffalign.data.sampler import Processes
from diffalign.sources.base import SourceError
from diffalign.sources.rounds import About, Place, Round, join, round_folder, rounds_there, shares, write_share
from diffalign.types import Transitions
from tests.sources.toy import made

ABOUT = About(round=3, policy_version=40, key="k")


def places(*numbers: int) -> list[Place]:
    return [Place(number, number % 7, f"id {number}", "text") for number in numbers]


def test_shares_are_read_as_one_round_in_order(tmp_path: Path) -> None:
    write_share(tmp_path, made(places(8, 2), pairs=2), ABOUT, Processes(0, 3))
    write_share(tmp_path, None, ABOUT, Processes(1, 3))
    assert shares(tmp_path, 3) == []  # not all there yet
    write_share(tmp_path, made(places(5)), ABOUT, Processes(2, 3))
    found = Round(tmp_path, ABOUT)
    assert [(int(pair.place), int(pair.index)) for pair in map(found.__getitem__, range(len(found)))] == [
        (2, 0),
        (2, 1),
        (5, 0),
        (8, 0),
        (8, 1),
    ]
    assert float(found[1].latents[1, 0, 0, 0, 0]) == 21.0
    assert rounds_there(tmp_path) == [3]


def test_transitions_travel_with_shared_sides_stored_once(tmp_path: Path) -> None:
    records = made(places(1, 2))
    noisy, clean = torch.randn(1, 2, 5, 1, 2, 2), torch.randn(2, 2, 5, 1, 2, 2)
    t = torch.arange(10).view(2, 5)
    file = write_share(
        tmp_path, replace(records, transitions=Transitions(noisy, clean, t, t - 1)), ABOUT, Processes(0, 1)
    )
    moves = Round(tmp_path, ABOUT)[1].transitions
    assert moves.noisy.shape == (1, 1, 5, 1, 2, 2)
    assert torch.equal(moves.clean, clean[:, 1:])
    assert moves.t.tolist() == [[5, 6, 7, 8, 9]]
    with safe_open(file, "pt") as opened:
        assert torch.equal(opened.get_tensor("clean"), clean.transpose(0, 1))


def test_the_header_says_where_pairs_come_from(tmp_path: Path) -> None:
    file = write_share(tmp_path, made(places(1)), ABOUT, Processes(0, 1))
    with safe_open(file, "pt") as opened:
        header = opened.metadata()
    assert len(header.pop("sha256")) == 64
    assert header == {"format": "1", "round": "3", "policy_version": "40", "key": "k", "pairs": "1"}


def test_faults_are_named(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="round 3 are not in"):
        Round(tmp_path, ABOUT)
    file = write_share(tmp_path, made(places(1)), ABOUT, Processes(0, 1))
    with pytest.raises(SourceError, match="policy_version 40, and 41 is needed"):
        Round(tmp_path, replace(ABOUT, policy_version=41))
    write_share(tmp_path, made(places(1)), ABOUT, Processes(0, 2))
    write_share(tmp_path, made(places(1)), ABOUT, Processes(1, 2))
    with pytest.raises(SourceError, match="two producers"):
        Round(tmp_path, ABOUT)
    file.unlink()
    with pytest.raises(SourceError, match="one place and index"):
        Round(tmp_path, ABOUT)
    (round_folder(tmp_path, 3) / "share-00000-of-00002.safetensors").write_bytes(b"torn")
    with pytest.raises(SourceError, match=r"round 3 is damaged.*share-00000-of-00002.*no readable header.*from a copy"):
        Round(tmp_path, ABOUT)


def test_join() -> None:
    assert join([]) is None
    both = join([made(places(1)), made(places(2, 3))])
    assert both.place.tolist() == [1, 2, 3]
    assert both.transitions is None
