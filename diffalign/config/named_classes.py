"""Nodes of a config that become a class chosen by name: objective, source and tuning method.

The class is a dataclass, and its fields are the node's other keys. A field's metadata may bound its value (`ge`, `gt`,
`le`, `lt`) or say that it is a path (`path`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache, partial
from typing import Annotated, Any, get_type_hints

from pydantic import Field, ValidationError, create_model

from diffalign.config.overrides import describe_fault
from diffalign.config.value_types import Section, strict
from diffalign.errors import DiffalignError
from diffalign.io.plugins import name_of, nearest, resolve
from diffalign.models.adapters.methods import TuningMethod, find_method, known_methods
from diffalign.objectives import OBJECTIVES
from diffalign.objectives.modified import MODIFIERS, Modified, Modifiers, modified, plain_objective

BOUNDS = ("ge", "gt", "le", "lt")
_NEEDED = {
    "objective": ("name", "paper", "needs_reference", "drawn", "scale_field", "probe", "score"),
    "source": ("name", "paper", "data", "gives", "own_reference", "build", "small"),
}


def parse_objective(node: Any) -> Any:
    """The objective called `name` with the node's modifiers (`objectives/modified.py`). Raises DiffalignError."""
    if isinstance(node, Modified):
        parse_named(node.objective, OBJECTIVES, "objective")
        return node
    if not isinstance(node, dict):
        return parse_named(node, OBJECTIVES, "objective")
    objective = parse_named({k: v for k, v in node.items() if k not in MODIFIERS}, OBJECTIVES, "objective", MODIFIERS)
    own = {f.name for f in dataclasses.fields(objective)}
    if clash := sorted(own & MODIFIERS.keys()):
        raise DiffalignError(
            f"objective {node['name']}: {', '.join(clash)} is the name of a modifier; rename the field"
        )
    given = {k: v for k, v in node.items() if k in MODIFIERS}
    return _make(partial(modified, objective), given, str(node["name"]), checked_by=Modifiers)


def plain_objective_node(objective: Any) -> dict[str, Any]:
    """An objective and those of its modifiers that are set, as YAML-ready values."""
    changes = objective.modifiers.changes if isinstance(objective, Modified) else {}
    return {**plain_named(plain_objective(objective), OBJECTIVES), **changes}


def parse_named(node: Any, known: Mapping[str, Any], what: str, others: Iterable[str] = ()) -> Any:
    """The objective or source called `name`, made from the node's other keys. Raises DiffalignError.

    others: keys that the node may have besides, for the message about an unknown one.
    """
    if dataclasses.is_dataclass(node) and not isinstance(node, type):
        _complete(node, what)
        name_of(type(node), known)  # a saved config must find it again
        return node
    if not isinstance(node, dict) or "name" not in node:
        raise DiffalignError(f"give a mapping with a name, one of: {', '.join(known)}")
    name = node["name"]
    cls = resolve(str(name), known, what)
    if not dataclasses.is_dataclass(cls):
        raise DiffalignError(f"{what} {name!r} is not a dataclass; make it one, its fields are its settings")
    _complete(cls, what)
    settings = {k: v for k, v in node.items() if k != "name"}
    allowed = [*(f.name for f in dataclasses.fields(cls)), *others]
    if faults := [f"{k}: {name} has no such setting{nearest(k, allowed)}" for k in settings if k not in allowed]:
        raise DiffalignError("; ".join(faults))
    make: Any = cls
    return _make(make, settings, str(name))


