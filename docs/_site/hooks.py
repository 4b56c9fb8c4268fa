"""What the site adds to the pages of docs/ when mkdocs builds it: code from the source, equations, links out of docs/.

- A paragraph "[Source of `DiffusionDPO.score`](../diffalign/objectives/dpo.py)" becomes the source of that function or
  class. A name that does not exist ends the build.
- A paragraph "[Arena lines of `dpo`](arena.md#results)" becomes a table of what the arena measured of that method.
- `$$ … $$` is LaTeX. It becomes MathML, which browsers render without a script and without a network.
- Pages link to files of the repository by relative paths, so that the links work on GitHub. On the site a link to a
  picture or to an HTML report is copied into the site; any other file is linked in the repository.
"""

from __future__ import annotations

import ast
import posixpath
import re
import textwrap
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
ARENA = "docs/arena.md"
COPIED = ("assets/**/*.png", "benchmarks/results/*.html")  # files of the repository that the site carries
FOLDER = "repository"  # where it carries them
SOURCE = re.compile(r"^\[Source of `([\w.]+)`\]\(([\w./]+\.py)\)$", re.MULTILINE)
MEASURED = re.compile(r"^\[Arena lines of `(\w+)`\]\([\w./]*arena\.md#results\)$", re.MULTILINE)
MATH = re.compile(r"^\$\$\n(.+?)\n\$\$$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(?<=\]\()([^)\s#]+)(#[^)\s]*)?(?=\))")
OUTSIDE_CODE = re.compile(r"(```.*?```|(?:^    [^\n]*\n?)+)", re.MULTILINE | re.DOTALL)


def on_files(files: Files, config: Any) -> Files:
    """Adds the repository's pictures and reports to the site."""
    for pattern in COPIED:
        for path in sorted(ROOT.glob(pattern)):
            name = path.relative_to(ROOT).as_posix()
            files.append(File.generated(config, f"{FOLDER}/{name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """The page as mkdocs renders it."""
    markdown = SOURCE.sub(lambda found: source(in_repository(found[2], page.file.src_uri), found[1]), markdown)
    markdown = MEASURED.sub(lambda found: arena_lines(found[1]), markdown)
    parts = OUTSIDE_CODE.split(markdown)
    for n in range(0, len(parts), 2):  # every other part is code
        parts[n] = MATH.sub(lambda found: f"<div class=equation>{mathml(found[1])}</div>", parts[n])
        parts[n] = LINK.sub(lambda found: target(found[1], page.file.src_uri, config) + (found[2] or ""), parts[n])
    return "".join(parts)


def arena_lines(name: str) -> str:
    """A table of the method's lines in the comparisons of docs/arena.md, which a test compares with the record."""
    views = (ROOT / ARENA).read_text(encoding="utf-8").split("\n### ")[1:]
    lines, first = [], views[0].partition(":")[0]
    for view in views:
        heading, *rows = view.splitlines()
        cells = [row.strip("|").split("|")[1:] for row in rows if row.startswith(f"| `{name}` |")]
        if not cells and not heading.startswith(f"{first}:"):
            continue  # a method whose judge learned the first preference has no part in the second
        if not cells:
            raise PluginError(f"{ARENA} has no line of {name} under {heading}")
        del cells[0][4]  # the gain in the other reward
        lines.append("|".join(["", f" {heading} ", *cells[0], ""]))
    head = "| comparison | gain in reward (dR) | win rate | accuracy | diversity | steps | UNet forwards | CPU s |"
    return "\n".join([head, "|---|---|---|---|---|---:|---:|---:|", *lines])


def source(file: str, name: str) -> str:
    """A block with the text of a function or class of a file; `name` is its dotted name inside the module."""
    text = (ROOT / file).read_text(encoding="utf-8")
    node: ast.AST = ast.parse(text)
    for part in name.split("."):
        found = [x for x in getattr(node, "body", []) if getattr(x, "name", None) == part]
        if not found:
            raise PluginError(f"{file} has no {name}: a page of docs/ shows its source")
        node = found[0]
    first = min([node.lineno, *(x.lineno for x in getattr(node, "decorator_list", []))])  # type: ignore[attr-defined]
    lines = text.splitlines()[first - 1 : node.end_lineno]  # type: ignore[attr-defined]
    return f'```python title="{file}"\n' + textwrap.dedent("\n".join(lines)) + "\n```"


def mathml(latex: str) -> str:
    """One displayed equation on one line, so that Markdown leaves it alone."""
    return convert(latex.strip(), display="block").replace("\n", "")


def target(link: str, page: str, config: Any) -> str:
    """Where a link of a page leads on the site. Raises for a file that does not exist."""
    if re.match(r"[a-z]+:", link):
        return link
    path = in_repository(link, page)
    if path.startswith("docs/"):
        return link  # mkdocs checks it
    if not (ROOT / path).exists():
        raise PluginError(f"docs/{page} links to {link}, which does not exist")
    if any(Path(path).match(pattern.replace("**/", "*/")) for pattern in COPIED):
        return posixpath.relpath(f"{FOLDER}/{path}", posixpath.dirname(page) or ".")
    kind = "tree" if (ROOT / path).is_dir() else "blob"
    return f"{config['extra']['repository']}/{kind}/main/{path}"


def in_repository(link: str, page: str) -> str:
    """The path from the root of the repository of what a page links to by a relative path."""
    return posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), link))
