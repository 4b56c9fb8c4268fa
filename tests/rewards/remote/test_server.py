"""The server with the package's own client, and against requests that it must refuse."""

from __future__ import annotations

import http.client
import json
from concurrent.futures import ThreadPoolExecutor
from threading import Thread

import numpy as np
import pytest
import torch
from PIL import Image

from diffalign.rewards import ScorerError, load_scorer
from diffalign.rewards.remote.client import Patience, Remote
from diffalign.rewards.remote.protocol import encoded
from diffalign.rewards.remote.server import ScorerServer


class Mean:
    """A score that every pixel and the prompt enter."""

    name, tie, span = "mean", 0.25, (0.0, 255.0)

    def __init__(self):
        self.inside = 0

    def score(self, images, prompts):
        assert self.inside == 0, "two requests at once"
        self.inside += 1
        found = [float(np.asarray(i, dtype=float).mean()) + len(p) for i, p in zip(images, prompts, strict=True)]
        self.inside -= 1
        if "broken" in prompts:
            raise RuntimeError("a fault of the scorer")
        if "odd" in prompts:
            raise ScorerError("the prompt 'odd' cannot be judged")
        return torch.tensor(found)


@pytest.fixture
def server(serve):
    return serve(ScorerServer(Mean, 0, "grey level"))


@pytest.fixture
def url(server):
    return f"http://127.0.0.1:{server.server_address[1]}"


def test_remote_scores_are_the_scorers_own(url):
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (5 + i, 7, 3), dtype=np.uint8)) for i in range(19)]
    prompts = [("é" * i) or "a" for i in range(19)]
    judge = Remote(url)
    assert (judge.name, judge.unit, judge.tie, judge.span) == ("mean", "grey level", 0.25, (0.0, 255.0))
    expected = Mean().score(images, prompts)
    assert torch.equal(judge.score(images, prompts).float(), expected)
    with ThreadPoolExecutor(4) as several:  # e.g. the processes of a run
        found = list(several.map(lambda pair: judge.score([pair[0]], [pair[1]]), zip(images, prompts, strict=True)))
    assert torch.equal(torch.cat(found).float(), expected)


def test_faults_of_the_scorer_reach_the_client(url):
    image = Image.new("RGB", (2, 2))
    judge = Remote(url, patience=Patience(attempts=2, sleep=lambda seconds: None))
    with pytest.raises(ScorerError, match="status 400: the prompt 'odd' cannot be judged"):
        judge.score([image], ["odd"])
    with pytest.raises(ScorerError, match="status 500: RuntimeError: a fault of the scorer, 2 times"):
        judge.score([image], ["broken"])


def test_wrong_requests_are_refused(server, url):
    png = encoded(Image.new("RGB", (2, 2)))
    good = {"protocol": 1, "prompts": ["a"], "images": [png]}

    def ask(content, path="/score", **headers):
        connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=10)
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        connection.request("POST", path, body, {"Content-Type": "application/json", **headers})
        response = connection.getresponse()
        found = response.status, json.loads(response.read()).get("error", "")
        connection.close()
        return found

    assert ask(good) == (200, "")
    for content, words in (
        (b"{", "no JSON object"),
        ({**good, "protocol": 2}, "this server speaks 1"),
        ({**good, "prompts": []}, "two lists of the same length"),
        ({**good, "prompts": [1]}, "no text"),
        ({**good, "images": ["?"]}, "image 1 of the request is not base64 of a PNG"),
        ({**good, "images": [png[:40]]}, "image 1 of the request"),
        ({**good, "prompts": ["a"] * 9, "images": [png] * 9}, "at most 8"),
    ):
        status, error = ask(content)
        assert status == 400
        assert words in error
    assert ask(good, path="/other")[0] == 404
    assert ask(good, **{"Content-Type": "text/plain"})[0] == 415
    assert ask(good, **{"Content-Length": str(2**30)})[0] == 413
    assert ask(good, Host="evil.example:80")[0] == 421


def test_a_token_is_needed_where_one_is_set(serve, monkeypatch):
    monkeypatch.setenv("DIFFALIGN_SCORER_TOKEN", "open")
    server = serve(ScorerServer(Mean, 0))
    url = f"http://127.0.0.1:{server.server_address[1]}"
    assert Remote(url).score([Image.new("RGB", (2, 2))], ["a"]).tolist() == [1]
    monkeypatch.setenv("DIFFALIGN_SCORER_TOKEN", "closed")
    with pytest.raises(ScorerError, match="needs a token"):
        Remote(url)


def test_a_port_in_use_is_named(server):
    def load():
        raise AssertionError("the scorer was loaded before its port was tried")

    with pytest.raises(ScorerError, match="cannot be used"):
        ScorerServer(load, server.server_address[1])


def test_the_command_serves_a_scorer_of_the_package(capsys, monkeypatch):
    from diffalign.cli.main import main
    from diffalign.world.captions import prompts
    from diffalign.world.scorer import WorldReward

    found = {}

    def serve_one(self):
        def use():
            judge = load_scorer(f"remote=http://127.0.0.1:{self.server_address[1]}")
            image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))
            found["name"], found["unit"] = judge.name, judge.unit
            found["scores"] = (
                judge.score([image], prompts("heldout")[:1]),
                WorldReward().score([image], prompts("heldout")[:1]),
            )
            self.shutdown()

        thread = Thread(target=use)
        thread.start()
        super(ScorerServer, self).serve_forever(0.01)
        thread.join()

    monkeypatch.setattr(ScorerServer, "serve_forever", serve_one)
    main(["serve-scorer", "world", "--port", "0"])
    assert found["name"] == "world"
    assert "true reward" in found["unit"]
    torch.testing.assert_close(found["scores"][0].float(), found["scores"][1].float(), atol=0, rtol=0)
    assert "--scorer remote=http://127.0.0.1:" in capsys.readouterr().out
