"""What `label --by-eye` and `compare --blind` share: their options, and the server from its start to its end."""

from __future__ import annotations

import argparse
import getpass
import os
import re
import sys
import webbrowser
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from diffalign.cli.common import LAST_SEED, count, whole
from diffalign.errors import DiffalignError

if TYPE_CHECKING:
    from diffalign.evaluation.by_eye.plan import Material
    from diffalign.evaluation.by_eye.sources import Selection


def by_eye_arguments(parser: argparse.ArgumentParser, flag: str) -> None:
    """Options of the page; each of them needs `flag`."""
    group = parser.add_argument_group(f"with {flag}")
    group.add_argument("--annotator", help="whose votes these are, for a file and an order of their own (default: you)")
    group.add_argument("--seed", type=whole(0, LAST_SEED), help="of the order and of the sides (default: 0)")
    group.add_argument("--limit", type=count, help="judge at most this many pairs, drawn by the seed")
    group.add_argument("--port", type=whole(1, 65535), help="of the page on 127.0.0.1 (default: 8765, or a free one)")
    group.add_argument("--no-browser", action="store_true", help="print the address, and open no browser")


def only_with(args: argparse.Namespace, flag: str, given: bool, names: tuple[str, ...]) -> None:
    """Raises DiffalignError for an option that needs `flag` (given: it is there) or that does not go with it."""
    for name in names:
        value = getattr(args, name.lstrip("-").replace("-", "_"))
        if value is not None and value is not False:
            raise DiffalignError(f"{name} {'does not go with' if given else 'needs'} {flag}")


NEEDS_PAGE = ("--annotator", "--seed", "--limit", "--port", "--no-browser")


def selection(args: argparse.Namespace, per_prompt: int | None = None) -> Selection:
    """Which comparisons are made."""
    from diffalign.evaluation.by_eye.sources import Selection

    return Selection(args.seed or 0, args.limit, per_prompt)


def annotator(args: argparse.Namespace) -> str:
    """Whose votes they are. Raises DiffalignError for a name that no file may have."""
    from diffalign.evaluation.by_eye.votes import check_annotator

    return check_annotator(args.annotator or _user())


def judge(args: argparse.Namespace, material: Material, votes: Path, result: Callable[[], str]) -> None:
    """Serves the page until everything is judged or Ctrl-C, then prints `result`'s text; it may raise.

    Raises DiffalignError where the folder `votes` belongs to other comparisons or another process of this annotator.
    """
    from diffalign.evaluation.by_eye.plan import store_plan
    from diffalign.evaluation.by_eye.server import PageServer
    from diffalign.evaluation.by_eye.session import Session
    from diffalign.io.folder_lock import folder_lock
    from diffalign.pages.by_eye import by_eye_page

    name = annotator(args)
    with folder_lock(votes, f"{name}'s votes", name=f".{name}.lock"):
        store_plan(votes, material.plan)
        session = Session(material, votes, name)
        for note in material.notes:
            print(note)
        print(f"{name}: {session.judged} of {len(session.order)} pairs are judged; votes: {session.log.file}")
        try:
            server = PageServer(session, by_eye_page(), result, args.port)
            try:
                _serve(args, server.url, server.server_port, server.serve_forever)
            finally:
                server.server_close()
        finally:
            session.close()
        print(server.finished if server.finished is not None else result())
        if not session.done:
            print(f"{len(session.order) - session.judged} pairs are left; the same command continues")


def _serve(args: argparse.Namespace, url: str, port: int, forever: Callable[[float], None]) -> None:
    print(f"judge at  {url}", flush=True)
    print(f"from another machine:  ssh -N -L {port}:127.0.0.1:{port} USER@THIS_MACHINE  and the same address there")
    print("Ctrl-C stops; every vote is stored", flush=True)
    if not args.no_browser and _has_screen():
        webbrowser.open(url)
    try:
        forever(0.1)
    except KeyboardInterrupt as stop:
        print()
        if getattr(stop, "signum", None) is not None:  # SIGTERM: as any command
            raise


def _has_screen() -> bool:
    """Whether a browser that is opened here is one that the user sees."""
    if "SSH_CONNECTION" in os.environ:
        return False
    return sys.platform in ("darwin", "win32") or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


def _user() -> str:
    """The user's name in letters that a file name may have."""
    try:
        name = re.sub(r"[^A-Za-z0-9_-]+", "", getpass.getuser()).lstrip("-_")[:40]
    except (OSError, KeyError, ImportError):
        name = ""
    return name or "me"
