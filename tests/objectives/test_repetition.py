"""No two objective files have long passages that are alike except for names and numbers."""

from __future__ import annotations

import ast
import difflib
import itertools
import re
from pathlib import Path

import diffalign.objectives

FILES = sorted(Path(diffalign.objectives.__file__).parent.glob("*.py"))
PASSAGE = 3  # lines in a row that count; fewer are grammar, not repetition
MOST = 15  # of two files together


def shapes(source: str) -> list[str]:
    """The lines of code after the imports, without docstrings, declarations, names, strings and numbers."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.Module) and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
        if isinstance(node, ast.ClassDef):  # a field or a trait is a declaration of its own
            node.body = [each for each in node.body if not isinstance(each, ast.AnnAssign)]
    tree.body = [node for node in tree.body if not isinstance(node, ast.Import | ast.ImportFrom)]
    lines = ast.unparse(tree).splitlines()
    return [re.sub(r"'[^']*'|\"[^\"]*\"|[A-Za-z_]\w*|[\d.]+", "x", line) for line in lines if line.strip()]


def shared(one: str, two: str) -> int:
    """Lines of passages that both files have."""
    blocks = difflib.SequenceMatcher(None, shapes(one), shapes(two), autojunk=False).get_matching_blocks()
    return sum(block.size for block in blocks if block.size >= PASSAGE)


def test_no_two_objectives_repeat_each_other() -> None:
    texts = {path.name: path.read_text() for path in FILES}
    found = {(a, b): shared(texts[a], texts[b]) for a, b in itertools.combinations(texts, 2)}
    assert {pair: n for pair, n in found.items() if n > MOST} == {}


def test_a_copy_under_another_name_is_found() -> None:
    text = (FILES[0].parent / "kto.py").read_text()
    assert shared(text, text.replace("KTO", "Other").replace("beta", "scale")) > MOST
