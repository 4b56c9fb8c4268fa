"""Groups of graded samples: whose samples, every image with its grade, resumed runs, and refusals."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from diffalign.config.schema import Config, ConfigError
from diffalign.sources import Context, GradedGroups, SourceError, WeightedGroups
from diffalign.training.run import run_training
from tests.sources.test_candidates import FAST, PROMPTS
from tests.training.test_run import metrics, same, weights

JUDGE = "tests.sources.judges:Brightness"
SMALL: dict[str, Any] = {"prompts_per_round": 2, "samples_per_prompt": 3, "steps_per_round": 3, **FAST}


def with_one_network(context: Context, name: str) -> Context:
    """The context with the policy as the network of this name, and no other."""
    networks = context.networks
    shared = {"image_forwards": 0, "gathered": networks.gathered, "schedule": networks.schedule}
    return replace(context, networks=SimpleNamespace(**shared, **{name: networks.policy}))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("cls", "network", "spread"),
    [
        (GradedGroups, "reference", "round"),
        (GradedGroups, "reference", "prompt"),
        (WeightedGroups, "policy", "round"),
    ],
)
def test_every_image_has_the_grade_of_its_score(
    cls: type[GradedGroups], network: str, spread: Any, make_context: Callable[..., Context]
) -> None:
    """graded_groups samples from the reference, its control from the policy; six images, each visited once."""
    context = with_one_network(make_context("sdxl", PROMPTS), network)
    source = cls(JUDGE, spread=spread, clip_advantage=0.5, **SMALL).build(context)
    batches = list(islice(source.batches(), 3))
    assert batches[0].latents.shape == (1, 2, 4, 16, 16)
    ids = [name for batch in batches for name in batch.ids]
    assert len(set(ids)) == 6
    assert len({int(key) for batch in batches for key in batch.keys}) == 6
    places = torch.tensor([int(name.split("/")[-2]) for name in ids])
    scores = torch.cat([batch.scores[0] for batch in batches]).double()
    for i, grade in enumerate(
        torch.cat([b.terms.optimality if cls is GradedGroups else b.terms.weight for b in batches]).tolist()
    ):
        own = scores[places == places[i]]
        std = (scores if spread == "round" else own).std(correction=0)
        a = float((scores[i] - own.mean()) / (std + 1e-4))
        expected = 0.5 + 0.5 * min(max(a / 0.5, -1), 1) if cls is GradedGroups else min(max(a, 0), 0.5)
        assert grade == pytest.approx(expected, rel=1e-5, abs=1e-6)


NFT: dict[str, Any] = {
    "objective": {"name": "diffusion_nft", "beta": 0.5},
    "source": {"name": "graded_groups", "scorer": JUDGE, **SMALL, "prompts_per_round": 1, "steps_per_round": 3},
    "training.ref_model_sync_steps": 3,
    "training.ref_model_decay": {"rate": 0.1},
}


def test_a_resumed_run_is_the_uninterrupted_one(
    make_config: Callable[..., Config], tiny_sdxl: Path, tmp_path: Path
) -> None:
    """With a LoRA, stopped in the middle of the first round, before the old policy moves."""
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    shared = {
        **NFT,
        "tuning.method": "lora",
        "data.path": str(tmp_path / "prompts.txt"),
        "training.checkpointing_steps": 2,
        "training.learning_rate": 1e-4,
    }
    run_training(make_config(tiny_sdxl, {**shared, "output_dir": str(tmp_path / "whole")}))
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut/checkpoint-4")
    for rest in ("unet", "pytorch_lora_weights.safetensors", "manifest.json", "source/rounds/round-00001"):
        gone = tmp_path / "cut" / rest
        shutil.rmtree(gone) if gone.is_dir() else gone.unlink(missing_ok=True)
    again = {"output_dir": str(tmp_path / "cut"), "training.resume_from_checkpoint": "latest"}
    run_training(make_config(tiny_sdxl, {**shared, **again}))
    assert same(weights(tmp_path / "cut"), weights(tmp_path / "whole"))
    lines = metrics(tmp_path / "whole")
    assert lines == metrics(tmp_path / "cut")
    assert [line["moved"] > 0 for line in lines] == [False, True, True, True]  # η = .3 at step 3: not a copy
    assert lines[0]["rollout/pairs"] == 3.0


def test_images_without_a_visit_are_refused(make_context: Callable[..., Context]) -> None:
    settings = GradedGroups(JUDGE, **{**SMALL, "steps_per_round": 2})
    words = r"2 steps of 2 images visit fewer than the 6 images of a round \(2 prompts × 3\); give at least 3"
    with pytest.raises(SourceError, match=words):
        settings.build(make_context("sd", PROMPTS))


def test_configs_are_checked(make_config: Callable[..., Config], tiny_sd: Path) -> None:
    def fault(**changes: Any) -> str:
        with pytest.raises(ConfigError) as caught:
            make_config(tiny_sd, {**NFT, **changes})
        return str(caught.value)

    assert "source.steps_per_round = 3 and training.ref_model_sync_steps = 2" in fault(
        **{"training.ref_model_sync_steps": 2}
    )
    assert "ref_model_decay: needs training.ref_model_sync_steps" in fault(**{"training.ref_model_sync_steps": None})
    assert "ref_model_mixup_alpha and ref_model_decay both say" in fault(**{"training.ref_model_mixup_alpha": 0.5})
    of_pairs = {"source": None, "training.ref_model_sync_steps": None, "training.ref_model_decay": None}
    assert "diffusion_nft needs the optimality of each image, which stored pairs do not have" in fault(**of_pairs)
    of_dpo = fault(objective={"name": "dpo"})
    assert "generates graded images for objective diffusion_nft only, and objective dpo compares images" in of_dpo
    weighted = {**NFT["source"], "name": "weighted_groups"}
    assert "generates chosen images for objective sft only" in fault(source=weighted)
    pairs = {**NFT["source"], "name": "online_pairs"}
    del pairs["steps_per_round"]
    assert "online_pairs generates images for objectives of pairs, and objective diffusion_nft" in fault(source=pairs)
    assert "with source.steps_per_round = 3 the reference" in fault(**{"training.mixed_precision": "fp16"})
    assert "clip_advantage = 0.0: must be" in fault(source={**NFT["source"], "clip_advantage": 0.0})
    with pytest.raises(ValueError, match="spread = 'group'; allowed: round, prompt"):
        GradedGroups(JUDGE, spread="group")  # type: ignore[arg-type]
