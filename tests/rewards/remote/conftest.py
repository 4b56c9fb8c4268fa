"""A stand-in for a scorer elsewhere: each request is answered by the next item of a script."""

from __future__ import annotations

import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest

HEALTH = {"protocol": 1, "name": "judge", "unit": "points", "tie": 0.5, "span": [0, 10], "batch": 2}


class StandIn(ThreadingHTTPServer):
    """`script`: answers to POST, each (status, body) or a function of the handler; `requests`: what was sent."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.health, self.script, self.requests = (200, json.dumps(HEALTH).encode()), [], []
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.answer(self.server.health)

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.requests.append((dict(self.headers), json.loads(body)))
        self.answer(self.server.script.pop(0))

    def answer(self, item):
        if callable(item):
            item(self)
            return
        status, body, *headers = item
        self.send_response(status)
        for name, value in headers:
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format, *args):
        pass


@pytest.fixture
def serve():
    """Runs servers until the end of a test."""
    running = []

    def start(server):
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        running.append((server, thread))
        return server

    yield start
    for server, thread in running:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def stand_in(serve):
    return serve(StandIn())
