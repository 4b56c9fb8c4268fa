"""Overrides from the command line, and validation errors as messages for users."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

from pydantic import BaseModel

from diffalign.config.strict_yaml import ConfigError, parse_yaml, scalar
from diffalign.io.plugins import nearest

SWITCHES = ("objective.name", "source.name", "tuning.method")
SHOWN = 200  # characters of a value in a message


def override(tree: dict[str, Any], texts: Sequence[str]) -> None:
    """Puts the values of `key.sub=value` arguments into a config's tree.

    Another objective or method comes first, for it takes the file's settings of the former one away. Raises
    ConfigError for a word of another form, and for a key that is given twice.
    """
    given: dict[tuple[str, ...], str] = {}
    for text in sorted(texts, key=lambda text: text.partition("=")[0] not in SWITCHES):
        keys = _keys(text)
        for other, former in given.items():
            if other[: len(keys)] == keys:
                raise ConfigError(f"overrides {former!r} and {text!r} set the same key; give it once")
        given[keys] = text
        _put(tree, keys, text)


def _keys(text: str) -> tuple[str, ...]:
    key, found, _ = text.partition("=")
    keys = tuple(key.split("."))
    if not found or any(not part or part != part.strip() for part in keys):
        raise ConfigError(f"override {text!r}: write key.sub=value, for example training.learning_rate=1e-5")
    return keys


def _put(tree: dict[str, Any], keys: tuple[str, ...], text: str) -> None:
    node = tree
    for section in keys[:-1]:
        if node.get(section) is None:  # not there, or null
            node[section] = {}
        node = node[section]
        if not isinstance(node, dict):
            raise ConfigError(f"override {text!r}: {section} is a value, not a section")
    leaf, value = keys[-1], _value(text)
    if ".".join(keys) in SWITCHES and node.get(leaf) != value:
        node.clear()  # another objective or method: the settings that the file has for its own are not meant for it
    node[leaf] = value


def _value(text: str) -> Any:
    """The value of an override: a list, mapping or quoted text as in YAML, anything else one word to its end."""
    value = text.partition("=")[2].strip()
    if not value.startswith(("[", "{", "'", '"')):
        return scalar(value)
    try:
        return parse_yaml(value, f"override {text!r}")
    except ConfigError as error:
        raise ConfigError(f"{error}; put a string that begins with {value[0]} in quotes") from None


def describe_fault(fault: Any, config: type[BaseModel]) -> str:
    """One pydantic error as a message: key, fault, and what to write instead."""
    where = ".".join(str(part) for part in fault["loc"])
    if fault["type"] == "extra_forbidden":
        return f"{where}: unknown key{nearest(str(fault['loc'][-1]), _keys_at(config, fault['loc'][:-1]))}"
    if fault["type"] == "missing":
        return f"{where}: required, but missing"
    if fault["type"] == "model_type":
        return f"{where}: this is a section, got {fault['input']!r}; write its settings below it, or remove it"
    given = repr(fault["input"])
    given = "" if isinstance(fault["input"], dict) or given in message(fault) else f", got {_short(given)}"
    return f"{where + ': ' if where else ''}{message(fault)}{given}"


def _short(text: str) -> str:
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"


def message(fault: Any) -> str:
    """The fault, without pydantic's prefix."""
    return str(fault["msg"]).removeprefix("Value error, ")


def _keys_at(config: type[BaseModel], loc: tuple[Any, ...]) -> list[str]:
    section: Any = config
    for part in loc:
        section = section.model_fields[part].annotation
        # a section that may be null
        section = next((each for each in get_args(section) if hasattr(each, "model_fields")), section)
    return list(section.model_fields)
