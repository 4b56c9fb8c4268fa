"""Tuned weights by their id on the Hub: what is fetched, from a stand-in, and that every use takes such an id."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import save_file

from diffalign.cli.main import main
from diffalign.config.schema import Config
from diffalign.export.card.write import write_run_card
from diffalign.export.names import ExportError
from diffalign.models import hub
from diffalign.models.adapters.lora import LORA_FILE
from diffalign.models.adapters.merge import merge_tuned
from diffalign.models.adapters.save_load import find_tuned, load_pipeline, load_tuned
from diffalign.models.loading.base import load_base
from diffalign.models.loading.family import ModelError
from diffalign.models.spec import ModelSpec
from diffalign.training.build import build
from diffalign.training.processes import make_accelerator
from tests.models.adapters.test_merge import write_full, write_lora
from tests.models.conftest import Model, picture
from tests.models.loading.test_base import same_weights, single_file_state
from tests.tolerance import assert_same_picture

STEM = "diffusion_pytorch_model"


@dataclass
class StandIn:
    """Repositories in a folder, and a cache that gets the files that were asked for and no others."""

    folder: Path
    cache: Path
    asked: list[tuple[str, str | None]] = field(default_factory=list)

    def snapshot_download(self, repository: str, revision: str | None, allow_patterns: Sequence[str]) -> str:
        self.asked.append((repository, revision))
        place = self.cache / f"models--{repository.replace('/', '--')}/snapshots/abc123"
        place.mkdir(parents=True, exist_ok=True)
        for file in self.list_repo_files(repository):
            if any(fnmatch(file, pattern) for pattern in allow_patterns):
                (place / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(self.folder / repository / file, place / file)
        return str(place)

    def list_repo_files(self, repository: str, revision: str | None = None) -> list[str]:
        root = self.folder / repository
        if not root.is_dir():
            raise OSError("404")
        return sorted(file.relative_to(root).as_posix() for file in root.rglob("*") if file.is_file())

    def fetched(self, repository: str) -> list[str]:
        root = self.cache / f"models--{repository.replace('/', '--')}/snapshots/abc123"
        return sorted(file.relative_to(root).as_posix() for file in root.rglob("*") if file.is_file())


@pytest.fixture(scope="module")
def repositories(models: dict[str, Model], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The layouts of released weights, with files beside them that are not needed."""
    folder = tmp_path_factory.mktemp("repositories")
    full = Path(write_full(models["sd"], folder / "full", 1)) / "unet"
    lora = Path(write_lora(models["sd"], folder / "lora", seed=1, rank=4, alpha=4)) / LORA_FILE
    shutil.copytree(full, folder / "org/root")
    shutil.copytree(full, folder / "org/pipeline/unet")
    shutil.copytree(full, folder / "org/several/a/unet")
    shutil.copytree(full, folder / "org/several/b")
    shutil.copytree(full, folder / "org/variant/unet")
    (folder / f"org/variant/unet/{STEM}.safetensors").rename(folder / f"org/variant/unet/{STEM}.fp16.safetensors")
    for name in ("unet/extra.safetensors", f"unet/{STEM}.bin", f"unet/{STEM}.fp16.safetensors", "vae/config.json"):
        (folder / "org/pipeline" / name).parent.mkdir(exist_ok=True)
        (folder / "org/pipeline" / name).write_bytes(b"\0")
    for repository, name in (("org/lora", LORA_FILE), ("org/named", "style.safetensors"), ("org/both", LORA_FILE)):
        (folder / repository).mkdir()
        shutil.copyfile(lora, folder / repository / name)
    shutil.copytree(full, folder / "org/both/unet")
    (folder / "org/pickled").mkdir()
    (folder / "org/pickled/unet.pth").write_bytes(b"\x80\x02")
    return folder


