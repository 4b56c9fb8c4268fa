"""Types of config values: numbers with bounds, paths, strings.

YAML's values are taken as they are: no text becomes a number, no switch becomes 1, and no number becomes a switch or a
date. Every number is finite and has bounds, here or where a field narrows them.
"""

from __future__ import annotations

import logging
import re
import types
from typing import Annotated, Any, ClassVar, Union, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, model_validator

from diffalign.errors import DiffalignError
from diffalign.io.paths import expanded

log = logging.getLogger(__name__)

MOST = 10**9  # of anything that is counted: steps, pairs, images; far below the limits of int64 and of disks
LARGEST = 1e15  # of any other number: squares of it are finite in float32
LAST_SEED = 2**63 - 1  # torch's generators take 64 bits, its tensors 63


def _no_number(value: Any, what: str) -> None:
    """Raises DiffalignError for values that YAML does not read as a number."""
    if isinstance(value, bool):
        raise DiffalignError(f"{what} is required, and {str(value).lower()} is a boolean")
    if isinstance(value, str):
        hint = ""
        if re.fullmatch(r"[-+]?0\d+", value.strip()):  # octal in YAML 1.1, decimal in 1.2
            hint = f"; write {int(value)}, without leading zeros"
        elif re.fullmatch(r"[-+]?\d[\d_.]*([eE][-+]?\d+)?", value.strip()):
            hint = "; write it without quotes and separators"
        raise DiffalignError(f"{what} is required, and this is a string{hint}")


def _finite(value: Any) -> Any:
    _no_number(value, "a number")
    if isinstance(value, int | float) and not abs(value) <= LARGEST:
        raise DiffalignError(f"must be a finite number of at most {LARGEST:g} in size")
    return value


def _whole(value: Any) -> Any:
    _no_number(value, "an integer")
    if isinstance(value, float):
        if value != value or value in (float("inf"), float("-inf")) or value != int(value):
            raise DiffalignError("an integer is required")
        return int(value)  # 1e3
    return value


def text(value: Any) -> Any:
    """The string; an unquoted integer is accepted too (a revision, an id). Raises DiffalignError."""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, bool | float) or value is None:
        given = "null" if value is None else str(value).lower()
        raise DiffalignError(f"a string is required; put it in quotes if {given} is meant as one")
    if isinstance(value, str) and (odd := next((c for c in value if c == "\0" or 0xD800 <= ord(c) < 0xE000), None)):
        raise DiffalignError(f"the character U+{ord(odd):04X} is not allowed; delete it")
    return value


def _path(value: Any) -> Any:
    value = text(value)
    return expanded(value) if isinstance(value, str) else value


def _switch(value: Any) -> Any:
    """True or false, also as YAML 1.1 spelled them (yes, no, on, off). Raises DiffalignError for numbers."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        raise DiffalignError("a boolean is required; write true or false")
    return value


Switch = Annotated[bool, BeforeValidator(_switch)]
Number = Annotated[float, BeforeValidator(_finite)]
Whole = Annotated[int, BeforeValidator(_whole), Field(ge=-MOST, le=MOST)]
Fraction = Annotated[Number, Field(ge=0, le=1)]
Positive = Annotated[Number, Field(gt=0, le=LARGEST)]
NotNegative = Annotated[Number, Field(ge=0, le=LARGEST)]
Count = Annotated[int, BeforeValidator(_whole), Field(ge=1, le=MOST)]
CountOrNone = Annotated[int, BeforeValidator(_whole), Field(ge=0, le=MOST)]
MergeWeight = Annotated[Number, Field(ge=-100, le=100)]
Skipped = Annotated[int, BeforeValidator(_whole), Field(ge=0, le=100)]
Share = Annotated[Number, Field(ge=0, lt=1)]
Confidence = Annotated[Number, Field(gt=0.5, lt=1)]
Decay = Annotated[Number, Field(gt=0, lt=1)]
Guidance = Annotated[Number, Field(ge=0, le=1000)]
LearningRate = Annotated[Number, Field(gt=0, le=100)]
Workers = Annotated[int, BeforeValidator(_whole), Field(ge=0, le=1024)]
Seed = Annotated[int, BeforeValidator(_whole), Field(ge=0, le=LAST_SEED)]
Pixels = Annotated[int, BeforeValidator(_whole), Field(ge=8, le=16384, multiple_of=8)]
Text = Annotated[str, BeforeValidator(text)]
PathText = Annotated[str, BeforeValidator(_path)]


class Section(BaseModel):
    """A read-only mapping of settings without unknown keys.

    OLD_NAMES: former names of keys by which earlier versions know them, each with today's. A config may have either,
    and a warning names today's with the section's own key, KEY; a config that a run recorded is read without it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())
    KEY: ClassVar[str] = ""
    OLD_NAMES: ClassVar[dict[str, str]] = {}

    @model_validator(mode="before")
    @classmethod
    def _rename(cls, node: Any, info: ValidationInfo) -> Any:
        old = [name for name in cls.OLD_NAMES if isinstance(node, dict) and name in node]
        for name in old:
            new = cls.OLD_NAMES[name]
            if new in node:
                raise DiffalignError(f"{name} is the former name of {new}, and both are given; remove {name}")
            if not (info.context or {}).get("recorded"):
                log.warning("%s.%s is now called %s.%s; rename the key in the config", cls.KEY, name, cls.KEY, new)
        return {cls.OLD_NAMES.get(key, key): value for key, value in node.items()} if old else node


def strict(hint: Any, path: bool = False) -> Any:
    """A dataclass field's type with the same checks: `float | None` becomes `Number | None`.

    Objectives, sources and tuning methods are plain dataclasses of a lower level, which know nothing of YAML.
    path: a string is the path of a file or folder.
    """
    plain = {float: Number, int: Whole, bool: Switch, str: PathText if path else Text}
    if hint in plain:
        return plain[hint]
    parts = get_args(hint)
    if get_origin(hint) in (Union, types.UnionType):
        return Union[tuple(strict(part, path) for part in parts)]  # noqa: UP007 - made of a tuple
    if get_origin(hint) is tuple:
        return tuple[tuple(part if part is Ellipsis else strict(part, path) for part in parts)]  # type: ignore[misc]
    return hint
