"""Shared fixtures. Everything runs offline, on one thread, with the same small model folders in all tests."""

from __future__ import annotations

import gc
import json
import os
import random
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="diffalign-tests-")  # nothing is left in the home folder

import numpy as np
import pytest
import torch
from PIL import Image

from diffalign.config.schema import Config, parse_config
from tests.browser import browse, browser, missing  # noqa: F401  (fixtures)
from tests.invariants.pool import Pool

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # Triton kernels run on the CPU; read when triton is imported, so before that

# one, unless asked for more: small tensors, for which threads cost more than they give, and tests run side by side
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

ROOT = Path(__file__).parent.parent


def pytest_report_header() -> str:
    """The seed of a shuffled order, with which it can be had again."""
    seed = os.environ.get("DIFFALIGN_TEST_SEED")
    return f"shuffled: DIFFALIGN_TEST_SEED={seed}" if seed else ""


def shuffle(items: list[pytest.Item]) -> None:
    """Puts the tests in an order that DIFFALIGN_TEST_SEED names, the same in every worker: none may need another."""
    if seed := os.environ.get("DIFFALIGN_TEST_SEED"):
        random.Random(seed).shuffle(items)


@pytest.hookimpl(optionalhook=True)  # without xdist there is no such hook
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Tests that share something slow go to one worker, which makes it once, and first; others one by one.

    These are those of several processes (one pool), the notebooks (one kernel, for minutes) and the site (one build).

    (xdist's own groups do not work with the node ids of pytest 9.2.)
    """
    from xdist.scheduler import LoadScopeScheduling

    groups = {name: name for name in ("processes", "test_notebooks", "test_site")}
    groups["test_sharding"] = "processes"  # it has the pool too, and tests whose names do not say so

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return next((group for part, group in groups.items() if part in nodeid), nodeid)

    return Scheduling(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Shuffles if asked to, and skips what needs CUDA or a browser where there is none."""
    shuffle(items)
    why = {"gpu": None if torch.cuda.is_available() else "needs a CUDA device", "browser": missing()}
    for item in items:
        for reason in (reason for marker, reason in why.items() if reason and marker in item.keywords):
            item.add_marker(pytest.mark.skip(reason=reason))


class _Frozen:
    """Leaves what stays for the whole session out of Python's search for garbage: modules and collected tests.

    They are more than half a million objects, and each full search takes a third of a second. What a test makes is
    made afterwards, and searched as ever.
    """

    def __init__(self) -> None:
        self.modules = 0

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self) -> None:
        """Before the first test, and again where a test has imported a library."""
        if len(sys.modules) > self.modules + 100:
            self.modules = len(sys.modules)
            gc.collect()
            gc.freeze()


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(_Frozen())


@pytest.fixture(autouse=True)
def _no_server_is_left() -> Iterator[None]:
    """A server whose socket is closed while its thread serves takes a whole core, from all tests after it."""
    yield
    assert [thread.name for thread in threading.enumerate() if "serve_forever" in thread.name] == []


@pytest.fixture(scope="session")
def golden() -> dict:
    """The authors' numbers; tests/golden/README.md says who computed what."""
    return json.loads((ROOT / "tests/golden/pairs.json").read_text())


@pytest.fixture(scope="session")
def tiny_sd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random-weight SD1.5-structured pipeline folder."""
    from tests.tiny import make_tiny

    return Path(make_tiny(tmp_path_factory.mktemp("tiny") / "sd", "sd"))


@pytest.fixture(scope="session")
def tiny_sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random-weight SDXL-structured pipeline folder."""
    from tests.tiny import make_tiny

    return Path(make_tiny(tmp_path_factory.mktemp("tiny") / "sdxl", "sdxl"))


@pytest.fixture(scope="session")
def judge_folder(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Callable[[str], Path]:
    """`judge_folder("sdxl")`: a judge with the random weights of the tiny base of that family."""
    from diffalign.contrib.latent_judge.files import Facts, levels_of, save_judge
    from diffalign.contrib.latent_judge.network import LatentJudge
    from diffalign.models.loading.base import load_base

    made: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in made:
            base = load_base(str(request.getfixturevalue(f"tiny_{family}")))
            assert base.text is not None
            made[family] = tmp_path_factory.mktemp("judge") / family
            judge = LatentJudge(base.unet, base.text.models, guidance=7.5)
            if judge.text_projection is not None:
                torch.nn.init.normal_(judge.text_projection.weight, generator=torch.Generator().manual_seed(1))
            facts = Facts(judge.family, judge.guidance, 2, levels_of(base.schedule))
            save_judge(judge, base.text.tokenizers, facts, made[family])
        return made[family]

    return folder


@pytest.fixture(scope="session")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    """Two processes joined by gloo, for any number of trainings one after another."""
    found = Pool(tmp_path_factory.mktemp("pool"))
    yield found
    found.close()


@pytest.fixture(scope="session")
def pair_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve pairs of noise images with four prompts, in the folder layout."""
    folder = tmp_path_factory.mktemp("pairs")
    rng = np.random.default_rng(0)
    for side in ("chosen", "rejected"):
        (folder / side).mkdir()
        for i in range(12):
            pixels = rng.integers(0, 255, (80, 70, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / side / f"{i:03d}.png")
    for i in range(12):
        (folder / f"{i:03d}.txt").write_text(f"a red circle {i % 4}")
    return folder


@pytest.fixture
def make_config(tmp_path: Path, pair_folder: Path) -> Callable[..., Config]:
    """`make_config(base, {"section.key": value, "objective": {...}})`: a four-step run on a tiny pipeline."""

    def make(base: Path, overrides: dict[str, object] | None = None) -> Config:
        tree: dict[str, dict] = {
            "model": {"pretrained_model_name_or_path": str(base), "gradient_checkpointing": "none"},
            "tuning": {"rank": 4, "alpha": 8},
            "objective": {"name": "dpo", "beta": 500.0},
            "data": {"path": str(pair_folder), "resolution": 32},
            "training": {
                "max_train_steps": 4,
                "train_batch_size": 2,
                "learning_rate": 1e-3,
                "logging_steps": 1,
                "report_to": "none",
                "mixed_precision": "no",  # on every device
            },
        }
        if (overrides or {}).get("tuning.method") == "full":
            tree["tuning"] = {}
        top: dict[str, object] = {"output_dir": str(tmp_path / "out")}
        for name, value in (overrides or {}).items():
            section, _, key = name.partition(".")
            if key:
                tree.setdefault(section, {})[key] = value
            else:
                top[section] = value
        return parse_config({**tree, **top})

    return make
