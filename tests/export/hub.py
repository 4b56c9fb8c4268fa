"""A stand-in for the Hub on loopback: the part of its API that a commit by huggingface_hub uses.

repos/create, models/ID, validate-yaml, preupload, the LFS batch with its upload, and the commit as lines of JSON.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_" + "s3cretOfAlice" * 3


class Hub:
    """What the stand-in has received."""

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, Any]] = {}  # id -> {"private": …, "files": {name: bytes}}
        self.objects: dict[str, bytes] = {}  # LFS: SHA-256 -> bytes
        self.requests: list[str] = []
        self.refusal: tuple[int, str] | None = None  # of commits: status and message
        self.url = ""

    def commit(self, repo: str, lines: list[dict[str, Any]]) -> None:
        files = self.repos[repo]["files"]
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.objects[value["oid"]]
            else:
                assert line["key"] == "header"

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, Any]:
        """Status and content of one request."""
        repo = "/".join(path.removeprefix("/api/models/").split("/")[:2])
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
            self.repos[name] = {"private": asked.get("visibility") == "private", "files": {}}
            return 200, {"url": f"{self.url}/{name}", "id": name}
        if path == "/api/validate-yaml":
            return 200, {"warnings": [], "errors": []}
        if path.endswith(".git/info/lfs/objects/batch"):
            objects = [
                one | {"actions": {"upload": {"href": f"{self.url}/lfs/{one['oid']}"}}}
                for one in json.loads(body)["objects"]
            ]
            return 200, {"transfer": "basic", "objects": objects}
        if path.startswith("/lfs/"):
            assert method == "PUT"
            assert hashlib.sha256(body).hexdigest() == path.removeprefix("/lfs/")
            self.objects[path.removeprefix("/lfs/")] = body
            return 200, {}
        if repo not in self.repos:
            return 404, {"error": "Repository not found"}
        if "/preupload/" in path:
            names = [one["path"] for one in json.loads(body)["files"]]
            modes = {name: "lfs" if name.endswith((".safetensors", ".jpg")) else "regular" for name in names}
            return 200, {"files": [{"path": n, "uploadMode": m, "shouldIgnore": False} for n, m in modes.items()]}
        if "/commit/" in path:
            if self.refusal is not None:
                return self.refusal[0], {"error": self.refusal[1]}
            self.commit(repo, [json.loads(line) for line in body.splitlines() if line.strip()])
            return 200, {"commitUrl": f"{self.url}/{repo}/commit/{'0' * 40}", "commitOid": "0" * 40, "success": True}
        return 200, {"id": repo, "private": self.repos[repo]["private"], "sha": "0" * 40, "siblings": []}


@contextmanager
def hub() -> Iterator[Hub]:
    """The stand-in, running on loopback."""
    state = Hub()

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            length = self.headers.get("Content-Length")
            body = self.rfile.read(int(length)) if length else self._chunks()
            state.requests.append(f"{self.command} {self.path}")
            signed = self.path.startswith("/lfs/")  # as the Hub signs the addresses of uploads
            if signed or self.headers["Authorization"] == f"Bearer {TOKEN}":
                status, content = state.answer(self.command, self.path.split("?")[0], body)
            else:
                status, content = 401, {"error": "a token is needed"}
            answer = json.dumps(content).encode()
            self.send_response(status)
            if status == 404:
                self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        do_GET = do_POST = do_PUT = answer  # noqa: N815 - the names that http.server calls

        def _chunks(self) -> bytes:
            found = b""
            if self.headers.get("Transfer-Encoding") == "chunked":
                while size := int(self.rfile.readline(), 16):
                    found += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
            return found

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
