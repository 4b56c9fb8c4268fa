"""A process that fails, is killed, hangs or lags: the others end with its name and error, or name it and go on."""

from __future__ import annotations

import logging
import os
import re
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import PartialState

from diffalign.errors import DiffalignError
from diffalign.training.distributed import shared_folder, watch
from diffalign.training.distributed.vital_signs import long_work
from diffalign.training.distributed.watch import LostProcessError, Watch
from tests.training.distributed.group import in_two

OTHER = r"rank 1 \(\S+, pid \d+\)"
Fault = Callable[[], None]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forked processes have these values; what is counted is beats."""
    for name, value in {
        "BEAT": 0.05,
        "SILENT": 20,
        "LAGS": 10,
        "PATIENCE": 30,
        "LONG_PATIENCE": 80,
        "GRACE": 0.5,
    }.items():
        monkeypatch.setattr(watch, name, value)


def fails() -> None:
    raise DiffalignError("pair 17 has no image")


def is_killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def waits_for(file: Path, seconds: float) -> Fault:
    """Stands at one line of the package, until a file is there."""

    def wait() -> None:
        shared_folder.PATIENCE = seconds
        shared_folder._sees(file)

    return wait


def is_stopped() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


class Warned(logging.StreamHandler):
    """Makes a file with a log line, and continues the process that it is about."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.file = file

    def emit(self, record: logging.LogRecord) -> None:
        super().emit(record)
        self.file.touch()
        os.kill(int(re.search(r"pid (\d+)", record.getMessage())[1]), signal.SIGCONT)


def group(fault: Fault, work: str = "", victim: int = 1) -> Callable[[PartialState, Path], None]:
    """The other process waits in a collective, as in a step."""

    def run(state: PartialState, folder: Path) -> None:
        logging.basicConfig(force=True, handlers=[Warned(folder / "warned")])
        with Watch(state) as watching:
            watching.step = 4
            torch.distributed.barrier()
            if state.process_index == victim:
                time.sleep(0.2)  # a beat tells the others where it is
                with long_work(work):
                    fault()
            torch.distributed.barrier()

    return run


def test_the_error_of_one_process_ends_the_others_with_its_name(tmp_path: Path) -> None:
    (one, said), (two, own) = in_two(group(fails), tmp_path)
    assert (one, two) == (1, 1)
    assert re.search(rf"LostProcessError: {OTHER} ended: pair 17 has no image", said)
    assert "DiffalignError: pair 17 has no image" in own
    assert "LostProcessError" not in own


@pytest.mark.parametrize("victim", [0, 1])  # the first one has the store
def test_a_killed_process_is_named(victim: int, tmp_path: Path) -> None:
    ends = in_two(group(is_killed, victim=victim), tmp_path)
    assert ends[victim][0] == -signal.SIGKILL
    status, said = ends[1 - victim]
    assert status == 1
    assert re.search(
        rf"LostProcessError: {OTHER.replace('1', str(victim), 1)} ended without a word .*; it was at step 4", said
    )


@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_cannot_return_ends_too_and_silence_is_enough_to_name_one(
    victim: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on GPUs, where a host waits for its device for good; and as on two machines, where no pid tells."""
    signs = watch.own_signs
    monkeypatch.setattr(watch, "own_signs", lambda rank: replace(signs(rank), home=""))

    def run(state: PartialState, folder: Path) -> None:
        with Watch(state):
            torch.distributed.barrier()
            if state.process_index == victim:
                time.sleep(0.2)
                is_killed()
            time.sleep(50)

    status, said = in_two(run, tmp_path)[1 - victim]
    assert status == 1
    lost = "the store of the group at 127.0.0.1 does not answer" if victim == 0 else rf"{OTHER} ended without a word"
    assert re.search(rf"diffalign: {lost}.* This process \(rank {1 - victim} .*\) ends with it", said)


def test_a_process_that_lags_is_named_once_and_long_work_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "PATIENCE", 10_000)
    at = r"step 4, diffalign/training/distributed/shared_folder\.py:\d+ \(_sees\)"
    for work, seconds in (("writing a checkpoint", 1.5), ("", 50)):  # the second one ends with the warning
        (one, said), (two, own) = in_two(group(waits_for(tmp_path / "warned", seconds), work), tmp_path)
        assert (one, two, without_torch(own)) == (0, 0, "")
        found = re.findall(rf"{OTHER} lags: others have waited \d+ s for it; it is at {at}\n", said)
        assert len(found) == (not work), said


def test_a_process_that_was_stopped_lags_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As by Ctrl-Z; continued with the others it counts on, and nothing ends."""
    monkeypatch.setattr(watch, "PATIENCE", 10_000)
    (one, said), (two, own) = in_two(group(is_stopped), tmp_path)
    assert (one, two, without_torch(own)) == (0, 0, "")
    assert len(re.findall(rf"{OTHER} lags", said)) == 1


def without_torch(said: str) -> str:
    """What a process said besides torch's message with its stack, where the one with the store ends first."""
    return re.sub(r"\[rank\d\]:\[W[^\n]*\[c10d\].*?\n\n", "", said, flags=re.DOTALL)


def test_a_process_that_stands_still_ends_all_of_them_after_patience(tmp_path: Path) -> None:
    for work, rounds in (("", 30), ("writing a checkpoint", 80)):
        began = time.monotonic()
        (one, said), (two, own) = in_two(group(waits_for(tmp_path / "never", 50), work), tmp_path)
        assert time.monotonic() - began > rounds * watch.BEAT
        assert (one, two) == (1, 1)
        at = r"at step 4, diffalign/training/distributed/shared_folder\.py:\d+ \(_sees\)" + (
            f", {work}" if work else ""
        )
        for text in (said, own):
            assert re.search(rf"{OTHER} has stood still for \d+ minutes while others wait for it, {at}", text)


def test_one_process_watches_nobody() -> None:
    class One:
        process_index, num_processes = 0, 1

    with Watch(One()) as alone:
        assert not hasattr(alone, "thread")
    with pytest.raises(ValueError, match="own"), Watch(One()):
        raise ValueError("own")
    assert issubclass(LostProcessError, DiffalignError)
