"""Messages name existing settings: every `section.key` in a string of the package is a key of a config."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

import diffalign
from diffalign.config.schema import Config, PreferenceModelConfig
from diffalign.data.loader.spec import LoaderSpec
from diffalign.objectives import OBJECTIVES
from diffalign.objectives.modified import MODIFIERS
from diffalign.sources import SOURCES

PACKAGE = Path(diffalign.__file__).parent
FILES = ("json", "jsonl", "pth", "safetensors", "yaml", "py")  # "model.safetensors" names no setting
PYTHON_ONLY = {"with_uncond", "keep_ties", "eval_dataset"}  # said to whoever builds these objects in Python


def sections() -> dict[str, set[str]]:
    """The keys of each section of a config."""
    found: dict[str, set[str]] = {}
    for config in (Config, PreferenceModelConfig):
        for name, field in config.model_fields.items():
            annotation: Any = field.annotation
            parts = [each for each in (annotation, *get_args(annotation)) if hasattr(each, "model_fields")]
            for part in parts:
                found.setdefault(name, set()).update(part.model_fields)
    for name, known in (("objective", OBJECTIVES), ("source", SOURCES)):
        found[name] = {"name"}.union(*({field.name for field in fields(each)} for each in known.values()))
    found["objective"] |= MODIFIERS.keys()
    return found


def strings(nodes: Iterable[ast.AST]) -> Iterator[ast.Constant]:
    """Text constants among nodes, docstrings left out."""
    nodes = list(nodes)
    docs = {
        id(node.body[0].value)
        for node in nodes
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    for node in nodes:
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs:
            yield node


def unknown(text: str, known: dict[str, set[str]]) -> list[str]:
    """Names like `section.key` in a text that no config has."""
    if "." not in text:
        return []
    names = re.findall(rf"(?<![\w./-])({'|'.join(known)})\.([a-z_]+)(?![\w/(.])", text)
    return [f"{section}.{key}" for section, key in names if key not in known[section] and key not in FILES]


def test_a_planted_name_is_found() -> None:
    known = sections()
    assert unknown("set data.resolutoin or data.resolution; see model.safetensors", known) == ["data.resolutoin"]
    assert {"path", "split", "columns"} <= known["data"]
    assert "beta" in known["objective"]


def test_settings_in_messages_are_settings_of_configs() -> None:
    known = sections()
    nodes = {
        file.relative_to(PACKAGE): list(ast.walk(ast.parse(file.read_text(encoding="utf-8"))))
        for file in sorted(PACKAGE.rglob("*.py"))
    }
    wrong = [
        f"{file}:{text.lineno} {name}"
        for file, each in nodes.items()
        for text in strings(each)
        if not (PACKAGE / "cli" / f"{text.value.replace('.', '/')}.py").is_file()  # a module of a command
        for name in unknown(text.value, known)
    ]
    assert wrong == []
    # and no message speaks of an argument of a constructor, or of a field of a spec, that no config passes on
    arguments = {
        argument.arg
        for each in nodes.values()
        for node in each
        if isinstance(node, ast.FunctionDef) and node.name == "__init__"
        for argument in node.args.kwonlyargs
        if "_" in argument.arg
    } | {field.name for field in fields(LoaderSpec) if "_" in field.name}
    arguments -= set().union(*known.values()) | PYTHON_ONLY
    assert "max_unreadable" in arguments
    named = re.compile(rf"\b(?:{'|'.join(sorted(arguments))})\b")
    raised = [
        f"{file}:{text.lineno} {name}"
        for file, each in nodes.items()
        for node in each
        if isinstance(node, ast.Call) and getattr(node.func, "id", "").endswith("Error")
        for text in strings(ast.walk(node))
        for name in named.findall(text.value)
    ]
    assert raised == []
