"""Processes of one launch train together, or none starts; what a machine lacks is named."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from diffalign.cli.main import main
from diffalign.config.schema import Config
from diffalign.data.table.scores import score_pairs
from diffalign.errors import DiffalignError, explain, lost_worker
from diffalign.evaluation.sampling import Sampling
from diffalign.io.folder_lock import FolderInUseError, folder_lock
from diffalign.training import processes
from diffalign.training.processes import all_in_use, before_accelerate, make_accelerator
from diffalign.training.remedies import ResourceError, with_remedies
from diffalign.training.run import run_training

MakeConfig = Callable[..., Config]


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No launcher's words in the environment, and none left there."""
    for name in (*processes._SIZES, "MASTER_ADDR", "MASTER_PORT", "LOCAL_WORLD_SIZE", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "false")


def gpus(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.version, "cuda", "12.8")


def test_a_cpu_is_used_by_all_processes_that_were_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(0, monkeypatch)
    before_accelerate()
    assert os.environ["ACCELERATE_USE_CPU"] == "false"  # one process: nothing to say
    monkeypatch.setenv("WORLD_SIZE", "2")
    before_accelerate()
    assert os.environ["ACCELERATE_USE_CPU"] == "true"


def test_encoding_uses_the_same_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """accelerate's PartialState does not read ACCELERATE_USE_CPU; without it each process would encode everything."""
    gpus(0, monkeypatch)
    monkeypatch.setenv("WORLD_SIZE", "2")
    asked = []

    def state(**how: object) -> SimpleNamespace:
        asked.append(how)
        return SimpleNamespace(num_processes=2 if how["cpu"] else 1, device="cpu")

    monkeypatch.setattr("accelerate.PartialState", state)
    assert processes.make_state().num_processes == 2
    assert asked[0]["timeout"] == processes.PATIENCE