def parse_tuning(node: Any) -> TuningMethod:
    """The tuning method called `method` (lora without one), made from the node's other keys.

    Keys of other methods at their defaults are accepted, because configs of earlier versions have the keys of every
    method. Raises DiffalignError.
    """
    if isinstance(node, TuningMethod):
        find_method(node.method)  # a saved config must find it again, and its layout is known from here on
        return _make(type(node), _values(node), node.method)  # an object from Python is checked like a file
    if not isinstance(node, dict):
        raise DiffalignError(f"this is a section, got {node!r}; write its settings below it, or remove it")
    name = str(node.get("method", "lora"))
    cls: Any = find_method(name)
    own = [f.name for f in dataclasses.fields(cls)]
    others = {k: v for k, v in node.items() if k not in (*own, "method")}
    if faults := [fault for key, value in others.items() if (fault := _of_another(key, value, own))]:
        raise DiffalignError("; ".join(faults))
    return _make(cls, {k: v for k, v in node.items() if k in own}, name)


def plain_named(settings: Any, known: Mapping[str, Any]) -> dict[str, Any]:
    """A dataclass of settings with its name in a table, as YAML-ready values."""
    return {"name": name_of(type(settings), known), **plain_fields(settings)}


def plain_fields(settings: Any) -> dict[str, Any]:
    """The fields of a dataclass as YAML-ready values."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in _values(settings).items()}


def _of_another(key: str, value: Any, own: list[str]) -> str | None:
    """What is wrong with a key that the chosen tuning method does not have; None for another method's default."""
    defaults = {
        name: field.default
        for name, cls in known_methods().items()
        for field in getattr(cls, "__dataclass_fields__", {}).values()
        if field.name == key
    }
    if not defaults:
        return f"{key}: unknown key{nearest(key, own)}"
    if (tuple(value) if isinstance(value, list) else value) in defaults.values():
        return None
    return f"{key}: only tuning.method: {' or '.join(defaults)} has this setting; remove it"


def _make(make: Callable[..., Any], settings: dict[str, Any], name: str, checked_by: Any = None) -> Any:
    """The dataclass with its settings checked. Raises DiffalignError naming every fault.

    checked_by: the dataclass that says what the settings are, where `make` is a function.
    """
    try:
        return make(**_checked(checked_by or make, settings))
    except ValidationError as e:
        raise DiffalignError("; ".join(describe_fault(fault, Section) for fault in e.errors())) from None
    except DiffalignError as e:
        raise DiffalignError(f"{name}: {e}") from None


def _complete(settings: Any, what: str) -> None:
    """Raises DiffalignError for a class that lacks what every objective or source has."""
    missing = [name for name in _NEEDED[what] if not hasattr(settings, name)]
    if missing:
        cls = settings if isinstance(settings, type) else type(settings)
        raise DiffalignError(
            f"{what} {cls.__qualname__} lacks {', '.join(missing)}; CONTRIBUTING.md shows what it must define"
        )


def _checked(cls: Any, settings: dict[str, Any]) -> dict[str, Any]:
    """The values of a dataclass's fields, each of its type. Raises ValidationError."""
    needed = (
        f.name
        for f in dataclasses.fields(cls)
        if f.name in settings or f.default is f.default_factory is dataclasses.MISSING
    )
    return dict(_section(cls, tuple(needed)).model_validate(settings))


@lru_cache(256)  # building a model takes longer than everything else about a node
def _section(cls: Any, names: tuple[str, ...]) -> type[Section]:
    """The pydantic model of some fields of a dataclass, all of them required."""
    hints, of = get_type_hints(cls), {f.name: f for f in dataclasses.fields(cls)}
    fields: Any = {name: (_typed(hints[name], of[name].metadata), ...) for name in names}
    return create_model(cls.__name__, __base__=Section, **fields)


def _typed(hint: Any, metadata: Mapping[str, Any]) -> Any:
    """A field's type with the checks of configs and the bounds of its metadata."""
    bounds = {name: metadata[name] for name in BOUNDS if name in metadata}
    checked = strict(hint, path=bool(metadata.get("path")))
    return Annotated[checked, Field(**bounds)] if bounds else checked


def _values(settings: Any) -> dict[str, Any]:
    return {f.name: getattr(settings, f.name) for f in dataclasses.fields(settings)}
