"""The words of configs: overrides from the command line, and faults as a user reads them."""

from __future__ import annotations

from typing import Any, get_args

import yaml
from pydantic import BaseModel

from diffalign.errors import DiffalignError
from diffalign.plugins import nearest

SWITCHES = ("objective.name", "source.name", "tuning.method")


class ConfigError(DiffalignError):
    """Everything that is wrong with a config, one fault a line."""


def override(tree: dict[str, Any], text: str) -> None:
    """Puts the value of `key.sub=value` into a config's tree. Raises ConfigError for another form."""
    key, found, value = text.partition("=")
    if not found or not key:
        raise ConfigError(f"override {text!r}: write key.sub=value, for example training.learning_rate=1e-5")
    *sections, leaf = key.split(".")
    node = tree
    for section in sections:
        node = node.setdefault(section, {})
        if not isinstance(node, dict):
            raise ConfigError(f"override {text!r}: {section} is a value, not a section")
    try:
        parsed = yaml.safe_load(value)
        if key in SWITCHES and node.get(leaf) != parsed:
            node.clear()  # another objective or method: the settings that the file has for its own are not meant for it
        node[leaf] = parsed
    except yaml.YAMLError as e:
        raise ConfigError(f"override {text!r}: the value is not valid YAML: {e}") from None


def describe(fault: Any, config: type[BaseModel]) -> str:
    """One fault of pydantic's as a user reads it: where, what, and what to write instead."""
    where = ".".join(str(part) for part in fault["loc"])
    if fault["type"] == "extra_forbidden":
        return f"{where}: unknown key{nearest(str(fault['loc'][-1]), _keys_at(config, fault['loc'][:-1]))}"
    if fault["type"] == "missing":
        return f"{where}: required, and missing"
    given = "" if fault["type"] == "value_error" or isinstance(fault["input"], dict) else f", got {fault['input']!r}"
    return f"{where + ': ' if where else ''}{message(fault)}{given}"


def message(fault: Any) -> str:
    """What is wrong, without pydantic's prefix."""
    return str(fault["msg"]).removeprefix("Value error, ")


def _keys_at(config: type[BaseModel], loc: tuple[Any, ...]) -> list[str]:
    section: Any = config
    for part in loc:
        section = section.model_fields[part].annotation
        # a section that may be null
        section = next((each for each in get_args(section) if hasattr(each, "model_fields")), section)
    return list(section.model_fields)
