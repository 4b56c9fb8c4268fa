"""The client against a stand-in that answers as servers do on bad days."""

from __future__ import annotations

import json
import socket
from threading import Event

import pytest
import torch
from PIL import Image

from diffalign.rewards import ScorerError, load_scorer, span_of, tie_of
from diffalign.rewards.remote import client
from diffalign.rewards.remote.client import Patience, Remote
from tests.rewards.remote.conftest import HEALTH

IMAGES = [Image.new("RGB", (3, 2), (shade, 0, 0)) for shade in (10, 20, 30)]
PROMPTS = ["a", "b", "é"]


def answer(*scores, status=200):
    return status, json.dumps({"protocol": 1, "scores": scores}).encode()


def impatient(waits=None, **limits):
    return Patience(**{"timeout": 5.0, **limits}, sleep=(waits if waits is not None else []).append)


def test_scores_come_in_batches_of_the_servers_size(stand_in):
    stand_in.script = [answer(1.5, -2), answer(3)]
    judge = load_scorer(f"remote={stand_in.url}/")
    scores = judge.score(IMAGES, PROMPTS)
    assert torch.equal(scores, torch.tensor([1.5, -2, 3], dtype=torch.float64))
    assert (judge.name, judge.unit, tie_of(judge), span_of(judge)) == ("judge", "points", 0.5, (0.0, 10.0))
    assert [sent["prompts"] for _, sent in stand_in.requests] == [["a", "b"], ["é"]]
    assert judge.score([], []).shape == (0,)


def test_passing_faults_are_tried_again_with_growing_pauses(stand_in):
    def cut(handler):
        handler.send_response(200)
        handler.send_header("Content-Length", "1000")
        handler.end_headers()
        handler.wfile.write(b'{"protocol"')
        handler.connection.shutdown(socket.SHUT_RDWR)

    waits = []
    judge = Remote(stand_in.url, patience=impatient(waits))
    stand_in.script = [(500, b"oops"), (429, b"{}"), cut, answer(1), (503, b""), answer(2)]
    assert judge.score(IMAGES[:1], ["a"]).tolist() == [1]
    assert waits == [0.5, 1.0, 2.0]
    assert judge.score(IMAGES[:1], ["a"]).tolist() == [2]
    stand_in.script = [(500, b'{"error": "out of memory"}')] * 5
    with pytest.raises(ScorerError, match=r"status 500: out of memory, 5 times in a row"):
        judge.score(IMAGES[:1], ["a"])


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (answer(1), r"1 scores for 2 images"),
        (answer(1, 2, 3), r"3 scores for 2 images"),
        (answer(1, float("nan")), r"nan to image 2 of 2"),
        (answer(float("-inf"), 1), r"-inf to image 1 of 2"),
        (answer(1, "9"), r"'9' to image 2 of 2"),
        (answer(1, True), r"True to image 2 of 2"),
        (answer(1, 10**400), r"to image 2 of 2; scores are finite"),
        ((200, b"<html>sign in</html>"), r"'<html>sign in</html>' and no JSON object"),
        ((200, b"\xff\xfe"), "no JSON object"),
        ((200, b"[" * 100_000), "no JSON object"),
        ((200, b'{"protocol": 2, "scores": [1, 2]}'), "expected"),
        ((200, b'{"scores": [1, 2]}'), "expected"),
        ((200, b" " * (2**20 + 1)), r"more than 1,048,576 bytes"),
        ((400, b'{"error": "prompt 2 is empty"}'), r"status 400: prompt 2 is empty"),
        ((404, b"not here"), r"status 404"),
        ((302, b"", ("Location", "http://example.com/score")), r"status 302"),
    ],
)
def test_faults_that_do_not_pass_are_named_at_once(stand_in, given, words):
    waits = []
    judge = Remote(stand_in.url, patience=impatient(waits))
    stand_in.script = [given]
    with pytest.raises(ScorerError, match=words) as error:
        judge.score(IMAGES[:2], ["a", "b"])
    assert stand_in.url in str(error.value)
    assert waits == []
    assert len(stand_in.requests) == 1  # no redirect was followed


