"""Settings that make a step faster: each has its effect, and the losses stay."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import diffalign.models.kernels.compile as compiling
import diffalign.training.run as module
from diffalign.config.schema import Config, ConfigError
from diffalign.engine import random as draws
from diffalign.models.kernels.checkpointing import memory_format
from diffalign.training.run import run_training
from tests.training.test_run import metrics, weights

MakeConfig = Callable[..., Config]


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The runs built from now on."""
    built: list[Any] = []
    build = module.build
    monkeypatch.setattr(module, "build", lambda *a: built.append(build(*a)) or built[-1])
    return built


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Blocks are traced and run as they are; one entry for each graph."""
    graphs: list[int] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(len(graph.graph.nodes))
        return graph.forward

    limit = torch._dynamo.config.recompile_limit
    torch._dynamo.reset()
    monkeypatch.setattr(compiling, "BACKEND", backend)
    yield graphs
    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = limit


def close(a: list[dict[str, float]], b: list[dict[str, float]]) -> None:
    """The same metrics, to the rounding of a difference of errors times beta / 2 = 250 (see test_run).

    But for shares of pairs: at equal weights a difference that is not exactly 0 falls to one side or the other.
    """
    shares = {"implicit_acc", "rewards/accuracies", "displacement"}
    for lines in zip(a, b, strict=True):
        x, y = ({name: value for name, value in line.items() if name not in shares} for line in lines)
        assert x == pytest.approx(y, rel=1e-3, abs=2e-4)


def test_gradient_checkpointing_takes_names_and_switches(make_config: MakeConfig, tmp_path: Path) -> None:
    for given, meant in ((True, "full"), (False, "none"), ("selective", "selective"), ("full", "full")):
        config = make_config(tmp_path, {"model.gradient_checkpointing": given})
        assert config.model.gradient_checkpointing == meant
    with pytest.raises(ConfigError, match=r"model\.gradient_checkpointing.*'selective'"):
        make_config(tmp_path, {"model.gradient_checkpointing": "some"})
    with pytest.raises(ConfigError, match=r"model\.compile: a compiled block already"):
        make_config(tmp_path, {"model.gradient_checkpointing": "selective", "model.compile": True})


@pytest.mark.parametrize("change", [{"model.gradient_checkpointing": "selective"}, {"model.channels_last": True}])
def test_the_losses_stay(
    change: dict[str, Any], make_config: MakeConfig, tiny_sdxl: Path, tmp_path: Path, runs: list[Any]
) -> None:
    shared = {"tuning.method": "full", "training.max_train_steps": 3, "training.learning_rate": 1e-5}
    for name, more in {"plain": {}, "changed": change}.items():
        run_training(make_config(tiny_sdxl, {**shared, **more, "output_dir": str(tmp_path / name)}))
    close(metrics(tmp_path / "changed"), metrics(tmp_path / "plain"))
    first = metrics(tmp_path / "changed")[0]
    assert first["loss"] == float(torch.tensor(2.0).log())
    assert first["rewards/margins"] == 0.0
    assert first["grad_norm"] > 0
    if "model.channels_last" in change:
        formats = [memory_format(m) for run in runs for m in (run.unet, run.networks._reference.module)]
        assert formats == [torch.contiguous_format] * 2 + [torch.channels_last] * 2
        assert runs[1].networks._memory_format == torch.channels_last


def test_compiled_full_tuning_compiles_the_reference_as_well_and_saves_plain_names(
    make_config: MakeConfig, tiny_sd: Path, tmp_path: Path, traced: list[int], runs: list[Any]
) -> None:
    shared = {"tuning.method": "full", "training.max_train_steps": 2, "training.learning_rate": 1e-5}
    run_training(make_config(tiny_sd, {**shared, "output_dir": str(tmp_path / "plain")}))
    assert traced == []
    run_training(make_config(tiny_sd, {**shared, "model.compile": True, "output_dir": str(tmp_path / "compiled")}))
    assert traced
    for network in (runs[1].unet, runs[1].networks._reference.module):
        assert network.mid_block.resnets[0]._compiled_call_impl is not None
    close(metrics(tmp_path / "compiled"), metrics(tmp_path / "plain"))
    assert weights(tmp_path / "compiled").keys() == weights(tmp_path / "plain").keys()


def test_the_reference_is_asked_for_several_micro_steps_at_once(
    make_config: MakeConfig, tiny_sdxl: Path, tmp_path: Path, runs: list[Any]
) -> None:
    shared = {
        "training.train_batch_size": 1,
        "training.gradient_accumulation_steps": 5,
        "training.max_train_steps": 2,
        "training.learning_rate": 1e-5,
    }
    for name, size in {"each": None, "two": 2, "all": 5}.items():
        change = {"training.reference_batch_size": size, "output_dir": str(tmp_path / name)}
        run_training(make_config(tiny_sdxl, {**shared, **change}))
    assert [run.networks.reference_forwards for run in runs] == [2 * 5, 2 * 3, 2]
    for name in ("two", "all"):
        close(metrics(tmp_path / name), metrics(tmp_path / "each"))


def test_an_objective_that_asks_the_policy_for_its_points_may_have_it_too(
    make_config: MakeConfig, tiny_sd: Path, tmp_path: Path
) -> None:
    shared = {
        "objective": {"name": "inpo", "beta": 500.0, "steps": 2},
        "training.train_batch_size": 1,
        "training.gradient_accumulation_steps": 2,
        "training.max_train_steps": 2,
        "training.learning_rate": 1e-5,
    }
    for name, size in {"each": None, "all": 2}.items():
        change = {"training.reference_batch_size": size, "output_dir": str(tmp_path / name)}
        run_training(make_config(tiny_sd, {**shared, **change}))
    close(metrics(tmp_path / "all"), metrics(tmp_path / "each"))


@pytest.mark.parametrize(
    ("size", "more"),
    [(2, {}), (3, {"training.gradient_accumulation_steps": 4}), (16, {"training.gradient_accumulation_steps": 4})],
)
def test_a_reference_batch_is_made_of_micro_batches(
    size: int, more: dict[str, Any], make_config: MakeConfig, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=rf"reference_batch_size: {size} is not valid; give a multiple"):
        make_config(tmp_path, {"training.reference_batch_size": size, **more})


def test_noise_goes_to_a_gpu_from_pinned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[tuple[str, Any]] = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: moved.append(("pinned", x.shape)) or x)
    monkeypatch.setattr(torch.Tensor, "to", lambda x, *a, **k: moved.append((str(a[0]), k)) or x)
    draws.on_device(torch.ones(3), torch.device("cuda"))
    draws.on_device(torch.ones(3), torch.device("cpu"))
    monkeypatch.undo()
    asynchronous = {"non_blocking": True}
    assert moved == [("pinned", torch.Size([3])), ("cuda", asynchronous), ("cpu", asynchronous)]
