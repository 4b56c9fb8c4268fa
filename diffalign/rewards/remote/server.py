"""A scorer of this package, or your own, behind the protocol of `protocol.py`, for `remote=URL`.

It listens on 127.0.0.1 alone; from another machine it is reached by a tunnel. Requests are scored one after another.
Where DIFFALIGN_SCORER_TOKEN is set, a request without that token is refused. Nothing is logged.
"""

from __future__ import annotations

import hmac
import json
import os
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock
from typing import Any

from diffalign.errors import DiffalignError
from diffalign.rewards.base import Scorer, ScorerError, span_of, tie_of
from diffalign.rewards.remote.protocol import BATCH, LARGEST_REQUEST, TOKEN, VERSION, read_request

HOSTS = ("127.0.0.1", "localhost")
PATIENCE = 60.0  # seconds until a connection that sends nothing is closed


class ScorerServer(ThreadingHTTPServer):
    """Serves one scorer until `shutdown`; `server_address` has the port, which is chosen where 0 was given."""

    daemon_threads = True
    allow_reuse_address = os.name != "nt"  # on Windows it would share a port that is in use

    def __init__(self, load: Callable[[], Scorer], port: int, unit: str = "") -> None:
        """Takes the port, then loads the scorer, which may need minutes; connections are accepted after that.

        Raises ScorerError for a port that cannot be used, and what `load` raises.
        """
        super().__init__(("127.0.0.1", port), _Handler, bind_and_activate=False)
        try:
            self._on_port(self.server_bind)
            self.scorer = scorer = load()
            self._on_port(self.server_activate)
        except BaseException:
            self.server_close()
            raise
        self.lock, self.token = Lock(), os.environ.get(TOKEN, "")
        span = span_of(scorer)
        self.health: dict[str, Any] = {"protocol": VERSION, "name": scorer.name, "unit": unit, "tie": tie_of(scorer)}
        self.health |= {"batch": BATCH} if span is None else {"batch": BATCH, "span": list(span)}

    def _on_port(self, act: Callable[[], None]) -> None:
        try:
            act()
        except OSError as error:
            port = self.server_address[1]
            raise ScorerError(f"port {port} cannot be used ({error.strerror}); take another one") from error


class _Handler(BaseHTTPRequestHandler):
    server: ScorerServer
    protocol_version = "HTTP/1.1"
    timeout = PATIENCE

    def do_GET(self) -> None:
        if self._refused():
            return
        if self.path == "/health":
            self._answer(200, self.server.health)
        else:
            self._answer(404, {"error": "there is GET /health and POST /score"})

    def do_POST(self) -> None:
        body = self._body()
        if body is None or self._refused():
            return
        if self.path != "/score":
            self._answer(404, {"error": "there is GET /health and POST /score"})
            return
        try:
            images, prompts = read_request(body)
            with self.server.lock:
                scores = [float(score) for score in self.server.scorer.score(images, prompts)]
        except DiffalignError as error:
            self._answer(400, {"error": str(error)})
        except Exception as error:  # of a scorer that is not ours: the client shows it, and may try again
            self._answer(500, {"error": f"{type(error).__name__}: {error}"[:300]})
        else:
            self._answer(200, {"protocol": VERSION, "scores": scores})

    def _body(self) -> bytes | None:
        """The body, read whole; None, with the connection to be closed, where it is too large or of another kind."""
        length = self.headers.get("Content-Length", "")
        wrong = not length.isdecimal() or int(length) > LARGEST_REQUEST
        if wrong or self.headers.get_content_type() != "application/json":  # a page in a browser cannot send that here
            self.close_connection = True
            self._answer(
                413 if wrong else 415, {"error": f"send JSON of at most {LARGEST_REQUEST:,} bytes, with its length"}
            )
            return None
        return self.rfile.read(int(length))

    def _refused(self) -> bool:
        """Whether a request lacks the token, or was meant for another host."""
        given = self.headers.get("Authorization", "").encode()
        if self.server.token and not hmac.compare_digest(given, f"Bearer {self.server.token}".encode()):
            self._answer(401, {"error": f"this scorer needs a token: set {TOKEN} to the server's"})
            return True
        if self.headers.get("Host", "").partition(":")[0] not in HOSTS:
            self._answer(421, {"error": "this server is reached as 127.0.0.1:PORT or localhost:PORT"})
            return True
        return False

    def _answer(self, status: int, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing is logged: prompts are private, and headers have the token."""
