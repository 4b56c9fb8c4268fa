"""Losses against numbers computed by the authors' own code (tests/golden/README.md)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from diffalign.objectives import DiffusionDPO, MaPO
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


def test_mapo(golden: dict) -> None:
    for case in golden["mapo"]["cases"]:
        objective = MaPO(beta=case["beta"], snr=case["snr"], num_train_timesteps=case["num_train_timesteps"])
        score = objective.score(Evidence(both(case)))
        assert float(score.loss.mean()) == pytest.approx(case["loss"], abs=1e-4)
        # the authors' `ratio_losses` is β log σ(·), our metric the bare −log σ(·)
        assert (-case["beta"] * score.metrics["loss/margin"]).tolist() == pytest.approx(case["ratio_losses"], abs=1e-4)
