"""The entries of the arena: which take part, and that they differ in the method alone."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from diffalign.arena import entries as module
from diffalign.arena.entries import (
    BATCH,
    FULL,
    LIST_IMAGES,
    PREFERENCES,
    QUICK,
    SWEEP,
    Entry,
    at_equal_forwards,
    config_of,
    entries,
    tuned_settings,
)
from diffalign.arena.jobs import placed
from diffalign.config.schema import ConfigError, parse_config
from diffalign.objectives import OBJECTIVES, DiffusionDPO
from diffalign.world import pairs_path
from diffalign.world.captions import prompts

ALL = entries()


def config(entry: Entry, preference: str = "world", tuned: dict[str, Any] | None = None) -> dict[str, Any]:
    return config_of(entry, FULL, preference, 7, pairs_path(), tuned or {})


def test_every_objective_takes_part_and_no_name_twice() -> None:
    names = [entry.name for entry in ALL]
    assert OBJECTIVES.keys() <= set(names)
    assert len(names) == len(set(names))
    assert {entry.name for entry in ALL if entry.control} == {"shuffled", "flipped"}


@pytest.mark.parametrize("entry", ALL, ids=lambda entry: entry.name)
def test_base_pairs_and_budget_are_the_same_for_all(entry: Entry, tmp_path: Path) -> None:
    tree = config(entry)
    training = tree["training"]
    assert tree["seed"] == 7
    assert tree["data"]["path"] == str(pairs_path())
    assert tree["model"]["pretrained_model_name_or_path"].endswith("world/base")
    assert tree["tuning"]["method"] == "full"
    batch = 2 * BATCH // LIST_IMAGES if entry.name == "listwise_dpo" else BATCH  # as many images
    assert (training["max_train_steps"], training["train_batch_size"]) == (FULL.steps, batch)
    assert training["gradient_accumulation_steps"] == 1
    assert training["learning_rate"] == 1e-5
    assert (training["optimizer"], training["mixed_precision"]) == ("adamw", "no")
    assert parse_config(placed(tree, tmp_path)).resolved()["objective"] == tree["objective"]


@pytest.mark.parametrize("entry", ALL, ids=lambda entry: entry.name)
def test_an_entry_is_the_objective_of_its_name(entry: Entry) -> None:
    name = config(entry)["objective"]["name"]
    by_source = {
        "spin": "seppo",
        "raft": "sft",
        "advantage": "sft",
        "lpo": "spo",
        "online_dpo": "dpo",
        "shuffled": "dpo",
        "flipped": "dpo",
    }
    assert name == by_source.get(entry.name, entry.name)


def test_online_methods_are_judged_by_the_preference() -> None:
    judged = 0
    for entry in ALL:
        for preference in PREFERENCES:
            source = config(entry, preference)["source"]
            if entry.own_judge:
                assert source["scorer"] == "world-latent-judge"
            elif source is not None and "scorer" in source:
                judged += 1
                assert source["scorer"] == preference
    assert judged == 10  # spo, raft, online_dpo, diffusion_nft and advantage under two preferences


def test_what_the_sweep_chose_replaces_the_config() -> None:
    tree = config(ALL[0], tuned={"training.learning_rate": 2e-5, "objective.beta": 500.0})
    assert tree["training"]["learning_rate"] == 2e-5
    assert tree["objective"]["beta"] == 500.0


def test_a_new_objective_has_a_line_without_a_config(monkeypatch: pytest.MonkeyPatch) -> None:
    class Mine(DiffusionDPO):
        name = "mine"

    monkeypatch.setitem(OBJECTIVES, "mine", Mine)
    (entry,) = entries(("mine",))
    tree = config(entry)
    assert tree["objective"] == {"name": "mine", "beta": Mine().beta, "timesteps": None}


def test_an_unknown_entry_is_named() -> None:
    with pytest.raises(ValueError, match=r"no entry is called dpoo; there are: dpo, "):
        entries(("dpoo",))


def test_a_config_that_trains_no_policy_is_refused() -> None:
    with pytest.raises(ConfigError, match="trains no policy"):
        config(Entry("judge", "world/step_aware.yaml"))


def test_equal_forwards_is_dpos_cost() -> None:
    assert replace(FULL, steps=10).unet_forwards == 10 * BATCH * 2 * 2
    tree = config(next(entry for entry in ALL if entry.name == "inversion_dpo"))
    assert tree["data"]["cache_trajectories"]
    limited = at_equal_forwards(tree, 5000)
    assert limited["training"]["max_unet_forwards"] == 5000
    assert not limited["data"]["cache_trajectories"]  # trajectories of pairs that are never reached would be charged
    assert tree["training"]["max_unet_forwards"] is None


def test_the_sweep_chose_on_other_prompts_than_those_reported() -> None:
    assert not set(prompts(SWEEP.split)) & set(prompts(FULL.split))
    assert FULL.split == QUICK.split
    assert len(prompts(FULL.split)) * FULL.pictures >= 256
    assert len(FULL.seeds) >= 3


def test_every_trial_of_the_sweep_trained() -> None:
    """A loss without a slope gains 0 (forward_kl once did, 7e-5), and says nothing of its setting."""
    entries = json.loads(Path(module.packaged_asset(module.TUNED)).read_text())["entries"]
    still = [(name, t["settings"]) for name, e in entries.items() for t in e["trials"] if abs(t["gain"]) < 5e-4]
    assert not still


def test_a_missing_sweep_says_what_writes_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(module, "TUNED", str(tmp_path / "tuned.json"))
    with pytest.raises(FileNotFoundError, match="diffalign arena --sweep"):
        tuned_settings()
