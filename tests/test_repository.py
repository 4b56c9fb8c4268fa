"""The repository as a whole: which files may be in it, and that the links of its pages have targets."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MEGABYTES = 12  # the emoji world's base model is the largest file
LINES = 400  # of a Python file; most are under 250
PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"}
NOT_OURS = {".git", ".venv", "venv", "runs", "build", "dist", "site", "__pycache__"}

# Absolute paths of somebody's machine. Tests and docs may use the temporary folder as an example.
HOMES = re.compile(rb"(?<![\w./:<-])/(work|root|home|Users|mnt|opt)/[\w.-]")
TEMPORARY = re.compile(rb"(?<![\w./:<-])/tmp/[\w.-]")
LINK = re.compile(r"\]\(([^)\s]+)\)")


def repository_files() -> list[Path]:
    """Tracked files and new ones that git does not ignore; without git (a source archive), whatever is there."""
    if (ROOT / ".git").exists():
        command = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
        names = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\0")
        files = [ROOT / name for name in names if name]
    else:
        found = (p for p in ROOT.rglob("*") if not NOT_OURS & set(p.relative_to(ROOT).parts))
        files = [p for p in found if not any(part.endswith(("_cache", ".egg-info")) for part in p.parts)]
    return sorted(p for p in files if p.is_file())


FILES = repository_files()
PAGES = [p for p in FILES if p.suffix == ".md"]


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def machine_paths(file: str, content: bytes) -> list[bytes]:
    """The absolute paths of a machine that a file mentions."""
    found = [m.group() for m in HOMES.finditer(content)]
    if not file.startswith(("tests/", "docs/")):
        found += [m.group() for m in TEMPORARY.finditer(content)]
    return found


def test_the_files_are_found() -> None:
    assert {"pyproject.toml", "diffalign/types.py", "tests/test_repository.py"} <= {name(p) for p in FILES}


def test_no_file_mentions_a_machine() -> None:
    assert {name(p): found for p in FILES if (found := machine_paths(name(p), p.read_bytes()))} == {}


@pytest.mark.parametrize(
    ("file", "text", "faults"),
    [
        ("diffalign/x.py", "open('" + "/ro" + "ot/x')", 1),
        ("README.md", "see " + "/wo" + "rk/x and /t" + "mp/y", 2),
        ("tests/x.py", "/t" + "mp/y", 0),
        ("docs/x.md", "https://example.org" + "/wo" + "rk/x", 0),
        ("Makefile", "#!/usr/bin/env bash", 0),
    ],
)
def test_machine_paths_are_seen(file: str, text: str, faults: int) -> None:
    assert len(machine_paths(file, text.encode())) == faults


def test_no_file_is_large() -> None:
    assert {name(p): p.stat().st_size for p in FILES if p.stat().st_size > MEGABYTES * 1e6} == {}


def test_no_pickles() -> None:
    """But the state of a checkpoint, which torch writes and which is read with `weights_only=True`."""
    assert [name(p) for p in FILES if p.suffix in PICKLES and p.name != "training_state.pt"] == []


def test_python_files_are_short() -> None:
    lengths = {name(p): p.read_text().count("\n") for p in FILES if p.suffix == ".py"}
    assert {file: n for file, n in lengths.items() if n >= LINES} == {}


def test_every_asset_has_the_command_that_writes_it() -> None:
    """assets/README.md holds, for each file, a command line with the file's path or a folder's above it."""
    readme = (ROOT / "assets" / "README.md").read_text()
    commands = " ".join(line for line in readme.splitlines() if re.search(r"(python -m )?\bdiffalign\b", line))
    written = {word.rstrip("/") for word in re.findall(r"assets/[\w./-]+", commands)}
    assets = [p.relative_to(ROOT) for p in FILES if name(p).startswith("assets/") and p.suffix != ".md"]
    assert assets
    assert [p.as_posix() for p in assets if not {x.as_posix() for x in (p, *p.parents)} & written] == []


def test_every_page_of_the_docs_is_in_the_index() -> None:
    """The index of the site, mkdocs.yml, which is read here without mkdocs."""
    index = set(re.findall(r"[\w/]+\.md", (ROOT / "mkdocs.yml").read_text().partition("\nnav:")[2]))
    pages = {p.relative_to(ROOT / "docs").as_posix() for p in PAGES if name(p).startswith("docs/")}
    assert sorted(pages - index) == []


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_relative_links_lead_to_files(page: Path) -> None:
    links = [link.partition("#")[0] for link in LINK.findall(page.read_text())]
    targets = [link for link in links if link and not re.match(r"[a-z]+:", link)]
    assert [link for link in targets if not (page.parent / link).exists()] == []


def test_no_figure_is_left_open() -> None:
    mark = "TODO" + "-"
    assert [name(p) for p in FILES if p.suffix in (".yaml", ".md", ".py") and mark in p.read_text()] == []


def test_pre_commit_has_the_tested_version_of_ruff() -> None:
    versions = set(re.findall(r"ruff==[\w.]+", (ROOT / ".pre-commit-config.yaml").read_text()))
    assert versions == set(re.findall(r"^ruff==[\w.]+", (ROOT / "constraints.txt").read_text(), re.MULTILINE))


def test_every_module_says_in_one_line_what_it_is_for() -> None:
    """The first line of its docstring is a module's description; a list of modules kept by hand would drift."""
    modules = [p for p in (ROOT / "diffalign").rglob("*.py") if p.name != "__init__.py"]
    first = {name(p): (ast.get_docstring(ast.parse(p.read_text())) or "").partition("\n")[0] for p in modules}
    assert {file: line for file, line in first.items() if len(line) < 20} == {}
