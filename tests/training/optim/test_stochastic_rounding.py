"""Stochastic rounding: unbiased, exact where possible, and AdamW where nothing is rounded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from diffalign.config.schema import Config, ConfigError
from diffalign.training.optim.stochastic_rounding import StochasticAdamW, round_stochastically
from diffalign.training.run import run_training
from tests.training.test_run import metrics, same, weights


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_a_value_goes_to_its_neighbours_and_is_kept_in_the_mean() -> None:
    """1.001 lies 0.128 of the way from 1 to the next bfloat16, 1 + 2^-7."""
    n, share = 200_000, 0.001 * 2**7
    for sign in (1.0, -1.0):
        rounded = round_stochastically(torch.full((n,), sign * 1.001), seeded()).float() * sign
        assert set(rounded.unique().tolist()) == {1.0, 1.0 + 2**-7}
        up = float((rounded > 1).float().mean())
        assert up == pytest.approx(share, abs=5 * (share * (1 - share) / n) ** 0.5)


def test_what_bfloat16_has_stays() -> None:
    x = torch.randn(1000, generator=seeded()).bfloat16().float()
    special = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), float("nan")])
    assert torch.equal(round_stochastically(x), x.bfloat16())
    assert torch.equal(round_stochastically(special)[:4], special[:4].bfloat16())
    assert round_stochastically(special)[4].isnan()


def test_without_bfloat16_it_is_torchs_adamw() -> None:
    start = torch.randn(50, generator=seeded())
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    settings = {"lr": 1e-3, "betas": (0.8, 0.99), "eps": 1e-7, "weight_decay": 0.1}
    optimizers = StochasticAdamW([ours], **settings), torch.optim.AdamW([theirs], **settings, foreach=False)
    for step in range(5):
        for p, optimizer in zip((ours, theirs), optimizers, strict=True):
            p.grad = torch.randn(50, generator=seeded(step))
            optimizer.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-8)


def test_updates_far_below_the_resolution_arrive() -> None:
    """Weights of size 0.02, 100 steps of 1e-8: rounded to nearest nothing moves, stochastically nearly all of it."""
    start = 0.02 * torch.randn(1_000_000, generator=seeded()).bfloat16()
    realised = {}
    for name in ("stochastic", "nearest"):
        p = torch.nn.Parameter(start.clone())
        make = StochasticAdamW if name == "stochastic" else torch.optim.AdamW
        optimizer = make([p], lr=1e-8, weight_decay=0.0)
        for _ in range(100):
            p.grad = torch.ones_like(p)
            optimizer.step()
        realised[name] = float((p.detach().double() - start.double()).mean()) / (-1e-8 * 100)
    assert realised["stochastic"] == pytest.approx(1.0, abs=0.05)
    assert abs(realised["nearest"]) < 0.02


def test_the_rounding_follows_from_seed_and_step() -> None:
    def run(seed: int, stop: int | None = None) -> torch.Tensor:
        p = torch.nn.Parameter(torch.ones(500, dtype=torch.bfloat16))
        optimizer = StochasticAdamW([p], lr=1e-3, seed=seed)
        for step in range(4):
            if step == stop:
                state, p = optimizer.state_dict(), torch.nn.Parameter(p.detach().clone())
                optimizer = StochasticAdamW([p], lr=1e-3, seed=seed)
                optimizer.load_state_dict(state)
                assert optimizer.state[p]["exp_avg"].dtype == torch.float32
            torch.rand(step)  # the global generator has no part in it
            p.grad = torch.randn(500, generator=seeded(step)).bfloat16()
            optimizer.step()
        return p.detach()

    whole = run(7)
    assert torch.equal(run(7), whole)
    assert torch.equal(run(7, stop=2), whole)
    assert not torch.equal(run(8), whole)


@pytest.mark.parametrize(("steps", "least", "most"), [(32, 0.99, 1.01), (256, 0.9, 1.1), (2048, 0.12, 0.25)])
def test_what_accumulating_in_bfloat16_keeps_of_equal_gradients(steps: int, least: float, most: float) -> None:
    """The known loss that docs/training.md names: a sum 256 times its summand does not grow any more."""
    part = (torch.randn(10_000, generator=seeded()) / steps).bfloat16()
    p = torch.nn.Parameter(torch.zeros(10_000, dtype=torch.bfloat16))
    for _ in range(steps):
        (p * part).sum().backward()
    kept = p.grad.double() / (steps * part.double())
    assert least < float(kept.mean()) < most


@pytest.mark.parametrize("optimizer", ["adamw_bf16", "adamw_8bit_bf16"])
def test_a_run_starts_at_log_2_moves_and_resumes_bitwise(
    optimizer: str, make_config: Callable[..., Config], tiny_sdxl: Path, tmp_path: Path
) -> None:
    shared = {
        "output_dir": str(tmp_path / "run"),
        "tuning.method": "full",
        "training.optimizer": optimizer,
        "training.mixed_precision": "bf16",
        "training.learning_rate": 1e-5,
        "training.checkpointing_steps": 2,
        "training.checkpoints_total_limit": 1,
    }
    run_training(make_config(tiny_sdxl, shared))
    whole, lines = weights(tmp_path / "run"), metrics(tmp_path / "run")
    assert lines[0]["loss"] == float(torch.tensor(2.0).log())
    assert lines[0]["displacement"] == 0.0
    assert lines[-1]["rewards/margins"] != 0.0
    assert {x.dtype for name, x in whole.items() if x.ndim > 1} == {torch.bfloat16}
    run_training(make_config(tiny_sdxl, {**shared, "training.max_train_steps": 2, "overwrite_output_dir": True}))
    run_training(make_config(tiny_sdxl, {**shared, "training.resume_from_checkpoint": "latest"}))
    assert same(weights(tmp_path / "run"), whole)


@pytest.mark.parametrize("optimizer", ["adamw_bf16", "adamw_8bit_bf16"])
@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"tuning.method": "lora"}, " is for tuning.method: full"),
        ({"training.mixed_precision": "no"}, "set mixed_precision: bf16"),
        ({"training.ema_decay": 0.99}, "an average in bfloat16 would not change"),
    ],
)
def test_what_it_does_not_go_with(
    optimizer: str, change: dict[str, object], match: str, make_config: Callable[..., Config], tmp_path: Path
) -> None:
    settings = {"tuning.method": "full", "training.optimizer": optimizer, "training.mixed_precision": "bf16"}
    with pytest.raises(ConfigError, match=match):
        make_config(tmp_path, {**settings, **change})
