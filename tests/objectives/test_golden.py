"""Losses against numbers computed by the authors' own code (tests/golden/README.md)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from diffalign.objectives import DiffusionDPO, LinearDPO, MaPO
from diffalign.types import Evidence


def mean_error(case: dict, prediction: str, target: str) -> Tensor:
    a, b = (torch.tensor(case[name], dtype=torch.float64) for name in (prediction, target))
    return ((a - b) ** 2).mean((1, 2, 3))


def both(case: dict, prefix: str = "") -> Tensor:
    return torch.stack(
        [
            mean_error(case, f"{prefix}chosen_pred", "chosen_target"),
            mean_error(case, f"{prefix}rejected_pred", "rejected_target"),
        ]
    )


def test_diffusion_dpo(golden: dict) -> None:
    for case in golden["diffusion_dpo"]["cases"]:
        score = DiffusionDPO(beta=case["beta"]).score(Evidence(both(case), both(case, "ref_")))
        assert float(score.loss.mean()) == pytest.approx(case["loss"], abs=1e-9)
        assert score.logit.tolist() == pytest.approx(case["inside"], abs=1e-9)
        assert float(score.metrics["rewards/accuracies"].mean()) == case["implicit_accuracy"]


def test_linear_dpo(golden: dict) -> None:
    """Losses, and gradients in the predictions; the release's loss is the mean over the pairs."""
    for case in golden["linear_dpo"]["cases"]:
        answer, target = (
            torch.tensor([case[f"chosen_{what}"], case[f"rejected_{what}"]], dtype=torch.float64)
            for what in ("pred", "target")
        )
        answer.requires_grad_()
        policy = (answer - target).square().mean((2, 3, 4))
        score = LinearDPO(beta=case["beta"], eta=case["eta"]).score(Evidence(policy, both(case, "ref_")))
        loss = score.loss.mean()
        (slope,) = torch.autograd.grad(loss, answer)
        assert float(loss.detach()) == pytest.approx(case["loss"], rel=1e-9)
        assert score.logit.tolist() == pytest.approx(case["inside"], rel=1e-9)
        expected = torch.tensor([case["chosen_grad"], case["rejected_grad"]], dtype=torch.float64)
        torch.testing.assert_close(slope, expected, rtol=1e-9, atol=1e-15)
        assert float(score.metrics["rewards/accuracies"].mean()) == pytest.approx(case["implicit_accuracy"], abs=1e-7)


def test_mapo(golden: dict) -> None:
    for case in golden["mapo"]["cases"]:
        objective = MaPO(beta=case["beta"], snr=case["snr"], num_train_timesteps=case["num_train_timesteps"])
        score = objective.score(Evidence(both(case)))
        assert float(score.loss.mean()) == pytest.approx(case["loss"], abs=1e-4)
        # the authors' `ratio_losses` is β log σ(·), our metric the bare −log σ(·)
        assert (-case["beta"] * score.metrics["loss/margin"]).tolist() == pytest.approx(case["ratio_losses"], abs=1e-4)
