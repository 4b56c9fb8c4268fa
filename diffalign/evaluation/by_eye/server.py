"""The page's server: HTTP on 127.0.0.1 for one annotator, until it is stopped or everything is judged.

Python's own `http.server`: seven addresses, one reader, answers of a few kilobytes, and nothing to install before
somebody can judge. What matters here is what is refused, and no web framework does that unasked:

- every path begins with a random token; a request without it is answered with 404, whatever it asks for;
- the host must be this machine's (a page elsewhere that resolves its name to 127.0.0.1 is refused), and the origin,
  where a browser states one, the page's own;
- images are named by two numbers, so no path comes from outside; they are encoded anew.
"""

from __future__ import annotations

import hmac
import json
import logging
import os
import re
import secrets
import sys
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from diffalign.data.row import ImageError
from diffalign.errors import DiffalignError
from diffalign.evaluation.by_eye.session import RequestError, Session
from diffalign.evaluation.by_eye.votes import StaleError

log = logging.getLogger(__name__)

LOOPBACK = "127.0.0.1"
PORT = 8765  # tried first, so that the address stays the same from day to day
_HOSTS = (LOOPBACK, "localhost", "[::1]")  # how a browser may name this machine, also through an SSH tunnel
_LONGEST = 4096  # bytes of a request's content
_IMAGE = re.compile(r"image/([0-9]{1,9})/([01])")
_ALWAYS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "frame-ancestors 'none'; base-uri 'none'; form-action 'none'; object-src 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


class PageServer(ThreadingHTTPServer):
    """Serves the page of a session.

    page: its HTML. finish: called when the annotator ends a session in which everything is judged; its text is shown.
    port: None for PORT, or any free one. Raises DiffalignError for a port that is in use.
    """

    daemon_threads = True  # an open connection of a browser does not hold up the end
    allow_reuse_address = os.name != "nt"  # at once after a kill; on Windows it would share a port that is in use

    def __init__(self, session: Session, page: str, finish: Callable[[], str], port: int | None = None) -> None:
        self.session, self.page, self.finish = session, page.encode(), finish
        self.token = secrets.token_urlsafe(24)
        self.finished: str | None = None  # what `finish` returned
        self._once = threading.Lock()
        try:
            super().__init__((LOOPBACK, PORT if port is None else port), PageHandler)
        except OSError as error:
            if port is not None:
                raise DiffalignError(f"--port {port}: {error.strerror}; give another one, or leave it out") from None
            super().__init__((LOOPBACK, 0), PageHandler)

    @property
    def url(self) -> str:
        """The address of the page, with the token."""
        return f"http://{LOOPBACK}:{self.server_port}/{self.token}/"

    def end(self) -> str:
        """The result, made once. Raises what `finish` raises."""
        with self._once:
            if self.finished is None:
                self.finished = self.finish()
            return self.finished

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that goes away is no error; others are printed."""
        if not isinstance(sys.exc_info()[1], ConnectionError | TimeoutError):
            super().handle_error(request, client_address)


class PageHandler(BaseHTTPRequestHandler):
    """One connection."""

    server: PageServer
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "diffalign", ""
    timeout = 120  # seconds for which an idle connection stays open

    def do_GET(self) -> None:
        """The page, the state, or an image."""
        if (path := self._allowed()) is None:
            return
        if path == "":
            self._answer(200, self.server.page, "text/html; charset=utf-8")
        elif path == "state":
            self._json(200, self.server.session.state())
        elif (found := _IMAGE.fullmatch(path)) is not None:
            self._image(int(found[1]), int(found[2]))
        else:
            self._answer(404)

    def do_POST(self) -> None:
        """A vote, an undo, or the end."""
        if (path := self._allowed()) is None:
            return
        if (request := self._request()) is None:
            return
        session = self.server.session
        try:
            if path == "vote":
                self._json(200, session.vote(request))
            elif path == "undo":
                self._json(200, session.undo(request))
            elif path == "finish" and session.done:
                self._json(200, {"report": self.server.end()})
                threading.Thread(
                    target=self.server.shutdown
                ).start()  # it waits for the loop that this thread is not in
            else:
                self._answer(404)
        except StaleError as error:
            self._json(200, {**session.state(), "stale": str(error)})  # no fault: another window was faster
        except RequestError as error:
            self._json(400, {"error": str(error)})
        except (OSError, DiffalignError) as error:  # a full disk, an image that has gone
            self._json(507, {"error": str(error)})

    def parse_request(self) -> bool:
        """False where nothing is to be done: of other methods nothing is known."""
        if not super().parse_request():
            return False
        if self.command not in ("GET", "POST"):
            self._refuse(404)
            return False
        return True

    def log_message(self, format: str, *args: Any) -> None:
        """Requests are not logged: their paths contain the token."""

    def _allowed(self) -> str | None:
        """The path behind the token; None where the request was refused."""
        hosts = self.headers.get_all("Host") or []
        name = hosts[0].rpartition(":")[0] if re.search(r":\d+$", "".join(hosts)) else "".join(hosts)
        origin, site = self.headers.get("Origin"), self.headers.get("Sec-Fetch-Site")
        path = self.path.partition("?")[0]
        token, slash, rest = path[1:].partition("/")
        if not hmac.compare_digest(token.encode(), self.server.token.encode()) or not slash:
            self._refuse(404)
        elif (
            len(hosts) != 1
            or name.lower() not in _HOSTS
            or site not in (None, "same-origin", "none")
            or (origin is not None and origin != f"http://{hosts[0]}")
        ):
            self._refuse(403)
        else:
            return rest
        return None

    def _refuse(self, status: int) -> None:
        """The content of the request is not read, so the connection ends."""
        self.close_connection = True
        self._answer(status)

    def _request(self) -> dict[str, Any] | None:
        """The JSON object of a request; None where it was refused."""
        length = self.headers.get("Content-Length", "")
        kind = self.headers.get("Content-Type", "").partition(";")[0].strip()
        if not re.fullmatch(r"[0-9]{1,6}", length) or int(length) > _LONGEST or kind != "application/json":
            self._refuse(400)
            return None
        try:
            found = json.loads(self.rfile.read(int(length)))
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict):
            self._answer(400)
            return None
        return found

    def _image(self, place: int, side: int) -> None:
        try:
            self._answer(200, self.server.session.image(place, side), "image/png")
        except RequestError:
            self._answer(404)
        except (ImageError, OSError) as error:
            log.warning("%s", error)  # here and not on the page: it names the file, and so whose image it is
            self._json(410, {"error": "This image cannot be read; the terminal says why"})

    def _json(self, status: int, value: Any) -> None:
        self._answer(status, json.dumps(value).encode(), "application/json")

    def _answer(self, status: int, content: bytes = b"", kind: str = "text/plain") -> None:
        self.send_response(status)
        for name, value in {**_ALWAYS, "Content-Type": kind, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
