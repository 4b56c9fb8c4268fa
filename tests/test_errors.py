"""One base class for errors that a user can correct; any other exception is a bug, with its traceback."""

from __future__ import annotations

import errno
import os
import pickle
import warnings
from pathlib import Path

import pytest
import torch

import diffalign.cli.main
from diffalign.errors import DiffalignError, Interrupted, explain, printable


def raising(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> int:
    def run(_: object) -> None:
        raise error

    monkeypatch.setattr("diffalign.cli.list.run", run)
    with pytest.raises(SystemExit) as end:
        diffalign.cli.main.main(["list"])
    return int(str(end.value.code))


def test_a_users_mistake_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert raising(monkeypatch, DiffalignError("key a: 3; write 4")) == 2
    assert capsys.readouterr().err == "diffalign list: key a: 3; write 4\n"


@pytest.mark.parametrize("error", [ValueError("x"), ImportError("y"), KeyError("z"), OSError("w"), TypeError("v")])
def test_a_bug_is_a_traceback_and_says_so(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert raising(monkeypatch, error) == 1
    said = capsys.readouterr().err
    assert "Traceback" in said
    assert "this is a bug in diffalign" in said
    assert "/issues" in said


def test_an_interruption_is_no_traceback(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert raising(monkeypatch, KeyboardInterrupt()) == 130
    assert capsys.readouterr().err == "diffalign list: interrupted\n"


def test_a_signals_end_has_its_status_and_can_be_sent_between_processes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stop = pickle.loads(pickle.dumps(Interrupted(15, "stopped after step 2")))
    assert raising(monkeypatch, stop) == 143
    assert capsys.readouterr().err == "diffalign list: stopped after step 2\n"


def test_libraries_deprecations_are_silent_and_other_warnings_are_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(_: object) -> None:
        warnings.warn("`a` will go", FutureWarning, stacklevel=1)
        warnings.warn("`b` will go", DeprecationWarning, stacklevel=1)
        warnings.warn("`c` is deprecated\nand will go", UserWarning, stacklevel=1)
        warnings.warn("the result is wrong", UserWarning, stacklevel=1)

    monkeypatch.setattr("diffalign.cli.list.run", run)
    monkeypatch.setattr("sys.warnoptions", [])
    with warnings.catch_warnings(record=True) as seen:
        diffalign.cli.main.main(["list"])
    assert [str(each.message) for each in seen] == ["the result is wrong"]


def test_a_reader_that_has_gone_ends_a_command_in_silence(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(diffalign.cli.main.os, "dup2", lambda *_: None)  # pytest needs its stdout
    assert raising(monkeypatch, BrokenPipeError(errno.EPIPE, "Broken pipe")) == 141
    assert capfd.readouterr() == ("", "")


def test_a_full_disk_is_named_with_its_path(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "runs/a/x.bin")
    assert raising(monkeypatch, full) == 2
    assert capsys.readouterr().err.startswith("diffalign list: runs/a/x.bin: no space is left on the device; free some")


def test_a_device_out_of_memory_is_named_with_what_to_change() -> None:
    said = explain(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"))
    assert said is not None
    assert "train_batch_size" in said
    assert "2.00 GiB" in said


def test_control_characters_never_reach_the_terminal() -> None:
    assert printable("a\x1b[31mred\x07\u202e\udcff\nb\té") == "a\\x1b[31mred\\x07\\u202e\\udcff\nb\té"


def test_every_error_of_the_package_is_of_the_one_class() -> None:
    from diffalign.config.overrides import ConfigError
    from diffalign.data.row import DataError, ImageError
    from diffalign.export.names import ExportError
    from diffalign.models.loading.family import ModelError
    from diffalign.rewards.base import ScorerError
    from diffalign.sources.base import SourceError
    from diffalign.training.checkpoints.checkpoint import CheckpointError
    from diffalign.training.trainable import TrainingError

    for kind in (ConfigError, DataError, ImageError, ExportError, ModelError, ScorerError, SourceError):
        assert issubclass(kind, DiffalignError)
    assert issubclass(CheckpointError, DiffalignError)
    assert issubclass(TrainingError, DiffalignError)


def test_a_file_in_the_place_of_a_folder_is_named(tmp_path: Path) -> None:
    file = tmp_path / "out"
    file.write_text("")
    with pytest.raises(FileExistsError) as error:
        file.mkdir()
    assert (
        explain(error.value)
        == f"{file}: a file of this name is there where a folder is needed; name another (File exists)"
    )
