"""The branching chain: where it branches, on which device it computes, and that each chain is a sample."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from diffalign import NoiseSchedule
from diffalign.sources.branching import (
    Branching,
    Calls,
    Verdict,
    branching_chain,
    branchings,
    chain_levels,
    compare_candidates,
    thresholds_by_noise,
)
from tests.toy import SDXL_CONFIG

SHAPE = (4, 6, 6)


def verdicts(device: str = "cpu", rule: str = "every_step", inner: int = 0, **config: object) -> list[Verdict]:
    """A chain of six steps for three prompts, with a network that answers with half of x."""
    s = NoiseSchedule.from_config({**SDXL_CONFIG, **config})
    levels = chain_levels(s, 6)
    g = torch.Generator().manual_seed(0)

    def noise(i: int, members: int) -> Tensor:
        return torch.randn(members, 3, *SHAPE, generator=g).to(device)

    calls = Calls(
        lambda x, t, rows: 0.5 * x + 0 * t[:, None, None, None] + 0 * rows[:, None, None, None],
        lambda latents, t: torch.rand(latents.shape[:2], generator=g),
        noise,
        lambda i, members: torch.randint(members, (3,), generator=g),
    )
    branching = Branching(levels, branchings(rule, 2, len(levels) - 1, inner), num_candidates=3, eta=1.0, threshold=0.2)
    return list(branching_chain(s, torch.randn(3, *SHAPE, generator=g).to(device), calls, branching))


def test_where_the_rules_branch() -> None:
    assert branchings("every_step", 4, 20, 0) == tuple(range(4, 20))
    assert branchings("inner_steps", 4, 20, 3) == (4, 8, 12, 16)
    assert branchings("inner_steps", 4, 20, 0) == tuple(range(4, 19))  # the last step joins the one before it
    assert branchings("inner_steps", 2, 20, 4) == (2, 7, 12, 17)  # the last verdict is about the three steps left
    assert branchings("inner_steps", 19, 20, 3) == (19,)


@pytest.mark.parametrize(
    "config", [{}, {"steps_offset": 0}, {"timestep_spacing": "trailing"}, {"set_alpha_to_one": True}]
)
def test_every_step_of_a_chain_has_noise(config: dict[str, object]) -> None:
    from diffalign.engine.ddim import variance

    s = NoiseSchedule.from_config({**SDXL_CONFIG, **config})
    levels = chain_levels(s, 20)
    assert int(levels[-1]) == 0
    assert bool((variance(s, levels[:-1], levels[1:]) > 0).all())


def test_thresholds_are_linear_in_the_noise_of_a_step() -> None:
    """Between the σ of LPO's release (a table of 20 steps of SD1.5, to four digits)."""
    s = NoiseSchedule.from_config(SDXL_CONFIG)
    found = thresholds_by_noise(s, chain_levels(s, 20), 1.0, 0.35, 0.5)
    table = {0: 0.6444, 9: 0.4293, 17: 0.1673, 19: 0.0206}
    for step, sigma in table.items():
        expected = 0.35 + 0.15 * (sigma - 0.0206) / (0.6444 - 0.0206)
        assert found[step] == pytest.approx(expected, abs=3e-5)


@pytest.mark.parametrize(("rule", "inner", "lengths"), [("every_step", 0, [1, 1, 1, 1]), ("inner_steps", 1, [2, 2])])
def test_verdicts_follow_each_other_down_the_levels(rule: str, inner: int, lengths: list[int]) -> None:
    found = verdicts(rule=rule, inner=inner)
    assert [len(v.levels) - 1 for v in found] == lengths
    for verdict, following in pairwise(found):
        assert verdict.levels[-1] == following.levels[0] == verdict.t
    assert found[-1].t == 0
    for verdict in found:
        assert torch.equal(verdict.path[0, :, 0], verdict.path[1, :, 0])
        assert not torch.equal(verdict.path[0, :, 1], verdict.path[1, :, 1])
        gap = verdict.scores[0] - verdict.scores[1]
        assert torch.equal(verdict.valid, torch.tanh(gap / 2) > 0.2)


@pytest.mark.parametrize(("rule", "inner"), [("every_step", 0), ("inner_steps", 2)])
def test_a_chain_stays_on_its_device(rule: str, inner: int) -> None:
    """On `meta`, where an operation with a tensor left on the CPU is an error."""
    for verdict in verdicts("meta", rule, inner):
        assert (verdict.path.device.type, verdict.judged.device.type) == ("meta", "meta")
        assert {x.device.type for x in (verdict.levels, verdict.scores, verdict.valid)} == {"cpu"}


def test_ties_are_not_valid() -> None:
    valid = compare_candidates(torch.tensor([[1.0, 2.0], [1.0, 1.0]]), 0.0).valid
    assert valid.tolist() == [False, True]
