"""A Hub id that cannot be read: offline, gated or missing, each with the command that helps."""

from __future__ import annotations

from pathlib import Path

import pytest

from diffalign.io.hub import is_hub_id, why_not_fetched
from diffalign.models.loading.base import load_base
from diffalign.models.loading.family import ModelError


def error_named(name: str) -> Exception:
    return type(name, (OSError,), {})("from afar")


@pytest.mark.parametrize("name", ["stabilityai/stable-diffusion-xl-base-1.0", "org/model", "org/v1.5"])
def test_offline_is_said_with_the_command_that_fetches_it(name: str) -> None:
    with pytest.raises(ModelError) as error:
        load_base(name)
    said = str(error.value)
    assert repr(name) in said
    assert "this machine is offline (HF_HUB_OFFLINE=1" in said
    assert f"`hf download {name}`" in said
    assert "does not exist" not in said


def test_other_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    for key in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(key, raising=False)
    assert "hf auth login" in why_not_fetched("a/b", error_named("GatedRepoError"))
    assert "no public model of this name" in why_not_fetched("a/b", error_named("RepositoryNotFoundError"))
    assert "check model.revision" in why_not_fetched("a/b", error_named("RevisionNotFoundError"))
    assert "cannot be reached from here" in why_not_fetched("a/b", error_named("ConnectionError"))
    wrapped = OSError("outer")
    wrapped.__cause__ = error_named("LocalEntryNotFoundError")
    assert "--repo-type dataset" in why_not_fetched("a/b", wrapped, "dataset")
    assert "from afar" in why_not_fetched("a/b", error_named("Other"))


def test_what_may_be_an_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    assert is_hub_id("org/model-1.0")
    assert not any(map(is_hub_id, ("runs/dpo", "./a", "/a/b", "~/a", "a", "a/b/c", "a/b c", "../b")))
