"""A reference with tuned weights: the policy starts at exactly log 2, and what is saved is relative to the base."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from diffalign.config.schema import Config, ConfigError
from diffalign.export.kohya import export_kohya
from diffalign.export.single_file import export_single_file
from diffalign.models.adapters.lora import add_lora, lora_parameters
from diffalign.models.adapters.merge import merge_into, merge_tuned
from diffalign.models.adapters.save_load import load_tuned, save_tuned
from diffalign.models.loading.base import load_base
from diffalign.models.loading.family import ModelError
from diffalign.models.policy.networks import Networks
from diffalign.models.spec import ModelSpec
from diffalign.training.build import build
from diffalign.training.inspect.dry_run import describe_run
from diffalign.training.processes import make_accelerator
from diffalign.training.run import run_training

METHODS = ["lora", "full"]
Make = Callable[..., Config]


def move(parameters, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in parameters:
            p.add_(0.05 * torch.randn(p.shape, generator=generator))


@pytest.fixture(scope="module")
def soups(tiny_sdxl: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Averages of two LoRA files and of two UNets, and each of the LoRA files padded to the soup's rank."""
    folder = tmp_path_factory.mktemp("soups")
    for seed in range(2):
        base = load_base(str(tiny_sdxl), vae_and_text=False)
        move(base.unet.parameters(), seed)
        save_tuned(base.unet, folder / f"full{seed}", base.family)
        base = load_base(str(tiny_sdxl), vae_and_text=False)
        add_lora(base.unet, rank=2, alpha=4, seed=seed)
        move(lora_parameters(base.unet), seed)
        (folder / f"lora{seed}").mkdir()
        save_tuned(base.unet, folder / f"lora{seed}", base.family)
    for kind in METHODS:
        for name, shares in (("soup", (0.5, 0.5)), ("first", (1.0, 0.0))):
            base = load_base(str(tiny_sdxl), vae_and_text=False)
            parts = [(str(folder / f"{kind}{seed}"), share) for seed, share in enumerate(shares)]
            merge_tuned(base, parts, folder / f"{kind}-{name}")
    return {path.name: str(path) for path in folder.iterdir()}


