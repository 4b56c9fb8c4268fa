"""`remote=URL`: a scorer behind the protocol of `protocol.py`, e.g. a judge that needs its own machine or packages.

    load_scorer("remote=http://127.0.0.1:8765")

Connections go to that host and port alone: no proxy, no redirect. A request that fails for a passing reason is tried
again; every other fault is an error with the address in it. The token of DIFFALIGN_SCORER_TOKEN is sent, and never
part of a message; over plain http it is sent to this machine only.
"""

from __future__ import annotations

import http.client
import os
import re
import ssl
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from urllib.parse import SplitResult, urlsplit

import torch
from PIL.Image import Image
from torch import Tensor

from diffalign.rewards.base import DEFAULT_TIE, ScorerError, check_lengths
from diffalign.rewards.remote.protocol import (
    LARGEST_ANSWER,
    LARGEST_REQUEST,
    TOKEN,
    encoded,
    read_health,
    read_object,
    read_scores,
    request_of,
)

LOOPBACK = ("localhost", "127.0.0.1", "::1")
AGAIN = (429, 500, 502, 503, 504)


@dataclass(frozen=True)
class Patience:
    """How long a request may take, and how often it is sent."""

    timeout: float = 120.0  # seconds for a whole request
    attempts: int = 5
    pause: float = 0.5  # seconds before the second attempt; doubled after each
    sleep: Callable[[float], None] = time.sleep


class Remote:
    """A scorer at an http(s) address; its name, unit, tie and span are the server's."""

    def __init__(self, url: str = "", *, patience: Patience | None = None) -> None:
        """Asks the server for its health. Raises ScorerError for an address that is wrong or does not answer."""
        self.address = _address(url)
        self.patience = patience or Patience()
        health = read_health(self._ask("GET", "/health"), f"{self._where('/health')}")
        self.name, self.unit, self.span, self.batch = health.name, health.unit, health.span, health.batch
        self.tie = DEFAULT_TIE if health.tie is None else health.tie

    def score(self, images: Sequence[Image], prompts: Sequence[str]) -> Tensor:
        """The server's scores, float64 [n]. Raises ScorerError naming the address and what it answered."""
        check_lengths(self.name, images, prompts)
        scores: list[float] = []
        for start in range(0, len(images), self.batch):
            some = [encoded(image) for image in images[start : start + self.batch]]
            scores += self._some(some, prompts[start : start + self.batch])
        return torch.tensor(scores, dtype=torch.float64)

    def _some(self, images: Sequence[str], prompts: Sequence[str]) -> list[float]:
        """Scores of a batch, in two halves where it would be too large for one request."""
        body = request_of(images, prompts)
        if len(body) > LARGEST_REQUEST and len(images) > 1:
            half = len(images) // 2
            return self._some(images[:half], prompts[:half]) + self._some(images[half:], prompts[half:])
        if len(body) > LARGEST_REQUEST:
            raise ScorerError(
                f"an image for {prompts[0]!r:.100} is too large for {self._where('/score')}; make it smaller"
            )
        return read_scores(self._ask("POST", "/score", body), len(images), self._where("/score"))

    def _ask(self, method: str, path: str, body: bytes | None = None) -> bytes:
        """The body of the answer, after as many attempts as needed."""
        pause, patience = self.patience.pause, self.patience
        for attempt in range(1, patience.attempts + 1):
            try:
                status, answer = self._once(method, path, body)
            except ssl.SSLCertVerificationError as error:
                raise ScorerError(f"{self._where(path)}: its certificate is not valid ({error.reason})") from error
            except (OSError, http.client.HTTPException) as error:
                fault = f"did not answer ({type(error).__name__}: {error})"
            else:
                if status == 200:
                    return answer
                fault = f"answered with status {status}{_said(answer)}"
                if status not in AGAIN:
                    raise ScorerError(f"{self._where(path)} {fault}")
            if attempt < patience.attempts:
                patience.sleep(pause)
                pause *= 2
        raise ScorerError(f"{self._where(path)} {fault}, {patience.attempts} times in a row; is the server running?")

    def _once(self, method: str, path: str, body: bytes | None) -> tuple[int, bytes]:
        """Status and body of one request. Raises OSError and HTTPException, and ScorerError for too long an answer."""
        end = time.monotonic() + self.patience.timeout
        kind = http.client.HTTPSConnection if self.address.scheme == "https" else http.client.HTTPConnection
        connection = kind(str(self.address.hostname), self.address.port, timeout=self.patience.timeout)
        try:
            connection.request(method, self.address.path + path, body, self._headers(body))
            response, parts, size = connection.getresponse(), [], 0
            while part := response.read1(65536):
                parts.append(part)
                size += len(part)
                if size > LARGEST_ANSWER:
                    raise ScorerError(f"{self._where(path)} gave more than {LARGEST_ANSWER:,} bytes; is it a scorer?")
                if time.monotonic() > end:
                    raise TimeoutError(f"no end of the answer after {self.patience.timeout:g} s")
            if response.length:
                raise http.client.IncompleteRead(b"", response.length)
            return response.status, b"".join(parts)
        finally:
            connection.close()

    def _headers(self, body: bytes | None) -> dict[str, str]:
        headers = {"Accept": "application/json"}
        if body is not None:
            headers["Content-Type"] = "application/json"
        if token := os.environ.get(TOKEN):
            if self.address.scheme == "http" and self.address.hostname not in LOOPBACK:
                raise ScorerError(
                    f"{TOKEN} is set, and {self._where('')} is plain http on another machine, where anyone between can "
                    f"read it: use https, or a tunnel (ssh -L 8765:127.0.0.1:8765 HOST), or unset {TOKEN}"
                )
            if not (token.isascii() and token.isprintable() and " " not in token):
                raise ScorerError(
                    f"the value of {TOKEN} has a character that a token cannot have (a line end or space?)"
                )
            headers["Authorization"] = f"Bearer {token}"
        return headers

    def _where(self, path: str) -> str:
        return f"scorer remote={self.address.geturl()}{path}"


def _address(url: str) -> SplitResult:
    """Scheme, host, port and path. Raises ScorerError for anything else."""
    try:
        found = urlsplit(url.rstrip("/"))
        wrong = found.scheme not in ("http", "https") or not found.hostname or found.port == 0
        wrong = wrong or not re.fullmatch(r"[!-~]*", found.path)  # what the first line of a request can have
        (found.hostname or "").encode("idna")  # as connecting does
    except ValueError:
        wrong = True
    if wrong:
        shown = "(address)" if set("@?#") & set(url) else repr(url)  # what stands there may be secret
        raise ScorerError(f"remote={shown}: write the address of a scorer, e.g. remote=http://127.0.0.1:8765")
    if found.username is not None or found.password is not None or found.query or found.fragment:
        raise ScorerError(
            f"the address of a remote scorer has no user, password, query or fragment; set {TOKEN} for a token"
        )
    return found


def _said(answer: bytes) -> str:
    """What an answer with an error says, shortened."""
    try:
        return f": {read_object(answer, '').get('error', '')!s:.300}"
    except ScorerError:
        return ""
