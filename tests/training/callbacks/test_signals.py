"""A signal during training: the step ends, one checkpoint is written, a message follows; a second one ends at once."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from diffalign.cli.main import main
from diffalign.config.schema import Config, save_config
from diffalign.data.loader.dataset import leave_signals_to_parent
from diffalign.errors import Interrupted
from diffalign.io.folder_lock import LOCK_FILE
from diffalign.training.callbacks.signals import SIGNALS, Stopping
from diffalign.training.run import run_training
from diffalign.training.trainable import Run
from tests.training.test_run import same, weights

MakeConfig = Callable[..., Config]


def signalled(monkeypatch: pytest.MonkeyPatch, at: int, *signals: int) -> None:
    """Has these signals come in the middle of step number `at`."""
    count, step = 0, Run.step

    def noted(*args: object) -> None:
        nonlocal count
        count += 1
        if count == at:
            for signum in signals:
                os.kill(os.getpid(), signum)
        step(*args)

    monkeypatch.setattr(Run, "step", noted)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGUSR1])
def test_a_signal_finishes_the_step_saves_once_and_says_how_to_go_on(
    signum: signal.Signals,
    make_config: MakeConfig,
    tiny_sd: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    save_config(make_config(tiny_sd), tmp_path / "config.yaml")
    before = [signal.getsignal(s) for s in SIGNALS]
    with monkeypatch.context() as patch:
        signalled(patch, 2, signum, signum)  # twice at once is one: `timeout` signals the process and its group
        with pytest.raises(SystemExit) as end:
            main(["train", str(tmp_path / "config.yaml")])
    said = capfd.readouterr().err
    assert end.value.code == 128 + signum
    assert f"{signum.name}: this step is finished and a checkpoint written" in said
    assert f"stopped by {signum.name} after step 2 of 4; {out / 'checkpoint-2'} is written" in said
    assert "To continue: the same command with training.resume_from_checkpoint=latest" in said
    assert "Traceback" not in said
    assert [p.name for p in out.glob("checkpoint-*")] == ["checkpoint-2"]
    assert not (out / LOCK_FILE).exists()
    assert [signal.getsignal(s) for s in SIGNALS] == before


def test_a_stopped_run_goes_on_as_if_it_had_not(
    make_config: MakeConfig, tiny_sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        signalled(patch, 2, signal.SIGTERM)
        with pytest.raises(Interrupted):
            run_training(make_config(tiny_sd))
    run_training(make_config(tiny_sd, {"training.resume_from_checkpoint": "latest"}))
    run_training(make_config(tiny_sd, {"output_dir": str(tmp_path / "whole")}))
    assert same(weights(tmp_path / "out"), weights(tmp_path / "whole"))


def test_the_second_signal_ends_at_once(
    make_config: MakeConfig, tiny_sd: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diffalign.training.callbacks.signals.SAME", 0.0)
    signalled(monkeypatch, 2, signal.SIGINT, signal.SIGINT)
    config = make_config(tiny_sd)
    with pytest.raises(KeyboardInterrupt) as end:
        run_training(config)
    assert not isinstance(end.value, Interrupted)
    assert not list(Path(config.output_dir).glob("checkpoint-*"))


@pytest.mark.parametrize("during", ["the last step", "the images"])
def test_after_the_last_step_the_final_weights_come_first_and_images_are_left_out(
    during: str, make_config: MakeConfig, tiny_sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = []

    def validate(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        drawn.append(True)

    if during == "the last step":
        signalled(monkeypatch, 1, signal.SIGINT)
    monkeypatch.setattr("diffalign.training.callbacks.validation.validate", validate)
    one = {"training.max_train_steps": 1, "validation.prompts": ["a cat"], "validation.every": 10}
    with pytest.raises(
        Interrupted, match=rf"final weights are in {tmp_path}/out, and the validation images .*left out"
    ):
        run_training(make_config(tiny_sd, one))
    assert weights(tmp_path / "out")
    assert not drawn
    assert not list((tmp_path / "out").glob("checkpoint-*"))


def test_a_signal_outside_the_loop_is_one_line(
    make_config: MakeConfig,
    tiny_sd: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    save_config(make_config(tiny_sd), tmp_path / "config.yaml")
    ends = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated", signal.SIGUSR1: "terminated"}
    for signum, said in ends.items():

        def loading(*_: object, signum: int = signum) -> None:
            os.kill(os.getpid(), signum)

        monkeypatch.setattr("diffalign.training.run.open_table", loading)
        with pytest.raises(SystemExit) as end:
            main(["train", str(tmp_path / "config.yaml")])
        assert end.value.code == 128 + signum
        assert capsys.readouterr().err == f"diffalign train: {said}\n"
    assert not (tmp_path / "out").exists()


def test_a_loaders_worker_outlives_the_first_signals() -> None:
    """Whoever stops a run signals its workers too, and the last step needs their pairs."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        leave_signals_to_parent()
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        os.write(write, b"alive")
        os.kill(os.getpid(), signal.SIGTERM)
        os._exit(0)
    os.close(write)
    assert os.read(read, 9) == b"alive"
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGTERM
    os.close(read)


class _Two:
    """An accelerator of two processes, as far as stopping asks for one."""

    num_processes, is_main_process, device = 2, True, torch.device("cpu")


def test_all_processes_stop_for_the_signal_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    other = [0, signal.SIGTERM]

    def all_reduce(flag: torch.Tensor, op: object) -> None:
        assert op == torch.distributed.ReduceOp.MAX
        flag.clamp_(min=other.pop(0))

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    with Stopping(_Two()) as stopping:
        assert [stopping.now(), stopping.now()] == [0, signal.SIGTERM]


def test_a_checkpoint_of_an_earlier_step_does_not_end_the_run() -> None:
    stopping, config = Stopping(_Two()), SimpleNamespace(training=SimpleNamespace(max_train_steps=9))
    stopping.signum = signal.SIGTERM
    state = SimpleNamespace(step=4, run=SimpleNamespace(config=config))
    stopping.on_checkpoint(state, Path("out/checkpoint-2"))
    with pytest.raises(Interrupted, match="after step 4 of 9; out/checkpoint-4"):
        stopping.on_checkpoint(state, Path("out/checkpoint-4"))


@pytest.mark.gpu
def test_on_gpus_the_answer_of_a_step_is_read_after_the_next() -> None:
    """A group of one stands for two: what is checked is the way of the flag through the device."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    two = _Two()
    two.device = torch.device("cuda", 0)
    torch.distributed.init_process_group("nccl", init_method=f"tcp://localhost:{port}", rank=0, world_size=1)
    try:
        with Stopping(two) as stopping:
            assert stopping.now() == 0
            os.kill(os.getpid(), signal.SIGTERM)
            assert [stopping.now(), stopping.now()] == [0, signal.SIGTERM]
    finally:
        torch.distributed.destroy_process_group()
