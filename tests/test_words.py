"""Words that pages, docstrings, comments and messages of the package do not use, each with the one that they do use.

These words had a private meaning in earlier versions. Names in code and quoted `names` are not searched.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Word -> what to write. A pattern's lookarounds leave out the word's normal meaning.
WORDS = {
    r"house": "package, project",
    r"(?<!no )(?<!is )(?<!make )(?<!enough )rooms?(?! for| on)": "package",
    r"(?<!re)told(?! apart)": "receives, names",
    r"trial steps?": "dry run",
    r"encode caches?": "latent cache",
    r"half-made": "intermediate",
    r"former polic(?:y|ies)": "snapshot of the policy",
    r"for ever": "forever, without bound",
    r"mend(?:ed|s)?": "correct",
    r"kept (?:draws|errors|trajectories|points)": "repeated draws, cached errors, precomputed trajectories",
}
SEARCHED = [
    *("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/**/*.md", "assets/**/*.md", "training_configs/**/*.yaml"),
    *("diffalign/**/*.py", "examples/*.py"),
]
CODE = re.compile(r"`[^`\n]*`")


def texts(source: str) -> Iterator[tuple[int, str]]:
    """(line, text) of docstrings, comments and other strings of a Python file."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield from enumerate(node.value.split("\n"), node.lineno)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string


def faults(file: str, content: str) -> list[str]:
    """Each discouraged word of a file with its place and its replacement."""
    lines = texts(content) if file.endswith(".py") else enumerate(content.splitlines(), 1)
    return [
        f"{file}:{line}: {found.group()!r}; write {better}"
        for line, text in lines
        for word, better in WORDS.items()
        for found in re.finditer(rf"\b{word}\b", CODE.sub("", text), re.IGNORECASE)
    ]


def test_no_discouraged_word_is_used() -> None:
    files = sorted({path for pattern in SEARCHED for path in ROOT.glob(pattern)})
    assert len(files) > 200
    found = [fault for path in files for fault in faults(path.relative_to(ROOT).as_posix(), path.read_text())]
    assert found == []


@pytest.mark.parametrize(
    ("file", "content", "count"),
    [
        ("x.md", "the judge's room", 1),
        ("x.md", "a trial step of the encode cache", 2),
        ("x.md", "there is no room for it, and rooms on the disk", 0),
        ("x.md", "captions that can be told apart; `told`", 0),
        ("x.py", '"""What the network is told."""\ntold = 1  # kept errors\n', 2),
        ("x.py", 'raise ValueError(f"{x} is told")\n', 1),
    ],
)
def test_a_word_is_found(file: str, content: str, count: int) -> None:
    assert len(faults(file, content)) == count
