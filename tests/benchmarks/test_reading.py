"""The counts of `benchmarks/reading.py` on small sources; and that each benchmark and result is of use to somebody."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from benchmarks.reading import (
    AIMS,
    PACKAGE,
    TWICE,
    functions,
    parameters,
    shared_names,
    table,
    takes_more_than_it_reads,
)

ROOT = Path(__file__).parents[2]
BENCHMARKS = sorted(p.stem for p in (ROOT / "benchmarks").glob("*.py") if p.stem != "__init__")
RESULTS = sorted(p.name for p in (ROOT / "benchmarks/results").iterdir())


def only(source: str) -> ast.FunctionDef:
    (function,) = functions(ast.parse(source))
    assert isinstance(function, ast.FunctionDef)
    return function


@pytest.mark.parametrize(
    ("source", "more"),
    [
        ("def f(run: Run): return run.seed + run.step", True),
        ("def f(run: Run): return run.a + run.b + run.c + run.d", False),
        ("def f(run: Run): return g(run)", False),
        ("def f(run: Run): ...", False),
        ("def f(step: Step): return step.index", False),
    ],
)
def test_reading_few_fields_of_a_whole(source: str, more: bool) -> None:
    assert takes_more_than_it_reads(only(source)) == more


def test_self_is_no_parameter() -> None:
    assert [arg.arg for arg in parameters(only("def f(self, a, *, b=1): return a"))] == ["a", "b"]


def test_names_are_shared_unless_one_protocol_or_a_class_gives_them() -> None:
    def named(**files: str) -> list[str]:
        return shared_names({PACKAGE / key.replace("__", "/"): ast.parse(source) for key, source in files.items()})

    layout, score = "def layout(): return 1", "class C:\n    def score(self): return 1"
    assert named(data__formats__a=layout, data__formats__b=layout) == []
    assert named(data__formats__a=layout, data__c=layout) == ["layout"]
    assert named(a="def table(): return 1", b="def table(): return 2") == ["table"]
    assert named(a=score, b=score.replace("C", "D")) == []
    assert named(a="def _hidden(): return 1", b="def _hidden(): return 2") == []


def test_the_table_says_whether_an_aim_is_met() -> None:
    rows = table({TWICE: AIMS[TWICE][1]}).splitlines() + table({TWICE: AIMS[TWICE][1] + 1}).splitlines()
    assert [row.split("|")[-2].strip() for row in rows if row.startswith(f"| {TWICE}")] == ["met", "missed"]


def pages() -> str:
    """What cites benchmarks: the documentation, the contributors' page, the Makefile."""
    return "".join(p.read_text() for p in [*(ROOT / "docs").rglob("*.md"), ROOT / "CONTRIBUTING.md", ROOT / "Makefile"])


def test_each_benchmark_is_cited_or_imported() -> None:
    code = "".join(p.read_text() for folder in ("benchmarks", "tests") for p in (ROOT / folder).rglob("*.py"))
    imported = set(re.findall(r"(?:from|import) benchmarks\.(\w+)", code))
    imported |= {name for names in re.findall(r"from benchmarks import ([\w, ]+)", code) for name in names.split(", ")}
    imported |= set(re.findall(r"^from (\w+) import", code, re.MULTILINE))  # scripts import the files beside them
    cited = set(re.findall(r"benchmarks[./](\w+)", pages()))
    assert [name for name in BENCHMARKS if name not in imported | cited] == []


def test_each_result_is_cited() -> None:
    cited = set(re.findall(r"benchmarks/results/(\w+)", pages()))
    assert [name for name in RESULTS if Path(name).stem not in cited] == []
