"""YAML as configs use it: the types of YAML 1.2, each key once, no tags, and messages with the line.

`yes`, `no`, `on`, `off`, `1:30` and `2024-01-01` are texts, `1e-5` is a number, and `010` is a text, because YAML 1.1
reads it as 8 and YAML 1.2 as 10. Merge keys (`<<: *name`) and aliases are read; each alias is a copy of its own.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from diffalign.errors import DiffalignError

MOST_NODES = 20_000  # of a config, aliases counted at each use
DEEPEST = 32  # sections in sections
DIGITS = 400  # of an integer; Python reads no more than 4300
MERGE = "tag:yaml.org,2002:merge"


class ConfigError(DiffalignError):
    """All errors of a config, one per line."""


_KINDS = {
    "null": re.compile(r"(~|null|Null|NULL|)"),
    "bool": re.compile(r"(true|True|TRUE|false|False|FALSE)"),
    "int": re.compile(r"[-+]?(0|[1-9][0-9]*)"),
    "float": re.compile(
        r"[-+]?(\.[0-9]+|(0|[1-9][0-9]*)(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
    ),
}
_PREFIX = "tag:yaml.org,2002:"


class _Loader(yaml.SafeLoader):
    """Composes nodes; what they stand for is decided by `scalar`."""

    def compose_scalar_node(self, anchor: Any) -> yaml.ScalarNode:
        quoted = self.peek_event().tag == _PREFIX + "str"
        node = super().compose_scalar_node(anchor)
        node.style = node.style or ("'" if quoted else None)  # !!str 5 is the text 5
        return node


_Loader.yaml_implicit_resolvers = {"<": [(MERGE, re.compile("^<<$"))]}


class _Dumper(yaml.SafeDumper):
    """Quotes whatever either version of YAML would not read as a string."""


_Dumper.yaml_implicit_resolvers = {k: list(found) for k, found in yaml.SafeDumper.yaml_implicit_resolvers.items()}

for _kind, _pattern in _KINDS.items():
    _Dumper.add_implicit_resolver(
        _PREFIX + _kind, re.compile(f"^(?:{_pattern.pattern})$"), list("-+.0123456789~nNtTfF")
    )


def scalar(text: str) -> Any:
    """The value of an unquoted word: null, a boolean, a number or a string."""
    kind = next((kind for kind, pattern in _KINDS.items() if pattern.fullmatch(text)), "str")
    if kind == "null":
        return None
    if kind == "bool":
        return text.lower() == "true"
    if kind == "int" and len(text) <= DIGITS:
        return int(text)
    if kind in ("int", "float"):
        return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    return text


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a file. Raises ConfigError with the file and the line."""
    raw = path.read_bytes()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ConfigError(
            f"{path}, line {line}: byte 0x{raw[error.start]:02x} is not UTF-8; save the file as UTF-8"
        ) from None
    tree = parse_yaml(text, str(path))
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: a config is a mapping of sections, got {type(tree).__name__}")
    return tree


def parse_yaml(text: str, where: str) -> Any:
    """The value of one document. Raises ConfigError with `where` and the line."""
    try:
        node = yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = "" if mark is None else f", line {mark.line + 1}, column {mark.column + 1}"
        what = " ".join(word for word in (error.context, error.problem) if word)
        hint = "; indent with spaces, not tabs" if "'\\t'" in what else ""
        raise ConfigError(f"{where}{line}: not valid YAML: {what}{hint}") from None
    except yaml.reader.ReaderError as error:
        number = text.count("\n", 0, error.position) + 1
        raise ConfigError(
            f"{where}, line {number}: not valid YAML: the character U+{ord(text[error.position]):04X} is not allowed; "
            "delete it"
        ) from None
    except RecursionError:
        raise ConfigError(f"{where}: not valid YAML: brackets are nested too deeply") from None
    return None if node is None else _Values(where).of(node)


def dump_yaml(tree: Any) -> str:
    """A tree as YAML that `parse_yaml` reads as the same tree."""
    return str(yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True))


def quoted(text: str) -> str:
    """A string as one line of YAML in double quotes, which `parse_yaml` reads as the same string."""
    return str(yaml.safe_dump(text, default_style='"', allow_unicode=True, width=10**9)).strip()


class _Values:
    """The values of the nodes of one document."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.nodes = 0

    def of(self, node: yaml.Node, depth: int = 0) -> Any:
        self.nodes += 1
        if depth > DEEPEST:
            raise self.fault(node, f"more than {DEEPEST} nested sections, or an alias inside its own anchor")
        if self.nodes > MOST_NODES:
            raise self.fault(
                node, f"more than {MOST_NODES} values, counting aliases at each use; no config needs so many"
            )
        tag = node.tag.removeprefix(_PREFIX)
        if isinstance(node, yaml.MappingNode) and tag == "map":
            return self.mapping(node, depth)
        if isinstance(node, yaml.SequenceNode) and tag == "seq":
            return [self.of(item, depth + 1) for item in node.value]
        if isinstance(node, yaml.ScalarNode) and tag == "str":
            if odd := next((c for c in node.value if c == "\0" or 0xD800 <= ord(c) < 0xE000), None):
                raise self.fault(node, f"the character U+{ord(odd):04X} is not allowed; delete it")
            return node.value if node.style else scalar(node.value)
        raise self.fault(node, f"the tag {node.tag!r} is not supported; write the value without it")

    def mapping(self, node: yaml.MappingNode, depth: int) -> dict[str, Any]:
        own: dict[str, Any] = {}
        merged: dict[str, Any] = {}
        lines: dict[str, int] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise self.fault(key, "a key is a string, not a list or mapping")
            name = key.value
            if name in lines:
                raise self.fault(key, f"{name!r} is given twice (first on line {lines[name]}); merge the two")
            lines[name] = key.start_mark.line + 1
            if key.tag == MERGE:
                several = isinstance(value, yaml.SequenceNode)
                for part in value.value if several else [value]:
                    if not isinstance(part, yaml.MappingNode):
                        raise self.fault(part, "<< takes the alias of a section (<<: *name), or a list of aliases")
                    merged = {**self.of(part, depth + 1), **merged}  # the first of a list wins
            else:
                own[name] = self.of(value, depth + 1)
        return {**merged, **own}

    def fault(self, node: yaml.Node, what: str) -> ConfigError:
        return ConfigError(f"{self.where}, line {node.start_mark.line + 1}: {what}")
