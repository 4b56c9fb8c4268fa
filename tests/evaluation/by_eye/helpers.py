"""Pairs of one-colour images for tests of the page by eye, and a server of them as a process or in a thread.

python -m tests.evaluation.by_eye.helpers FOLDER PAIRS      # prints the address; imports neither torch nor diffusers
"""

from __future__ import annotations

import io
import json
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from diffalign.data.row import ImageRef
from diffalign.evaluation.by_eye.plan import ImagePair, Kind, Material, VotePlan, store_plan
from diffalign.evaluation.by_eye.server import PageServer
from diffalign.evaluation.by_eye.session import Session
from diffalign.evaluation.by_eye.votes import Event
from diffalign.pages.by_eye import by_eye_page

SECRET = "hidden-model-name"  # in the names of the pairs and in the images' metadata; no answer may contain it


def png(grey: int, size: tuple[int, int] = (8, 8)) -> bytes:
    info, stream = PngInfo(), io.BytesIO()
    info.add_text("parameters", SECRET)
    Image.new("RGB", size, (grey,) * 3).save(stream, "PNG", pnginfo=info)
    return stream.getvalue()


def material(prompts: Sequence[str], kind: Kind = "blind") -> Material:
    """One pair of each prompt: the first image dark, the second light."""
    pairs = [ImagePair(f"id{i}", prompt, ("base", SECRET)) for i, prompt in enumerate(prompts)]
    images = {
        pair.id: (ImageRef(png(i), None, SECRET), ImageRef(png(255 - i), None, SECRET)) for i, pair in enumerate(pairs)
    }
    return Material(VotePlan(kind, 0, pairs), images.__getitem__)


def session(folder: Path, prompts: Sequence[str], annotator: str = "ana") -> Session:
    """A session whose folder has the plan."""
    made = material(prompts)
    store_plan(folder, made.plan)
    return Session(made, folder, annotator)


@contextmanager
def served(session: Session, finished: str = "the table") -> Iterator[PageServer]:
    """The server of a session, in a thread."""
    server = PageServer(session, by_eye_page(), lambda: finished)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
        session.close()


def post(url: str, what: str, content: Any) -> tuple[int, Any]:
    """(status, answer) of a request as the page makes it."""
    request = urllib.request.Request(url + what, json.dumps(content).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        text = error.read()
        return error.code, json.loads(text) if text else None


def event(pair: str, vote: str, *, left: int = 0, name: str = "") -> Event:
    return Event(name or f"event-{pair}-{vote}", pair, vote, left, 1.0, "2026-01-01T00:00:00Z")


if __name__ == "__main__":
    made = session(Path(sys.argv[1]), [f"prompt {i}" for i in range(int(sys.argv[2]))])
    server = PageServer(made, by_eye_page(), str)
    print(server.url, flush=True)
    server.serve_forever()
