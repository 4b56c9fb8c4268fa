"""Randomness belongs to the pair."""

from __future__ import annotations

import pytest
import torch

from diffalign.engine.random import integers, normal, pair_key, uniform


def keys(n: int, seed: int = 0, draw: int = 0) -> torch.Tensor:
    return torch.tensor([pair_key(seed, f"pair {i}", draw) for i in range(n)])


def test_a_key_is_the_same_on_every_machine_and_version() -> None:
    assert pair_key(0, "pair", 0) == 5997196222791850917
    assert len({pair_key(s, p, d) for s in range(5) for p in "abcde" for d in range(5)}) == 125


def test_draws_do_not_depend_on_the_batch() -> None:
    together = keys(8)
    for draw in (
        lambda k: normal(k, "noise", (4, 3, 3)),
        lambda k: uniform(k, "flip"),
        lambda k: integers(k, "t", 0, 1000),
    ):
        whole = draw(together)
        assert torch.equal(whole, torch.cat([draw(together[i : i + 1]) for i in range(8)]))
        assert torch.equal(whole.flip(0), draw(together.flip(0)))


def test_draws_leave_the_global_generator_alone() -> None:
    state = torch.get_rng_state()
    normal(keys(2), "noise", (3,))
    assert torch.equal(state, torch.get_rng_state())


def test_streams_and_visits_are_independent() -> None:
    n = 4000
    columns = torch.stack(
        [uniform(keys(n), "a"), uniform(keys(n), "b"), uniform(keys(n, draw=1), "a"), uniform(keys(n, seed=1), "a")]
    )
    correlation = torch.corrcoef(columns) - torch.eye(4)
    assert float(correlation.abs().max()) < 4 / n**0.5


def test_distributions() -> None:
    n = 20000
    t = integers(keys(n), "t", 0, 1000).double()
    assert float(t.min()) >= 0
    assert float(t.max()) <= 999
    assert float(t.mean()) == pytest.approx(499.5, abs=4 * 288.7 / n**0.5)
    z = normal(keys(2000), "noise", (10,))
    assert float(z.mean()) == pytest.approx(0, abs=4 / n**0.5)
    assert float(z.var()) == pytest.approx(1, abs=4 * (2 / n) ** 0.5)


def test_wrong_keys_are_refused() -> None:
    for bad in (torch.tensor([1.0]), torch.tensor(1), torch.tensor([], dtype=torch.int64)):
        with pytest.raises(ValueError, match="pair keys"):
            uniform(bad, "t")
