"""The file of votes: whatever instant the process is killed at, every acknowledged vote is there once."""

from __future__ import annotations

import errno
import json
import os
import random
import subprocess
import sys
import threading
import urllib.error
from pathlib import Path

import pytest

from diffalign.errors import DiffalignError
from diffalign.evaluation.by_eye.votes import StaleError, VoteLog, read_events, read_votes, votes_file
from tests.conftest import ROOT
from tests.evaluation.by_eye.helpers import event, post


def test_a_kill_at_any_byte_of_a_line_loses_that_line_alone(tmp_path: Path) -> None:
    file = tmp_path / "ana.jsonl"
    log = VoteLog(file)
    for pair in "abc":
        log.add(event(pair, "first"))
    log.close()
    whole = file.read_bytes()
    start = whole.rstrip(b"\n").rfind(b"\n") + 1
    for cut in (start, start + 1, *range(start + 2, len(whole) - 2, 9), len(whole) - 2, len(whole) - 1):
        file.write_bytes(whole[:cut])
        assert list(read_votes(tmp_path)["ana"]) == ["a", "b"]  # a report does not need to change the file
        again = VoteLog(file)
        assert list(again.standing) == ["a", "b"]
        assert again.add(event("c", "first"))
        again.close()
        assert file.read_bytes() == whole


def test_names_that_some_systems_do_not_tell_apart_are_refused(tmp_path: Path) -> None:
    (tmp_path / "Ana.jsonl").touch()
    assert votes_file(tmp_path, "Ana") == tmp_path / "Ana.jsonl"
    with pytest.raises(DiffalignError, match=r"Ana\.jsonl has the votes of 'Ana'"):
        votes_file(tmp_path, "ana")
    for name in ("con", "NUL", "com1"):
        with pytest.raises(DiffalignError, match="device of Windows"):
            votes_file(tmp_path, name)


def test_an_event_counts_once(tmp_path: Path) -> None:
    file = tmp_path / "ana.jsonl"
    log = VoteLog(file)
    assert log.add(event("a", "first"))
    assert not log.add(event("a", "first"))  # sent again after a lost answer
    log.close()
    log = VoteLog(file)
    assert not log.add(event("a", "first"))  # the same after a restart
    with pytest.raises(DiffalignError, match="used for another vote"):
        log.add(event("b", "tie", name=event("a", "first").event))
    with pytest.raises(StaleError, match="has a vote already"):
        log.add(event("a", "second"))
    log.add(event("b", "second"))
    with pytest.raises(StaleError, match="not the last one"):
        log.add(event("a", "undo"))
    log.add(event("b", "undo"))
    log.add(event("b", "tie"))
    log.close()
    assert {pair: vote.vote for pair, vote in read_votes(tmp_path)["ana"].items()} == {"a": "first", "b": "tie"}


def test_a_full_disk_leaves_the_file_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, write = tmp_path / "ana.jsonl", os.write
    log = VoteLog(file)
    log.add(event("a", "first"))
    before = file.read_bytes()

    def half(opened: int, data: bytes) -> int:
        if len(data) < 60:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(opened, data[: len(data) // 2])

    with monkeypatch.context() as patched:
        patched.setattr(os, "write", half)
        with pytest.raises(OSError, match="No space"):
            log.add(event("b", "first"))
    assert file.read_bytes() == before
    assert log.add(event("b", "first"))
    log.close()


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{", "not JSON"),
        (b"7", "not an object"),
        (b'{"event": "12345678"}', "are needed"),
        (json.dumps({**event("b", "first").__dict__, "vote": "third"}).encode(), "vote 'third'"),
        (json.dumps({**event("b", "first").__dict__, "left": True}).encode(), "left is True"),
        (json.dumps({**event("b", "first").__dict__, "seconds": float("nan")}).encode(), "seconds is nan"),
        (json.dumps(event("a", "second").__dict__).encode(), "has a vote already"),
    ],
)
def test_a_damaged_line_is_named(tmp_path: Path, line: bytes, reason: str) -> None:
    file = tmp_path / "ana.jsonl"
    log = VoteLog(file)
    log.add(event("a", "first"))
    log.close()
    file.write_bytes(file.read_bytes() + line + b"\n")
    with pytest.raises(DiffalignError, match=f"ana.jsonl, line 2: .*{reason}"):
        VoteLog(file)


def test_300_votes_survive_three_kills(tmp_path: Path) -> None:
    """The server is killed while requests are under way; the page sends an unanswered vote again, with its event."""
    n, rng = 300, random.Random(0)
    keys = [rng.choice(("left", "right", "tie", "skip")) for _ in range(n)]
    killers: dict[int, threading.Timer] = {}  # by the place at which each must have done its work
    restarts = 0

    def start() -> tuple[subprocess.Popen[str], str]:
        command = [sys.executable, "-m", "tests.evaluation.by_eye.helpers", str(tmp_path), str(n)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
        assert process.stdout is not None
        return process, process.stdout.readline().strip()

    process, url = start()
    try:
        for place, key in enumerate(keys):
            if place in (70, 150, 220):  # SIGKILL at an unknown instant of the next votes
                killers[place + 5] = threading.Timer(rng.uniform(0, 0.02), process.kill)
                killers[place + 5].start()
            if place in killers:
                killers[place].join()
            while True:
                try:
                    status, state = post(
                        url, "vote", {"event": f"vote-{place:04d}", "place": place, "key": key, "seconds": 1}
                    )
                    assert status == 200
                    break
                except (urllib.error.URLError, ConnectionError, TimeoutError):
                    process.wait(10)
                    assert len(list(read_events(tmp_path / "ana.jsonl"))) in (place, place + 1)
                    process, url = start()
                    restarts += 1
            assert state["judged"] == place + 1
    finally:
        process.kill()
        process.wait()
    assert restarts == 3
    events = [each for _, each in read_events(tmp_path / "ana.jsonl")]
    assert [each.event for each in events] == [f"vote-{place:04d}" for place in range(n)]
    assert len({each.pair for each in events}) == n
    seen = {("first", 0): "left", ("second", 1): "left", ("first", 1): "right", ("second", 0): "right"}
    assert [seen.get((each.vote, each.left), each.vote) for each in events] == keys
