"""A reference that follows the policy: what it becomes, how far it goes, and runs that resume to the bit."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from diffalign.config.schema import Config
from diffalign.models.adapters.lora import add_lora
from diffalign.models.loading.base import load_base
from diffalign.models.loading.family import ModelError
from diffalign.models.loading.modules import UNet
from diffalign.models.policy.moving_reference import Decay, MovingReference, ReferenceSync
from diffalign.training.build import build
from diffalign.training.inspect.dry_run import describe_run
from diffalign.training.processes import make_accelerator
from diffalign.training.run import run_training
from tests.training.test_run import metrics, same, weights

Make = Callable[..., Config]
METHODS = ["lora", "full"]


def network(method: str, base: Path) -> UNet:
    unet = load_base(str(base), vae_and_text=False).unet
    if method == "lora":
        add_lora(unet, rank=2, alpha=4, seed=0)
    else:
        unet.requires_grad_(True)
    return unet


def trained(unet: UNet) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in unet.named_parameters() if p.requires_grad}


def move(unet: UNet, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in unet.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn(p.shape, generator=g))


def of(reference: MovingReference, names: list[str]) -> dict[str, Tensor]:
    """The reference's weights, as they are inside `active()`."""
    with reference.active() as module:
        found = dict(module.named_parameters())
        return {name: found[name].detach().clone() for name in names}


@pytest.mark.parametrize("method", METHODS)
def test_it_is_the_average_or_the_copy_that_it_says(method: str, tiny_sd: Path) -> None:
    unet = network(method, tiny_sd)
    average, every_second = (MovingReference(unet, ReferenceSync(*s)) for s in ((1, 0.25), (2, 1.0)))
    names, start = list(trained(unet)), trained(unet)
    assert same(of(average, names), start)
    expected, seen = start, []
    for seed in range(3):
        move(unet, seed)
        policy = trained(unet)
        seen.append(policy)
        expected = {name: 0.75 * expected[name] + 0.25 * policy[name] for name in names}
        for reference in (average, every_second):
            reference.after_update()
        for name, found in of(average, names).items():
            torch.testing.assert_close(found, expected[name], rtol=1e-5, atol=1e-6)
        assert same(of(every_second, names), start if seed == 0 else seen[1])
        assert same(trained(unet), policy)  # the policy has its own weights back


def test_a_decay_grows_to_its_bound() -> None:
    """DiffusionNFT's two schedules, as its release has them: (flat, uprate, uphold)."""
    first, second = (ReferenceSync(1, decay=Decay(*each)) for each in ((0, 0.001, 0.5), (75, 0.0075, 0.999)))
    assert [1 - first.alpha(i) for i in (0, 1, 250, 500, 900)] == pytest.approx([0, 0.001, 0.25, 0.5, 0.5], abs=1e-15)
    assert [1 - second.alpha(i) for i in (0, 75, 76, 175, 400)] == pytest.approx([0, 0, 0.0075, 0.75, 0.999], abs=1e-15)


@pytest.mark.parametrize("method", METHODS)
def test_a_bound_draws_it_back_along_a_line(method: str, tiny_sd: Path) -> None:
    unet = network(method, tiny_sd)
    start = trained(unet)
    bound, wide = (MovingReference(unet, ReferenceSync(1, 1.0, most)) for most in (0.005, 1e6))
    move(unet, 1)
    policy = trained(unet)
    for reference in (bound, wide):
        reference.after_update()
    assert same(of(wide, list(start)), policy)

    def flat(weights: dict[str, Tensor]) -> Tensor:
        return torch.cat([w.flatten().double() for w in weights.values()])

    first, gone, kept = flat(start), flat(policy) - flat(start), flat(of(bound, list(start))) - flat(start)
    assert float(kept.norm() / first.norm()) == pytest.approx(0.005, rel=1e-3)
    assert float(torch.nn.functional.cosine_similarity(kept, gone, dim=0)) == pytest.approx(1, abs=1e-5)
    still = MovingReference(network(method, tiny_sd), ReferenceSync(1, 1.0, 0.005))
    still.after_update()
    assert all(bool(w.isfinite().all()) for w in of(still, list(start)).values())


