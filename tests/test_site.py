"""The documentation site: it builds strictly, offline and from the sources alone, and loads nothing external."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mkdocs", reason="the site is built with the packages of the extra docs")

ROOT = Path(__file__).parent.parent
LOADED = re.compile(r'<(?:script|img|iframe)[^>]*\ssrc="(https?:[^"]*)|<link[^>]*\shref="(https?:[^"]*)')


def build(out: Path, root: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """`make docs`, with sockets that refuse and a torch that cannot be imported."""
    (out.parent / "offline").mkdir(exist_ok=True)
    (out.parent / "offline/sitecustomize.py").write_text(
        "import socket, sys\n"
        "def refuse(*_): raise OSError('the site is built without a network')\n"
        "socket.socket.connect = refuse\n"
        "sys.modules['torch'] = None\n"
    )
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)]
    env = {**os.environ, "PYTHONPATH": str(out.parent / "offline"), "NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("site") / "built"
    done = build(out)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "WARNING" not in done.stderr
    return out


def test_every_page_is_there(site: Path) -> None:
    pages = {p.relative_to(ROOT / "docs").as_posix() for p in (ROOT / "docs").rglob("*.md")}
    built = {page.removesuffix("README.md") if page.endswith("README.md") else page[:-3] + "/" for page in pages}
    assert sorted(page for page in built if not (site / page / "index.html").is_file()) == []


def test_no_markup_is_left_in_the_text(site: Path) -> None:
    """Front matter and attribute lists only work on lines of their own; elsewhere readers would see them."""
    marks = re.compile(r"<p>--- |\{ ?\.\w+ ?\}</p>")
    assert [p.relative_to(site).as_posix() for p in site.rglob("*.html") if marks.search(p.read_text("utf-8"))] == []


def test_every_public_name_is_in_the_reference() -> None:
    import diffalign

    text = "".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs/reference").glob("*.md"))
    names = set(diffalign.__all__) - {"__version__"}
    assert sorted(x for x in names if f"::: diffalign.{x}\n" not in text and f"`{x}`" not in text) == []


def test_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    found = {p.name: LOADED.findall(p.read_text(encoding="utf-8")) for p in site.rglob("*.html")}
    assert {name: urls for name, urls in found.items() if urls and name != "arena.html"} == {}


def build_with(line: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """The site with one more line on a page."""
    for path in ROOT.iterdir():
        if path.name != "docs" and not path.name.startswith("."):
            (folder / path.name).symlink_to(path)
    shutil.copytree(ROOT / "docs", folder / "docs")
    page = folder / "docs/world.md"
    page.write_text(page.read_text(encoding="utf-8") + f"\n{line}\n", encoding="utf-8")
    return build(folder / "built", folder)


def test_links_to_nowhere_fail(tmp_path: Path) -> None:
    """Each is a warning, and strict builds fail with one; other pages have none, as `site` says."""
    done = build_with("[x](nowhere.md) [x](data.md#no-such-heading)", tmp_path)
    assert done.returncode != 0
    warnings = [line for line in done.stderr.splitlines() if line.startswith("WARNING")]
    assert ["nowhere.md" in line or "no-such-heading" in line for line in warnings] == [True, True]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("[x](../no_such_folder)", "no_such_folder, which does not exist"),
        ("\n[Source of `DiffusionDPO.gone`](../diffalign/objectives/dpo.py)", "has no DiffusionDPO.gone"),
        ("\n[Arena lines of `gone`](arena.md#results)", "has no line of gone"),
    ],
)
def test_a_broken_page_fails(line: str, said: str, tmp_path: Path) -> None:
    done = build_with(line, tmp_path)
    assert done.returncode != 0
    assert said in done.stderr
