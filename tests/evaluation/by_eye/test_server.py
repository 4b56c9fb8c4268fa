"""What the server refuses, and that requests of two windows do not disturb each other."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from diffalign.data.row import ImageRef
from diffalign.errors import DiffalignError
from diffalign.evaluation.by_eye.plan import order_of
from diffalign.evaluation.by_eye.server import PageServer
from diffalign.evaluation.by_eye.votes import read_events
from tests.evaluation.by_eye.helpers import SECRET, material, post, served, session

PROMPTS = ["a red fox", "a blue hat", "a lamp"]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[PageServer]:
    with served(session(tmp_path, PROMPTS)) as found:
        yield found


def ask(server: PageServer, path: str, method: str = "GET", body: bytes | None = None, **headers: str) -> Any:
    """(status, headers, content) of one request, as it is written here: nothing is corrected on the way."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=20)
    connection.putrequest(method, path, skip_host="Host" in headers, skip_accept_encoding=True)
    for name, value in headers.items():
        for each in value.split("|"):
            connection.putheader(name.replace("_", "-"), each)
    if body is not None:
        connection.putheader("Content-Length", str(len(body)))
    connection.endheaders(body)
    answer = connection.getresponse()
    found = answer.status, answer.headers, answer.read()
    connection.close()
    return found


def test_an_image_that_cannot_be_read_is_named_in_the_terminal_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = session(tmp_path, PROMPTS)
    gone = ImageRef(None, f"/{SECRET}/0.png", f"/{SECRET}/0.png")
    made.material = replace(made.material, images=lambda _: (gone, gone))
    with served(made) as server:
        status, _, content = ask(server, f"/{server.token}/image/0/0", Host="localhost")
    assert (status, SECRET.encode() in content) == (410, False)
    assert SECRET in caplog.text


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "HEAD", "OPTIONS", "DELETE"])
def test_without_the_token_nothing_is_answered(server: PageServer, method: str) -> None:
    other = server.token[:-1] + ("x" if server.token[-1] != "x" else "y")
    for token in (
        "",
        other,
        f"{server.token}x",
        server.token[:-1],
        server.token.swapcase(),
        "%00",
        f"./{server.token}",
    ):
        for path in ("", "state", "image/0/0", "vote", f"../{server.token}/"):
            status, _, content = ask(server, f"/{token}/{path}", method)
            assert (status, content) == (404, b"")
    for path in ("//[", "*", f"http://127.0.0.1/{server.token}/", "/" + "x" * 9000):
        assert ask(server, path, method)[0] == 404
    assert ask(server, f"/{server.token}", method)[0] == 404  # without the slash behind it


def test_the_token_differs_from_start_to_start(server: PageServer, tmp_path: Path) -> None:
    with served(session(tmp_path / "other", PROMPTS)) as again:
        assert again.token != server.token
        assert len(again.token) == 32  # 24 random bytes
        assert again.server_address[0] == "127.0.0.1"
        with pytest.raises(DiffalignError, match=r"--port \d+: .*in use"):
            PageServer(again.session, "", str, again.server_port)


def test_only_our_page_on_this_machine_is_answered(server: PageServer) -> None:
    state, port = f"/{server.token}/state", server.server_port
    for host in (f"127.0.0.1:{port}", f"localhost:{port}", "localhost:9000", "localhost", "[::1]:80"):
        assert ask(server, state, Host=host)[0] == 200
        assert ask(server, state, Host=host, Origin=f"http://{host}", Sec_Fetch_Site="same-origin")[0] == 200
    for host in ("evil.example", f"evil.example:{port}", f"127.0.0.1.evil.example:{port}", f"localhost:{port}|x", ""):
        assert ask(server, state, Host=host)[0] == 403
    good = {"Host": f"127.0.0.1:{port}", "Content_Type": "application/json"}
    for odd in (
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": f"https://127.0.0.1:{port}"},
        {"Origin": f"http://127.0.0.1:{port + 1}"},
        {"Sec_Fetch_Site": "cross-site"},
        {"Sec_Fetch_Site": "same-site"},
    ):
        assert ask(server, state, **good, **odd)[0] == 403
        assert ask(server, f"/{server.token}/vote", "POST", b"{}", **good, **odd)[0] == 403


@pytest.mark.parametrize(
    "path",
    [
        "image/../../../../etc/passwd", "image/0/..%2f..", "%2e%2e/%2e%2e/etc/passwd", "image/0/2", "image/-1/0",
        "image/3/0", "image/0", "image/00000000000000000000/0", "image/0/0/", "ana.jsonl", "plan.json", "..//",
    ],
)  # fmt: skip
def test_no_path_leads_to_a_file(server: PageServer, path: str) -> None:
    status, _, content = ask(server, f"/{server.token}/{path}")
    assert (status, content) == (404, b"")