def test_a_server_that_is_silent_or_endless_is_left(stand_in):
    over = Event()

    def silent(handler):
        over.wait(30)

    def endless(handler):
        handler.send_response(200)
        handler.end_headers()
        while not over.wait(0.02):
            handler.wfile.write(b" ")

    judge = Remote(stand_in.url, patience=impatient(timeout=0.2, attempts=2))
    stand_in.script = [silent, endless]
    with pytest.raises(ScorerError, match=r"did not answer \(TimeoutError: .*2 times in a row"):
        judge.score(IMAGES[:1], ["a"])
    over.set()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"protocol": 2}, "protocol = 2"),
        ({"name": ""}, "name = ''"),
        ({"name": None}, "name = None"),
        ({"tie": -1}, "tie = -1"),
        ({"span": [0]}, r"span = \[0\]"),
        ({"span": [5, 1]}, r"span = \[5, 1\]"),
        ({"tie": 10**400}, "tie = 1000"),
        ({"batch": 0}, "batch = 0"),
    ],
)
def test_a_wrong_health_is_named(stand_in, change, words):
    stand_in.health = (200, json.dumps({**HEALTH, **change}).encode())
    with pytest.raises(ScorerError, match=words):
        Remote(stand_in.url, patience=impatient())


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("", "has nothing behind '='"),
        ("ftp://a", "write the address"),
        ("http://", "write the address"),
        ("http://a:port", "write the address"),
        ("http://a..b", "write the address"),
        ("http://a/é", "write the address"),
        ("http://a/b c", "write the address"),
        ("http://me:secret@a:port", r"remote=\(address\)"),
        ("http://me:secret@a", "has no user, password"),
        ("http://a/?key=secret", "has no user, password"),
    ],
)
def test_a_wrong_address_is_named_without_what_may_be_secret(url, words):
    with pytest.raises(ScorerError, match=words) as error:
        load_scorer(f"remote={url}")
    assert "secret" not in str(error.value)


def test_no_server(stand_in):
    free = socket.socket()
    free.bind(("127.0.0.1", 0))  # bound and not listening: connections are refused
    with pytest.raises(ScorerError, match=r"ConnectionRefusedError.*is the server running\?"):
        Remote(f"http://127.0.0.1:{free.getsockname()[1]}", patience=impatient())
    free.close()


def test_the_token_is_sent_and_never_shown(stand_in, monkeypatch):
    monkeypatch.setenv("DIFFALIGN_SCORER_TOKEN", "s3cret")
    stand_in.script = [answer(1), (401, b'{"error": "wrong token"}')]
    judge = Remote(stand_in.url, patience=impatient())
    judge.score(IMAGES[:1], ["a"])
    assert stand_in.requests[0][0]["Authorization"] == "Bearer s3cret"
    with pytest.raises(ScorerError, match="wrong token") as error:
        judge.score(IMAGES[:1], ["a"])
    assert "s3cret" not in str(error.value) + repr(judge) + repr(vars(judge))
    with pytest.raises(ScorerError, match="plain http on another machine"):
        Remote("http://192.0.2.1:8765", patience=impatient())
    monkeypatch.setenv("DIFFALIGN_SCORER_TOKEN", "s3cret\n")
    with pytest.raises(ScorerError, match="a character that a token cannot have") as error:
        judge.score(IMAGES[:1], ["a"])
    assert "s3cret" not in str(error.value)


def test_requests_are_bounded(stand_in, monkeypatch):
    monkeypatch.setattr(client, "LARGEST_REQUEST", 230)
    stand_in.script = [answer(1), answer(2)]
    judge = Remote(stand_in.url, patience=impatient())
    assert judge.score(IMAGES[:2], ["a", "b"]).tolist() == [1, 2]  # one request of two images would be too large
    with pytest.raises(ScorerError, match="too large"):
        judge.score(IMAGES[:1], ["a" * 300])
