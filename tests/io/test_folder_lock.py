"""One writer a folder: refused while the owner lives, released after it died, never guessed for other machines."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import diffalign.io.folder_lock as module
from diffalign.errors import DiffalignError
from diffalign.io.folder_lock import LOCK_FILE, FolderInUseError, folder_in_use, folder_lock

HOLD = """
import os, pathlib, sys, time
from diffalign.io.folder_lock import folder_lock
with folder_lock(pathlib.Path(sys.argv[1]), "a run"):
    if os.fork() == 0:  # as a loader worker that outlives its parent
        print("forked", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def other(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that writes to tmp_path/run."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "run")],
        cwd=Path(__file__).parents[2],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    process.stdout.readline()
    yield process
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def written(tmp_path: Path, **changes: Any) -> Path:
    """A lock file in tmp_path/run as an owner with these differences from us would have left it."""
    (tmp_path / "run").mkdir()
    owner = {**module._self(), "what": "a run", **changes}
    (tmp_path / "run" / LOCK_FILE).write_text(json.dumps(owner))
    return tmp_path / "run"


def test_a_second_process_is_refused_until_the_first_one_is_gone(
    other: subprocess.Popen[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = tmp_path / "run"
    assert folder_in_use(run)
    with pytest.raises(FolderInUseError) as refused, folder_lock(run, "x"):
        pass
    for part in (str(run), f"pid {other.pid}", f"kill {other.pid}", "Name another folder", LOCK_FILE):
        assert part in str(refused.value)
    os.kill(other.pid, signal.SIGKILL)  # its child lives on
    other.wait()
    assert not folder_in_use(run)
    with caplog.at_level(logging.WARNING), folder_lock(run, "x"):
        assert json.loads((run / LOCK_FILE).read_text())["pid"] == os.getpid()
    assert f"pid {other.pid}" in caplog.text
    assert not (run / LOCK_FILE).exists()


def test_the_folder_is_free_again_and_what_was_written_stays(tmp_path: Path) -> None:
    with folder_lock(tmp_path / "run", "x"), folder_lock(tmp_path / "run", "x"):
        (tmp_path / "run" / "x").write_text("mine")
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["x"]
    with pytest.raises(ZeroDivisionError), folder_lock(tmp_path / "run", "x"):
        raise ZeroDivisionError
    with folder_lock(tmp_path / "run", "x"):
        pass
    with pytest.raises(DiffalignError, match="x is a file; name a folder"), folder_lock(tmp_path / "run/x", "x"):
        pass


@pytest.mark.parametrize(
    ("owner", "free"),
    [
        ({"pid": 2**22 + 1}, True),  # gone: above the kernel's largest pid
        ({"pid": 1, "began": -5}, True),  # the number was given to another process since
        ({"boot": "another"}, True),  # the machine was started again since
        ({"host": "another"}, True),  # another container of this machine, whose lock is ours: it is gone
        ({"host": "another", "boot": "another"}, False),
        ({"host": "another", "boot": None}, False),
        ({"pid": os.getppid(), "began": module._began(os.getppid())}, False),  # alive on a file system without locks
    ],
)
def test_an_owner_counts_as_gone_only_where_that_is_certain(owner: dict[str, Any], free: bool, tmp_path: Path) -> None:
    run = written(tmp_path, **owner)
    assert folder_in_use(run) == (not free or owner == {"host": "another"})  # which only taking its lock could tell
    if free:
        with folder_lock(run, "x"):
            pass
        return
    with pytest.raises(FolderInUseError) as refused, folder_lock(run, "x"):
        pass
    assert str(owner.get("host", owner.get("pid"))) in str(refused.value)
    assert str(run / LOCK_FILE) in str(refused.value)
    assert (run / LOCK_FILE).exists()


def test_without_locks_of_the_system_the_pid_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_flock", lambda _: None)
    run = written(tmp_path, pid=2**22 + 1)
    with folder_lock(run, "x"):
        pass
    (run / LOCK_FILE).write_text("\0\0\0")  # a machine that lost power
    with pytest.raises(FolderInUseError, match=r"an unknown machine.*remove .*\.lock"), folder_lock(run, "x"):
        pass


def test_a_torn_lock_is_taken_over_where_the_system_has_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A power cut while the owner wrote its name; on another machine it would be complete a moment later."""
    run = written(tmp_path, host="another", boot="another")
    whole = (run / LOCK_FILE).read_text()
    (run / LOCK_FILE).write_text(whole[:-9])
    monkeypatch.setattr(module.time, "sleep", lambda _: (run / LOCK_FILE).write_text(whole))
    with pytest.raises(FolderInUseError, match="on another"), folder_lock(run, "x"):
        pass
    (run / LOCK_FILE).write_text(whole[:-9])
    monkeypatch.setattr(module.time, "sleep", lambda _: None)
    with folder_lock(run, "x"):
        assert str(os.getpid()) in (run / LOCK_FILE).read_text()
    assert "does not name its owner, who was killed" in caplog.text