def losses(config: Config) -> list[float]:
    lines = (Path(config.output_dir) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def weights(folder: str) -> dict[str, torch.Tensor]:
    (file,) = [p for p in Path(folder).rglob("*.safetensors") if "checkpoint" not in str(p)]
    return load_file(file)


@pytest.mark.parametrize("method", METHODS)
def test_the_first_loss_is_log_2_and_the_saved_weights_are_the_bases(
    make_config: Make, tiny_sdxl: Path, soups: dict[str, str], method: str
) -> None:
    config = make_config(
        tiny_sdxl, {"tuning.method": method, "tuning.reference": soups[f"{method}-soup"], "training.max_train_steps": 2}
    )
    run_training(config)
    first, second = losses(config)
    assert first == float(torch.tensor(2.0).log())
    assert abs(second - first) > 1e-5
    start, tuned, base = (load_base(str(tiny_sdxl), vae_and_text=False).unet for _ in range(3))
    merge_into(start, [(soups[f"{method}-soup"], 1.0)])
    merge_into(tuned, [(config.output_dir, 1.0)])  # on the base as it came: this is how it will be used

    def far(one, two) -> float:
        return (
            sum(float((p - q).square().sum()) for p, q in zip(one.parameters(), two.parameters(), strict=True)) ** 0.5
        )

    assert 0 < far(tuned, start) < 0.5 * far(start, base)


@pytest.mark.parametrize("method", METHODS)
def test_the_reference_answers_as_the_tuned_weights_do(
    make_config: Make, tiny_sdxl: Path, soups: dict[str, str], method: str
) -> None:
    config = make_config(tiny_sdxl, {"tuning.method": method, "tuning.reference": soups[f"{method}-soup"]})
    run = build(config, make_accelerator(config))
    assert run.reference_kind == {"lora": "other_lora", "full": "copy"}[method]
    assert f"of {soups[f'{method}-soup']}" in describe_run(run)
    batch = next(run.source.batches(0))
    point = (batch.latents[0], torch.tensor([17, 801]), batch.cond.map(lambda x: x[0]))
    alone = load_base(str(tiny_sdxl), vae_and_text=False)
    load_tuned(alone.unet, soups[f"{method}-soup"])
    expected = Networks(alone.unet, family=alone.family, schedule=alone.schedule).policy(*point).detach()
    policy, reference = run.networks.policy(*point).detach(), run.networks.reference(*point)
    assert torch.equal(policy, reference)
    torch.testing.assert_close(reference, expected, rtol=1e-5, atol=1e-5)
    move(run.parameters, 7)
    assert torch.equal(run.networks.reference(*point), reference)  # it stays where it is
    assert not torch.equal(run.networks.policy(*point).detach(), policy)


def test_a_kohya_lora_is_a_start_a_reference_and_part_of_a_base(
    make_config: Make, tiny_sdxl: Path, soups: dict[str, str], tmp_path: Path
) -> None:
    """The same as the file in diffusers' layout, to the bit; and, in a single file, a base for a new adapter."""
    kohya = export_kohya(soups["lora0"], tmp_path / "kohya.safetensors", base=str(tiny_sdxl))
    for key in ("resume_lora", "reference"):
        answers = []
        for path in (soups["lora0"], str(kohya)):
            run = build(config := make_config(tiny_sdxl, {f"tuning.{key}": path}), make_accelerator(config))
            batch = next(run.source.batches(0))
            point = (batch.latents[0], torch.tensor([17, 801]), batch.cond.map(lambda x: x[0]))
            answers.append((run.networks.policy(*point).detach(), run.networks.reference(*point)))
        (policy, reference), theirs = answers
        assert torch.equal(policy, theirs[0])
        assert torch.equal(reference, theirs[1])
        assert torch.equal(policy, reference) == (key == "reference")
    parts = [(str(kohya), 0.8), (soups["lora1"], 0.5)]
    merge_tuned(load_base(str(tiny_sdxl), vae_and_text=False), parts, tmp_path / "both")
    file = export_single_file(tmp_path / "both", tmp_path / "start.safetensors", base=str(tiny_sdxl), dtype="fp32")
    start = load_base(ModelSpec(str(file), single_file_config=str(tiny_sdxl)), vae_and_text=False).unet
    expected = load_base(str(tiny_sdxl), vae_and_text=False).unet
    merge_into(expected, parts)
    for name, value in start.state_dict().items():
        torch.testing.assert_close(value, expected.state_dict()[name], rtol=1e-6, atol=1e-7)


def test_a_policy_may_start_elsewhere(make_config: Make, tiny_sdxl: Path, soups: dict[str, str]) -> None:
    """SALSA's form: the reference is the soup, the policy one of what it was made of."""
    overrides = {"tuning.reference": soups["lora-soup"], "tuning.resume_lora": soups["lora-first"]}
    run = build(config := make_config(tiny_sdxl, overrides), make_accelerator(config))
    batch = next(run.source.batches(0))
    point = (batch.latents[0], torch.tensor([17, 801]), batch.cond.map(lambda x: x[0]))
    for path, found in (
        (soups["lora-first"], run.networks.policy(*point).detach()),
        (soups["lora-soup"], run.networks.reference(*point)),
    ):
        alone = load_base(str(tiny_sdxl), vae_and_text=False)
        load_tuned(alone.unet, path)
        expected = Networks(alone.unet, family=alone.family, schedule=alone.schedule).policy(*point).detach()
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    overrides["tuning.resume_lora"] = soups["lora0"]  # rank 2, and the soup's is 4
    with pytest.raises(ModelError, match=r"r = 4, this run's adapter 2"):
        build(config := make_config(tiny_sdxl, overrides), make_accelerator(config))


@pytest.mark.parametrize("method", METHODS)
def test_a_resumed_run_keeps_its_reference(
    make_config: Make, tiny_sdxl: Path, soups: dict[str, str], method: str, tmp_path: Path
) -> None:
    shared = {
        "tuning.method": method,
        "tuning.reference": soups[f"{method}-soup"],
        "training.checkpointing_steps": 1,
        "training.max_train_steps": 3,
    }
    whole = make_config(tiny_sdxl, shared)
    run_training(whole)
    other = {**shared, "output_dir": str(tmp_path / "parts")}
    run_training(make_config(tiny_sdxl, {**other, "training.max_train_steps": 1}))
    run_training(resumed := make_config(tiny_sdxl, {**other, "training.resume_from_checkpoint": "latest"}))
    one, two = weights(whole.output_dir), weights(resumed.output_dir)
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_what_cannot_be_a_reference_is_refused(make_config: Make, tiny_sdxl: Path, soups: dict[str, str]) -> None:
    with pytest.raises(ModelError, match=r"tuning.reference: .* is a full UNet"):
        build(config := make_config(tiny_sdxl, {"tuning.reference": soups["full-soup"]}), make_accelerator(config))
    with pytest.raises(ConfigError, match=r"tuning.reference: objective sft has no reference"):
        make_config(tiny_sdxl, {"tuning.reference": "x", "objective": {"name": "sft"}})
    source = {"name": "selfplay"}
    with pytest.raises(ConfigError, match=r"tuning.reference: source selfplay chooses the reference itself"):
        make_config(tiny_sdxl, {"tuning.reference": "x", "objective": {"name": "seppo"}, "source": source})
    kept = {"data.cache_dir": "c", "data.cache_trajectories": True, "objective": {"name": "inversion_dpo"}}
    with pytest.raises(ConfigError, match=r"tuning.reference: data.cache_trajectories"):
        make_config(tiny_sdxl, {"tuning.reference": "x", **kept})
