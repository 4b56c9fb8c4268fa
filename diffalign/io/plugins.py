"""Classes by name: the package's own, another package's entry point, or `package.module:Class`.

A package offers its own under the entry-point group `diffalign.objectives`, `diffalign.sources`,
`diffalign.scorers` or `diffalign.tuning_methods`; a script or notebook names the class where it is defined. A table of
our own names may have `package.module:Class` in place of a class, which is then imported when it is asked for.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Mapping
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from diffalign.errors import DiffalignError

SHORT = {"lr": "learning_rate", "batch_size": "train_batch_size", "steps": "max_train_steps"}


def resolve(name: str, known: Mapping[str, Any], what: str) -> Any:
    """The class called `name`: a key of `known`, an entry point of `diffalign.WHATs`, or `package.module:Class`.

    Raises DiffalignError with the nearest known name, or with the reason why the import failed.
    """
    if name in known and not isinstance(known[name], str):
        return known[name]
    module, colon, attribute = str(known.get(name, name)).partition(":")
    if colon:
        return imported(module, attribute, f"{what} {name!r}")
    offered = _offered(what)
    if name in offered:
        module, _, attribute = offered[name].value.partition(":")
        return imported(module, attribute, f"{what} {name!r} (entry point of {_package(offered[name])})")
    raise DiffalignError(
        f"no {what} is called {name!r}{nearest(name, [*known, *offered])} (your own: package.module:Class)"
    )


def known_names(known: Mapping[str, Any], what: str) -> list[str]:
    """The names of a table and of the entry points of `diffalign.WHATs`."""
    return list(dict.fromkeys([*known, *_offered(what)]))


def imported(module: str, attribute: str, what: str) -> Any:
    """`attribute` of `module`. Raises DiffalignError that says which of the two was not found."""
    try:
        found: Any = import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and not f"{module}.".startswith(f"{error.name}."):
            raise  # the module is there, and something that it imports is not: its own traceback says more
        raise DiffalignError(
            f"{what}: there is no module {error.name!r}; give package.module:Class and put its folder on PYTHONPATH"
        ) from None
    for part in attribute.split("."):
        if not part or not hasattr(found, part):
            names = [each for each in vars(found) if not each.startswith("_")]
            raise DiffalignError(f"{what}: {module} has no {attribute!r}{nearest(attribute, names)}")
        found = getattr(found, part)
    return found


def name_of(cls: type, known: Mapping[str, Any]) -> str:
    """The name under which `resolve` finds a class again.

    Raises DiffalignError for a class that cannot be imported by another process, such as one inside a function.
    """
    for name, each in known.items():
        if each is cls or each == f"{cls.__module__}:{cls.__qualname__}":
            return name
    module = sys.modules.get(cls.__module__)
    if "<locals>" in cls.__qualname__ or not _holds(module, cls):
        raise DiffalignError(f"{cls.__qualname__} is defined inside a function; define it at the top of its module")
    return f"{cls.__module__}:{cls.__qualname__}"


def nearest(name: str, known: Any) -> str:
    """The end of a message about an unknown name: the nearest known one, or all of them."""
    if name in SHORT and SHORT[name] in known:
        return f"; did you mean {SHORT[name]!r}?"
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    allowed = ", ".join(known) or "none"
    return f"; did you mean {close[0]!r}?" if close else f"; allowed: {allowed}"


def _holds(module: Any, cls: type) -> bool:
    found: Any = module
    for part in cls.__qualname__.split("."):
        found = getattr(found, part, None)
    return found is cls


@cache  # a package that is installed later is seen by the next process, as its modules would be
def _offered(what: str) -> Mapping[str, Any]:
    return {entry.name: entry for entry in entry_points(group=f"diffalign.{what.replace(' ', '_')}s")}


def _package(entry: Any) -> str:
    return entry.dist.name if entry.dist is not None else "an installed package"
