"""The calls of a step, counted instead of timed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from diffalign.config.schema import Config, ConfigError
from diffalign.training.build import Run, build
from diffalign.training.metrics import Meter
from diffalign.training.processes import make_accelerator
from diffalign.training.step import optimizer_step

MakeConfig = Callable[..., Config]


class Calls:
    """Counts the forwards of modules by name."""

    def __init__(self, **modules: nn.Module) -> None:
        self.count = dict.fromkeys(modules, 0)
        for name, module in modules.items():
            module.register_forward_hook(lambda *_, name=name: self._add(name))

    def _add(self, name: str) -> None:
        self.count[name] += 1


def built(config: Config) -> Run:
    return build(config, make_accelerator(config))


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_cached_step_is_one_policy_and_one_reference_forward(
    method: str, make_config: MakeConfig, tiny_sdxl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffalign.models.loading.encoder import Encoder

    run = built(make_config(tiny_sdxl, {"tuning.method": method, "data.cache_dir": str(tmp_path / "cache")}))
    assert run.base.vae is None
    assert run.base.text is None

    def called(*_: object) -> None:
        raise AssertionError("an encoder was called inside the step")

    monkeypatch.setattr(Encoder, "moments", called)
    monkeypatch.setattr(Encoder, "prompts", called)
    reference = run.networks._reference
    with reference.active() as module:
        frozen = module
    modules = {"policy": run.unet} if frozen is run.unet else {"policy": run.unet, "reference": frozen}
    calls = Calls(**modules)
    batches = run.source.batches()
    optimizer_step(run, batches, Meter())
    if method == "lora":
        assert frozen is run.unet  # one network serves both: no second copy
        assert calls.count == {"policy": 2}
    else:
        assert calls.count == {"policy": 1, "reference": 1}
    assert run.networks.reference_forwards == 1


def test_lora_trains_and_keeps_only_its_own_weights(make_config: MakeConfig, tiny_sdxl: Path) -> None:
    run = built(make_config(tiny_sdxl))
    frozen = {n: p.clone() for n, p in run.unet.named_parameters() if not p.requires_grad}
    optimizer_step(run, run.source.batches(), Meter())
    assert sum(p.numel() for p in run.parameters) < 0.1 * sum(p.numel() for p in run.unet.parameters())
    held = {id(p) for group in run.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for n, p in run.unet.named_parameters() if "lora_" in n}
    for name, p in run.unet.named_parameters():
        if name in frozen:
            assert torch.equal(p, frozen[name])
            assert p.grad is None


@pytest.mark.parametrize("name", ["mapo", "sft"])
def test_objectives_without_a_reference_have_none(name: str, make_config: MakeConfig, tiny_sdxl: Path) -> None:
    run = built(make_config(tiny_sdxl, {"objective": {"name": name}, "tuning.method": "full"}))
    calls = Calls(policy=run.unet)
    optimizer_step(run, run.source.batches(), Meter())
    assert run.reference_kind == "none"
    assert calls.count == {"policy": 1}


def test_online_step_encodes_each_image_once_and_each_prompt_once(make_config: MakeConfig, tiny_sdxl: Path) -> None:
    run = built(make_config(tiny_sdxl))
    encoded: list[int] = []
    run.base.vae.encoder.register_forward_pre_hook(lambda _, args: encoded.append(len(args[0])))
    texts = Calls(text=run.base.text.models[0])
    batches = run.source.batches()
    for _ in range(6):  # one epoch of twelve pairs, four prompts
        optimizer_step(run, batches, Meter())
    assert sum(encoded) == 24
    assert texts.count["text"] <= 4


def test_cached_and_online_runs_are_the_same_run(make_config: MakeConfig, tiny_sdxl: Path, tmp_path: Path) -> None:
    from diffalign.training.run import run_training
    from tests.training.test_run import weights

    runs = []
    for cache in (None, str(tmp_path / "cache")):
        config = make_config(
            tiny_sdxl,
            {
                "output_dir": str(tmp_path / f"out-{cache is None}"),
                "data.cache_dir": cache,
                "data.center_crop": False,
                "data.random_flip": True,
                "data.cache_variants": 1 if cache is None else 2,
                "data.proportion_empty_prompts": 0.3,
                "training.max_train_steps": 8,  # into the second epoch, and so into the second variant
                "training.learning_rate": 1e-5,
            },
        )
        run_training(config)
        runs.append(weights(config.output_dir))
    for name in runs[0]:
        # moments are encoded in batches of another size there: equal up to the rounding of convolutions
        torch.testing.assert_close(runs[0][name], runs[1][name], rtol=0, atol=2e-5)


def test_kept_trajectories_leave_no_inversion_in_the_step(
    make_config: MakeConfig, tiny_sdxl: Path, tmp_path: Path
) -> None:
    """The first run inverts every pair once; neither its steps nor another run of another seed does so again."""
    settings = {
        "objective": {"name": "inversion_dpo", "steps": 3, "substeps": 2, "points_per_step": 2, "guidance": 2.0},
        "data.cache_dir": str(tmp_path / "cache"),
        "data.cache_trajectories": True,
        "tuning.method": "full",
    }
    counts = []
    for seed in (0, 1):
        run = built(make_config(tiny_sdxl, {**settings, "seed": seed, "output_dir": str(tmp_path / str(seed))}))
        before = run.networks.reference_forwards
        batches = run.source.batches()
        for _ in range(3):
            optimizer_step(run, batches, Meter())
        counts.append((before, run.networks.reference_forwards - before))
    inversion = 3 * 2 * 6  # steps x substeps x batches of two of the twelve pairs
    assert counts == [(inversion, 3 * 2), (0, 3 * 2)]  # two points a step, one forward each


def test_trajectories_that_cannot_be_kept_are_refused(make_config: MakeConfig, tiny_sdxl: Path) -> None:
    kept = {"data.cache_trajectories": True, "data.cache_dir": "cache"}
    recordable = {"name": "inversion_dpo"}
    for settings, message in (
        (kept, "dpo with these settings inverts with the trained network"),
        ({**kept, "objective": {**recordable, "trajectory": "policy"}}, "only trajectories of a frozen reference"),
        ({**kept, "objective": recordable, "data.cache_dir": None}, r"needs data\.cache_dir"),
        ({**kept, "objective": recordable, "data.proportion_empty_prompts": 0.1}, "depends on its prompt"),
    ):
        with pytest.raises(ConfigError, match=message):
            make_config(tiny_sdxl, settings)