@pytest.fixture
def stand_in(repositories: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StandIn:
    made = StandIn(repositories, tmp_path / "cache")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", made.snapshot_download)
    monkeypatch.setattr(huggingface_hub, "list_repo_files", made.list_repo_files)
    hub._fetched.cache_clear()
    return made


@pytest.mark.parametrize(
    ("name", "place", "fetched"),
    [
        ("org/root", ".", ["config.json", f"{STEM}.safetensors"]),
        ("org/pipeline", "unet", ["unet/config.json", f"unet/{STEM}.safetensors"]),
        ("org/pipeline::unet", "unet", ["unet/config.json", f"unet/{STEM}.safetensors"]),
        ("org/several::a", "a/unet", ["a/unet/config.json", f"a/unet/{STEM}.safetensors"]),
        ("org/several::b/", "b", ["b/config.json", f"b/{STEM}.safetensors"]),
        ("org/variant", "unet", ["unet/config.json", f"unet/{STEM}.fp16.safetensors"]),
        ("org/lora", LORA_FILE, [LORA_FILE]),
        ("org/named::style.safetensors", "style.safetensors", ["style.safetensors"]),
    ],
)
def test_what_is_found_and_fetched(stand_in: StandIn, models, name: str, place: str, fetched: list[str]) -> None:
    found = find_tuned(name)
    repository = name.partition("::")[0]
    assert found.path == stand_in.cache / f"models--org--{repository[4:]}/snapshots/abc123" / place
    assert stand_in.fetched(repository) == fetched
    load_tuned(copy.deepcopy(models["sd"].base.unet), name)
    asked = len(stand_in.asked)
    assert find_tuned(name) == found
    assert len(stand_in.asked) == asked  # once in a process


def test_a_revision_and_a_path_of_the_same_name(
    stand_in: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert find_tuned("org/root@v2").kind == "unet"
    assert stand_in.asked == [("org/root", "v2"), ("org/root", "abc123")]  # the weights of the configs' commit
    shutil.copytree(stand_in.folder / "org/lora", tmp_path / "here/org/lora")
    monkeypatch.chdir(tmp_path / "here")
    assert find_tuned("org/lora").path == Path("org/lora") / LORA_FILE


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("org/several", r"neither the config.json of a UNet.*its files of weights are a/unet/.*, b/diff.*OWNER/NAME::"),
        ("org/named", r"its files of weights are style.safetensors"),
        ("org/both", r"several tuned models: name one of org/both::unet, org/both::pytorch_lora_weights.safetensors"),
        ("org/named::other.safetensors", r"has no other.safetensors"),
        ("org/pickled", r"unet.pth.*`diffalign convert` reads pickles"),
        ("org/pickled::unet.pth", r"unet.pth.*pickle"),
        ("org/root::", r"ends in '::'"),
        (
            "org/absent",
            r"'org/absent' is not a path on this machine, and it is not in the local cache.*`hf download org/absent`",
        ),
        ("no/such/path", r"no such path"),
    ],
)
def test_what_is_not_there(stand_in: StandIn, name: str, why: str) -> None:
    with pytest.raises(ModelError, match=why):
        find_tuned(name)


def test_every_use_takes_an_id(stand_in: StandIn, models, make_config: Callable[..., Config], tmp_path: Path) -> None:
    base = models["sd"].folder
    local = picture(load_pipeline(str(base), tuned=str(stand_in.folder / "org/root")))
    assert_same_picture(picture(load_pipeline(str(base), tuned="org/root")), local)
    merge_tuned(models["sd"].base, [("org/lora", 0.5), ("org/named::style.safetensors", 0.5)], tmp_path / "merged")
    for name, settings in (
        ("reference", {"tuning.reference": "org/lora"}),
        ("resumed", {"tuning.resume_lora": "org/named::style.safetensors"}),
        ("full", {"tuning.method": "full", "tuning.reference": "org/pipeline"}),
    ):
        config = make_config(base, {**settings, "output_dir": str(tmp_path / name)})
        run = build(config, make_accelerator(config))
        tuned = copy.deepcopy(models["sd"].base.unet)
        load_tuned(tuned, str(stand_in.folder / ("org/root" if name == "full" else "org/lora")))
        mine, theirs = run.unet.state_dict(), tuned.state_dict()
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(value, theirs[key]) for key, value in mine.items())
    options = ["--prompts", "a red circle", "--steps", "1", "--device", "cpu"]
    main(["generate", str(base), "--tuned", "org/several::a", *options, "--out", str(tmp_path / "images")])
    export = ["--to", "kohya", "--base", str(base), "--out", str(tmp_path / "mine.safetensors")]
    main(["export", "org/lora", *export])
    assert (tmp_path / "mine.safetensors").is_file()
    with pytest.raises(ExportError, match="org/lora is on the Hub, with a card of its own"):
        write_run_card("org/lora", base=str(base))


def test_a_base_in_a_folder_or_a_file_of_a_repository(stand_in: StandIn, models) -> None:
    shutil.copytree(models["sd"].folder, stand_in.folder / "org/bases/small")
    base = load_base("org/bases::small")
    assert same_weights(base.unet, models["sd"].base.unet)
    save_file(single_file_state(models["sd"].base), stand_in.folder / "org/bases/one.safetensors")
    spec = ModelSpec("org/bases::one.safetensors", single_file_config=str(models["sd"].folder), revision="v1")
    assert same_weights(load_base(spec, vae_and_text=False).unet, models["sd"].base.unet)
    assert stand_in.asked[-1] == ("org/bases", "v1")
    with pytest.raises(ModelError, match=r"has no two\.safetensors"):
        load_base("org/bases::two.safetensors")