def test_no_answer_names_a_model(server: PageServer) -> None:
    """Neither the page nor its data nor the images' metadata; every answer refuses to be framed, guessed or stored."""
    for path in ("", "state", *(f"image/{place}/{side}" for place in range(3) for side in (0, 1))):
        status, headers, content = ask(server, f"/{server.token}/{path}")
        assert status == 200
        assert SECRET.encode() not in content
        assert b"tEXt" not in content
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert "frame-ancestors 'none'" in headers["Content-Security-Policy"]
        assert headers["Cache-Control"] == "no-store"
        assert headers["Referrer-Policy"] == "no-referrer"


def test_a_vote_is_well_formed_or_refused(server: PageServer, tmp_path: Path) -> None:
    vote = {"event": "event-one", "place": 0, "key": "left", "seconds": 1.5}
    odd: list[dict[str, Any]] = [
        *({**vote, "place": place} for place in (3, -1, "0", 0.0, True, None)),
        *({**vote, "key": key} for key in ("first", "", None, ["left"])),
        *({**vote, "seconds": seconds} for seconds in (-1, "1", None, True, float("nan"), -(10**400))),
        *({**vote, "event": name} for name in ("short", "x" * 65, "../../etc", None, 7)),
    ]
    for content in odd:
        assert post(server.url, "vote", content)[0] == 400, content
    raw = {"Host": f"localhost:{server.server_port}", "Content_Type": "application/json"}
    for body in (b"", b"[]", b"{", b"\xff", b"[" * 3000, b"{" + b" " * 5000 + b"}"):
        assert ask(server, f"/{server.token}/vote", "POST", body, **raw)[0] == 400
    assert ask(server, f"/{server.token}/vote", "POST", json.dumps(vote).encode(), Host=raw["Host"])[0] == 400  # a form
    assert post(server.url, "finish", {})[0] == 404  # not everything is judged
    assert (tmp_path / "ana.jsonl").read_bytes() == b""
    assert post(server.url, "vote", {**vote, "seconds": 10**400})[0] == 200


def test_two_windows_of_one_annotator(server: PageServer, tmp_path: Path) -> None:
    """Both show the first pair. The slower one learns that it is judged; an undo is of the last vote, or refused."""
    first = {"event": "window-1-a", "place": 0, "key": "left", "seconds": 1}
    status, state = post(server.url, "vote", first)
    assert (status, state["judged"], state["current"]["place"]) == (200, 1, 1)
    status, found = post(server.url, "vote", {"event": "window-2-a", "place": 0, "key": "right", "seconds": 1})
    assert (status, found["judged"], "has a vote" in found["stale"]) == (200, 1, True)
    assert post(server.url, "vote", first)[1] == state  # the same request again
    assert post(server.url, "vote", {"event": "window-2-b", "place": 1, "key": "tie", "seconds": 1})[0] == 200
    assert post(server.url, "undo", {"event": "window-1-b", "place": 0})[1]["stale"]
    for _ in range(2):
        status, state = post(server.url, "undo", {"event": "window-2-c", "place": 1})
        assert (status, state["judged"], state["current"]["place"], state["last"]) == (
            200, 1, 1, {"place": 0, "key": "left"},
        )  # fmt: skip
    assert [each.vote for _, each in read_events(tmp_path / "ana.jsonl")][1:] == ["tie", "undo"]


def test_the_left_image_is_the_one_that_is_stored_as_preferred(tmp_path: Path) -> None:
    """Over an order in which both sides occur, and which is each annotator's own."""
    prompts = [f"prompt {i}" for i in range(40)]
    made = material(prompts)
    orders = {name: order_of(made.plan, name) for name in ("ana", "ben")}
    assert {shown.left for shown in orders["ana"]} == {0, 1}
    assert [s.comparison.id for s in orders["ana"]] != [s.comparison.id for s in orders["ben"]]
    with served(session(tmp_path, prompts)) as server:
        for place in range(40):
            with Image.open(BytesIO(server.session.image(place, 0))) as image:
                grey = image.getpixel((0, 0))[0]
            server.session.vote({"event": f"event-{place:03d}", "place": place, "key": "left", "seconds": 1})
            chosen = server.session.log.last
            assert chosen is not None
            i = int(chosen.pair.removeprefix("id"))
            assert grey == {"first": i, "second": 255 - i}[chosen.vote]
