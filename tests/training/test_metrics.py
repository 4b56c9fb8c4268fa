"""The metrics of a run: means over pairs for any batches, quarters of the timestep range, the file of a resumed run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from diffalign.objectives import SFT, DiffusionDPO
from diffalign.training.metrics import JsonLines, Meter, observe
from diffalign.types import Evidence


def test_means_are_over_entries_not_over_batches() -> None:
    meter = Meter()
    meter.add({"loss": torch.tensor([1.0, 2.0, 3.0])})
    meter.add({"loss": torch.tensor([10.0]), "seen_once": torch.tensor([5.0])})
    assert meter.means() == {"loss": 4.0, "seen_once": 5.0}
    assert meter.means() == {}


def test_means_over_processes_weigh_by_count() -> None:
    meter = Meter()
    meter.add({"loss": torch.tensor([1.0, 3.0])})
    other = {"loss": (10.0, 1), "only_there": (6.0, 2)}
    assert meter.means(lambda own: [*own, other]) == {"loss": 14 / 3, "only_there": 3.0}


def test_observed_values_by_hand() -> None:
    evidence = Evidence(
        policy=torch.tensor([[0.4, 0.6, 0.9], [0.5, 0.5, 0.2]]),
        reference=torch.tensor([[0.5, 0.5, 0.5], [0.5, 0.5, 0.5]]),
        t=torch.tensor([0, 249, 999]),
    )
    values = observe(evidence, DiffusionDPO(beta=20.0).score(evidence), timesteps=1000)
    assert values["displacement"].tolist() == [0, 1, 1]
    assert values["implicit_acc"].tolist() == [1, 0, 0]
    assert values["error/policy/q1"].tolist() == pytest.approx([0.4, 0.6, 0.5, 0.5])
    assert values["error/policy/q4"].tolist() == pytest.approx([0.9, 0.2])
    assert values["error/reference/q4"].tolist() == pytest.approx([0.5, 0.5])
    assert "error/policy/q2" not in values
    assert values["rewards/chosen"].tolist() == pytest.approx([1.0, -1.0, -4.0])


def test_observed_without_reference_or_logit() -> None:
    evidence = Evidence(policy=torch.tensor([[0.4, 0.6]]), t=torch.tensor([0, 600]))
    values = observe(evidence, SFT().score(evidence), timesteps=1000)
    assert set(values) == {"loss", "error/policy/q1", "error/policy/q3"}


def test_points_count_each(tmp_path: Path) -> None:
    evidence = Evidence(policy=torch.ones(2, 1, 3), t=torch.tensor([[0, 10, 900]]))
    values = observe(evidence, SFT().score(Evidence(torch.ones(1, 1))), timesteps=1000)
    assert values["error/policy/q1"].numel() == 4
    assert values["error/policy/q4"].numel() == 2


def test_a_resumed_run_continues_its_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = JsonLines(path, from_step=0)
    for step in (1, 2, 3):
        lines.write(step, {"loss": float(step)})
    JsonLines(path, from_step=2).write(3, {"loss": 30.0})
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 1, "loss": 1.0},
        {"step": 2, "loss": 2.0},
        {"step": 3, "loss": 30.0},
    ]


def test_margins_by_hand() -> None:
    meter = Meter()
    meter.add_margins(torch.tensor([0.0, 0.1, -0.13, 0.3, 4.1, -99.0, float("inf"), float("nan")]))
    meter.add_margins(torch.tensor([[0.0], [4.0]]))
    meter.add_margins(None)
    counts = meter.margins()
    assert {place - 16: n for place, n in enumerate(counts) if n} == {-16: 1, -1: 1, 0: 3, 1: 1, 16: 3}
    assert meter.margins() == []


def test_margins_over_processes_are_added() -> None:
    meter = Meter()
    meter.add_margins(torch.tensor([0.0]))
    assert meter.margins(lambda own: [*own, [1] * 33])[15:18] == [1, 2, 1]
    assert meter.margins(lambda own: [*own, [1] * 33]) == [1] * 33  # no pair with a logit here
