"""Pages in a headless Chromium: `browse(target)` opens one, and fails on any console error or request to elsewhere.

A test that uses the fixture `browse` is marked `browser`, and skipped where there is no Chromium, Chrome or playwright.
"""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
CHROMIUM = next((found for name in NAMES if (found := shutil.which(name))), None)
# no sandbox: containers run as root; the rest: Chrome asks nothing of its makers
ARGUMENTS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-dev-shm-usage"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]
SECONDS = 60  # after which a page that does not answer is a failure

Browse = Callable[..., AbstractContextManager[Any]]


def missing() -> str | None:
    """Why tests of pages cannot run, or None."""
    if CHROMIUM is None:
        return f"no browser: none of {', '.join(NAMES)} is installed"
    if importlib.util.find_spec("playwright") is None:
        return "playwright is not installed"
    return None


def foreign(url: str, target: str) -> bool:
    """Whether a request goes elsewhere than to the page's own file or server."""
    if url.startswith(("data:", "blob:", "about:")):
        return False
    if target.startswith("file:"):
        return url.partition("#")[0] != target.partition("#")[0]
    return urlsplit(url)[:2] != urlsplit(target)[:2]


@contextmanager
def visit(browser: Any, target: str | Path, **context: Any) -> Iterator[Any]:
    """The playwright page of a file or address; `context` is playwright's, e.g. color_scheme="dark".

    Requests to elsewhere are aborted. Raises AssertionError at the end for each of them, and for console errors.
    """
    address = target.resolve().as_uri() if isinstance(target, Path) else target
    faults: list[str] = []
    session = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **context})
    try:
        session.set_default_timeout(SECONDS * 1000)
        session.route(lambda url: foreign(url, address), lambda route: route.abort())
        page = session.new_page()
        page.on("request", lambda r: faults.append(f"request to {r.url}") if foreign(r.url, address) else None)
        page.on("console", lambda m: faults.append(f"console: {m.text}") if m.type == "error" else None)
        page.on("pageerror", lambda error: faults.append(f"error: {error}"))
        page.goto(address)
        yield page
        page.evaluate("0")  # what the page reported before this has arrived
    finally:
        session.close()
    assert not faults, faults


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """One headless browser for all tests of a worker."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield chromium
        chromium.close()


@pytest.fixture
def browse(browser: Any) -> Browse:
    """`with browse(path_or_url, **context) as page: ...`, see `visit`."""
    return lambda target, **context: visit(browser, target, **context)