@pytest.mark.parametrize(
    ("devices", "environment", "said"),
    [
        (0, {"WORLD_SIZE": "two"}, ["WORLD_SIZE=two", "number of processes"]),
        (
            0,
            {"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"},
            ["accelerate launch", "0 GPUs", "torchrun --nproc-per-node 2 -m diffalign train", "--num_processes 1"],
        ),
        (
            2,
            {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4"},
            ["4 processes", "2 CUDA devices", "at most 2", "ACCELERATE_USE_CPU=true"],
        ),
        (
            0,
            {"CUDA_VISIBLE_DEVICES": "7"},
            ["CUDA_VISIBLE_DEVICES=7", "nvidia-smi -L", "CUDA_VISIBLE_DEVICES= (empty)"],
        ),
        (2, {"ACCELERATE_TORCH_DEVICE": "cuda:5"}, ["ACCELERATE_TORCH_DEVICE=cuda:5", "2 CUDA devices", "cpu"]),
    ],
)
def test_a_launch_that_cannot_be_is_refused_before_anything_is_built(
    devices: int, environment: dict[str, str], said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus(devices, monkeypatch)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(DiffalignError) as refused:
        before_accelerate()
    for part in said:
        assert part in str(refused.value)


def test_processes_that_would_train_alone_are_refused(
    make_config: MakeConfig, tiny_sd: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This process has accelerate's state of one already."""
    run_state = SimpleNamespace(num_processes=1, device="cpu")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(DiffalignError, match=r"WORLD_SIZE=2.*uses 1 on cpu.*Set ACCELERATE_USE_CPU=true"):
        all_in_use(run_state)
    monkeypatch.delenv("WORLD_SIZE")
    make_accelerator(make_config(tiny_sd))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(DiffalignError, match="WORLD_SIZE=2"):
        run_training(make_config(tiny_sd))
    assert not Path(make_config(tiny_sd).output_dir).exists()


def test_commands_for_one_process_are_refused_under_a_launcher(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit) as end:
        main(["generate", "model", "--prompts", "a cat", "--out", str(tmp_path / "out")])
    assert end.value.code == 2
    said = capsys.readouterr().err
    for part in ("WORLD_SIZE=2", "`diffalign generate` works in one", "without a launcher"):
        assert part in said


def test_a_folder_in_use_is_refused_before_any_work(
    make_config: MakeConfig, tiny_sd: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from diffalign.evaluation.generate import generate

    config = make_config(tiny_sd)
    with folder_lock(tmp_path / "out", "a training run"), pytest.MonkeyPatch.context() as patch:
        patch.setattr("diffalign.io.folder_lock._owned", {})  # as another process would find it
        with pytest.raises(FolderInUseError, match=rf"out is in use by a training run \(pid {os.getpid()}"):
            run_training(config)
        with pytest.raises(FolderInUseError, match="Name another folder"):
            generate(str(tiny_sd), ["a cat"], [0], out_dir=tmp_path / "out", sampling=Sampling(num_inference_steps=1))
        with pytest.raises(SystemExit):
            main(["arena", "--quick", "--out", str(tmp_path / "out")])
        assert "is in use by" in capsys.readouterr().err
        name = ".scores.jsonl.lock"
        with folder_lock(tmp_path / "out", "another", name), pytest.MonkeyPatch.context() as again:
            again.setattr("diffalign.io.folder_lock._owned", {})
            with pytest.raises(FolderInUseError, match=r"another .*scores\.jsonl\.lock"):
                score_pairs(None, "world", None, tmp_path / "out/scores.jsonl")  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
            [
                "the device is out of memory",
                "2.00 GiB",
                "As counted from its config, this run needs about",
                "= weights ",
                "activations ",
            ],
        ),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory"),
            [
                "the machine is out of memory",
                "What would save most, by the same count:",
                "  model.gradient_checkpointing=full: ",
                "  training.train_batch_size=1 training.gradient_accumulation_steps=2: ",
            ],
        ),
        (
            RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "),
            ["killed by signal: Killed", "data.dataloader_num_workers (now 0;", "--shm-size"],
        ),
        (RuntimeError("DataLoader worker (pid(s) 7, 8) exited unexpectedly"), ["7, 8", "data.dataloader_num_workers"]),
    ],
)
def test_a_machine_that_is_too_small_is_named_with_the_runs_settings(
    error: RuntimeError, said: list[str], make_config: MakeConfig, tiny_sd: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise error

    assert explain(error) is not None  # wherever it comes from, it is no bug
    monkeypatch.setattr("diffalign.training.trainable.Run.step", fails)
    with pytest.raises(ResourceError) as told:
        run_training(make_config(tiny_sd))
    for part in said:
        assert part in str(told.value)


class _Killed(Dataset[int]):
    def __len__(self) -> int:
        return 1

    def __getitem__(self, _: int) -> int:
        os.kill(os.getpid(), signal.SIGKILL)
        return 0


def test_torch_words_a_killed_worker_as_we_expect() -> None:
    with pytest.raises(RuntimeError) as error:
        list(DataLoader(_Killed(), num_workers=1))
    assert lost_worker(error.value) is not None


@pytest.mark.parametrize(("launched", "said"), [(None, False), ("no", False), ("fp16", True)])
def test_precision_is_spoken_of_only_where_the_launcher_was_asked_for_another(
    launched: str | None,
    said: bool,
    make_config: MakeConfig,
    tiny_sd: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    if launched is not None:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
    make_accelerator(make_config(tiny_sd, {"training.mixed_precision": "bf16"}))
    assert ("accelerate's fp16 is not used" in caplog.text) is said


def test_other_errors_stay_what_they_are(make_config: MakeConfig, tiny_sd: Path) -> None:
    with pytest.raises(RuntimeError, match="a bug"), with_remedies(make_config(tiny_sd)):
        raise RuntimeError("a bug")
    assert explain(RuntimeError("a bug")) is None


def test_images_that_do_not_fit_are_told_with_their_settings(
    tiny_sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffalign.evaluation import generate as module

    def fails(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB")

    monkeypatch.setattr(module, "sample_images", fails)
    with pytest.raises(DiffalignError, match=r"3\.00 GiB.*batch_size \(now 4;.*resolution \(now 32\).*dtype bfloat16"):
        module.generate(
            str(tiny_sd),
            ["a cat"],
            [0],
            out_dir=tmp_path,
            sampling=Sampling(num_inference_steps=1, batch_size=4, resolution=32),
        )