@pytest.mark.parametrize(
    ("method", "alpha", "every", "most"), [("lora", 0.5, 1, None), ("full", 1.0, 2, 0.01)], ids=METHODS
)
def test_two_and_two_steps_are_four_bitwise(
    method: str, alpha: float, every: int, most: float | None, make_config: Make, tiny_sd: Path, tmp_path: Path
) -> None:
    """Killed after the checkpoint of step 2 and resumed, without what came after it; and the reference moves."""
    shared = {
        "tuning.method": method,
        "training.ref_model_sync_steps": every,
        "training.ref_model_mixup_alpha": alpha,
        "training.ref_model_max_distance": most,
        "training.checkpointing_steps": 2,
    }
    whole = make_config(tiny_sd, {**shared, "output_dir": str(tmp_path / "whole")})
    run_training(whole)
    shutil.copytree(tmp_path / "whole", tmp_path / "out")
    shutil.rmtree(tmp_path / "out/checkpoint-4")
    for name in ("pytorch_lora_weights.safetensors", "unet", "manifest.json"):
        gone = tmp_path / "out" / name
        shutil.rmtree(gone) if gone.is_dir() else gone.unlink(missing_ok=True)
    resumed = make_config(tiny_sd, {**shared, "training.resume_from_checkpoint": "latest"})
    run_training(resumed)
    assert same(weights(whole.output_dir), weights(resumed.output_dir))
    lines = metrics(whole.output_dir)
    assert lines == metrics(resumed.output_dir)
    assert lines[0]["loss"] == float(torch.tensor(2.0).log())  # it starts where the policy does, to the bit
    two, four = (
        torch.load(tmp_path / f"whole/checkpoint-{step}/training_state.pt", weights_only=True)["reference"]
        for step in (2, 4)
    )
    assert (two["updates"], four["updates"]) == (2, 4)
    assert any(not torch.equal(a, b) for a, b in zip(two["weights"], four["weights"], strict=True))


def test_held_out_pairs_are_compared_with_its_start(make_config: Make, tiny_sd: Path, tmp_path: Path) -> None:
    """A run whose policy hardly moves, with a reference that follows: the margins are those of a fixed reference."""
    found = []
    for every in (None, 1):
        config = make_config(
            tiny_sd,
            {
                "output_dir": str(tmp_path / str(every)),
                "training.ref_model_sync_steps": every,
                "training.max_train_steps": 1,
                "validation.pairs": 0.5,
                "validation.pairs_every": 1,
            },
        )
        run_training(config)
        found.append(metrics(config.output_dir)[-1])
    assert found[0]["heldout/loss"] == found[1]["heldout/loss"]
    assert found[0]["heldout/margin"] == found[1]["heldout/margin"] != 0.0


def test_the_plan_says_that_it_moves(make_config: Make, tiny_sd: Path) -> None:
    config = make_config(tiny_sd, {"training.ref_model_sync_steps": 16, "training.ref_model_max_distance": 0.005})
    text = describe_run(build(config, make_accelerator(config)))
    assert "reference: a copy of the policy after every 16 updates, at most 0.005 from its start" in text


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"training.ref_model_sync_steps": None, "training.ref_model_mixup_alpha": 0.5},
            "needs training.ref_model_sync",
        ),
        ({"objective": {"name": "mapo"}}, "objective mapo has no reference"),
        ({"source": {"name": "selfplay"}, "objective": {"name": "seppo"}}, "source selfplay chooses the reference"),
        ({"tuning.resume_lora": "/tmp/x"}, "with tuning.resume_lora the policy does not start"),
        (
            {"data.cache_dir": "c", "data.draws_per_pair": 1, "data.cache_reference_errors": True},
            "store results of a fixed reference",
        ),
        (
            {"objective": {"name": "dspo"}, "validation.pairs": 0.1, "validation.pairs_every": 1},
            "needs the reference itself",
        ),
    ],
)
def test_what_cannot_be_is_named(changes: dict[str, object], words: str, make_config: Make, tiny_sd: Path) -> None:
    with pytest.raises(ValueError, match=words):
        make_config(tiny_sd, {"training.ref_model_sync_steps": 1, **changes})


def test_the_reference_of_another_network_is_refused(tiny_sd: Path) -> None:
    sync = ReferenceSync(1)
    state = MovingReference(network("lora", tiny_sd), sync).state_dict()
    with pytest.raises(ModelError, match="of another network"):
        MovingReference(network("full", tiny_sd), sync).load_state_dict(state)
