"""Safeguard, DMPO and DSPO against numbers of the released codes: losses, logits and gradients in the predictions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from diffalign.engine.measure import measure
from diffalign.objectives import DMPO, DSPO, DiffusionDPO
from diffalign.objectives.base import Objective
from diffalign.objectives.modified import modified
from diffalign.types import Conditioning, Probe, Score
from tests.toy import toy_models

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "sdpo.json").read_text())


def seen_at(case: dict[str, Any], objective: Any) -> tuple[Score, torch.Tensor]:
    """The score of the case's predictions, and the gradient of the mean loss in those of the policy."""
    policy, reference, target = (
        torch.tensor(case[name], dtype=torch.float64).unflatten(0, (2, -1))
        for name in ("policy", "reference", "target")
    )
    policy.requires_grad_()
    models = toy_models()
    models.policy = lambda xt, t, cond: policy.flatten(0, 1)  # type: ignore[method-assign]
    models.reference = lambda xt, t, cond: reference.flatten(0, 1)  # type: ignore[method-assign]
    pairs = policy.shape[1]
    probe = Probe(
        xt=torch.zeros_like(target),
        t=torch.zeros(pairs, dtype=torch.int64),
        target=target,
        cond=Conditioning(torch.zeros(2, pairs, 1, 1)),
        needs_distance=objective.needs_distance,
        needs_alignment=objective.needs_alignment,
    )
    score = objective.score(measure(models, probe))
    (slope,) = torch.autograd.grad(score.loss.mean(), policy)
    return score, slope.flatten(0, 1)


@pytest.mark.parametrize("case", GOLDEN["dspo"], ids=lambda case: f"beta {case['beta']}")
def test_dspo(case: dict[str, Any]) -> None:
    score, slope = seen_at(case, DSPO(beta=case["beta"]))
    assert float(score.loss.mean().detach()) == pytest.approx(case["loss"], rel=1e-9)
    assert score.logit is not None
    assert score.logit.tolist() == pytest.approx(case["inside"], rel=1e-9)
    torch.testing.assert_close(slope, torch.tensor(case["grad"], dtype=torch.float64), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("case", GOLDEN["sdpo"], ids=lambda case: f"{case['method']} mu {case['mu']}")
def test_safeguard_and_dmpo(case: dict[str, Any]) -> None:
    objective: Objective = {
        "diffusion-dpo": DiffusionDPO(beta=case["beta"]),
        "dmpo": DMPO(beta=case["beta"], alpha=case["alpha"]),
        "dspo": DSPO(beta=case["beta"]),
    }[case["method"]]
    score, slope = seen_at(case, modified(objective, safeguard_mu=case["mu"]))
    assert float(score.loss.mean().detach()) == pytest.approx(case["loss"], rel=1e-9)
    assert score.logit is not None
    assert score.logit.tolist() == pytest.approx(case["inside"], rel=1e-9)
    guarded = case["scale"] < 1
    assert float(score.metrics.get("safeguard", torch.ones(1))) == pytest.approx(case["scale"], rel=1e-7)
    rtol = 1e-7 if guarded else 1e-9  # the release adds 1e-9 to the product that it divides by
    torch.testing.assert_close(slope, torch.tensor(case["grad"], dtype=torch.float64), rtol=rtol, atol=1e-12)
