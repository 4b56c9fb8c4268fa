"""The house rule of CONTRIBUTING.md, read off the source: a module imports only from lower floors or its own room.

Imports inside functions and under TYPE_CHECKING count like any other. Registries that name a module in a string
(`diffalign.rewards`) are the one way to point upwards, and they are not seen here.
"""

from __future__ import annotations

import ast
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "diffalign"

FLOORS = {
    "errors": -1,
    "io": 0,
    "types": 0,
    "engine": 1,
    "objectives": 2,
    "models": 3,
    "data": 3,
    "rewards": 3,
    "experimental": 4,
    "sources": 4,
    "world": 4,
    "config": 5,
    "evaluation": 5,
    "training": 6,
    "export": 6,
    "arena": 7,
    "cli": 8,
    "contrib": 8,  # above everything that it uses, and beside cli, so that nothing of the package imports it
    "__main__": 9,
    "__init__": 9,  # the public names, each imported when it is first used; inside, only its `__version__` is
}

# Where a package may be imported: a room, or one file of it.
ONLY_IN = {
    "diffusers": {"models", "experimental", "world", "evaluation", "training/optim/optimizers.py", "training/build.py"},
    "transformers": {"models", "world", "evaluation", "rewards", "training/optim/optimizers.py"},
    "peft": {"models"},
    "torchao": {"training/optim/optimizers.py"},
    "triton": {"experimental/triton_norm.py", "experimental/triton_geglu.py"},
    "accelerate": {"training", "cli/main.py"},
    "datasets": {"data"},
    "pyarrow": {"data", "world"},
    "PIL": {"data", "rewards", "evaluation", "world", "cli/demo.py", "arena"},
    "matplotlib": {"arena/plots.py"},
    "pydantic": {"config"},
    "yaml": {"config", "training", "arena/page.py"},
}
IMPORT_NAMES = {"pillow": "PIL", "pyyaml": "yaml", "open-clip-torch": "open_clip"}


def sources() -> dict[str, str]:
    """Every file of the package by its path below diffalign/."""
    return {p.relative_to(PACKAGE).as_posix(): p.read_text() for p in sorted(PACKAGE.rglob("*.py"))}


def room(file: str) -> str:
    return file.split("/")[0].removesuffix(".py")


def imports(source: str) -> Iterator[tuple[int, str]]:
    """(line, dotted module) of every import; `from a import b` counts as a.b, which may be a module."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = "." * node.level + (node.module or "")
            yield from ((node.lineno, f"{start}.{alias.name}") for alias in node.names)


def imported_room(module: str) -> str:
    """The room of a module of ours; a name of the package's own __init__ belongs to that."""
    name = room(module.split(".")[1]) if "." in module else "__init__"
    return name if name in FLOORS else "__init__"


def floor_faults(files: dict[str, str]) -> list[str]:
    """Imports that go up, sideways, or by a relative name."""
    faults = []
    for file, source in files.items():
        for line, module in imports(source):
            if module.startswith("."):
                faults.append(f"diffalign/{file}:{line} imports {module}: write the absolute name")
            if module.split(".")[0] != "diffalign" or module == "diffalign.__version__":
                continue
            here, there = room(file), imported_room(module)
            if here != there and FLOORS[there] >= FLOORS[here]:
                faults.append(
                    f"diffalign/{file}:{line} (floor {FLOORS[here]}) imports {module} (floor {FLOORS[there]})"
                )
    return faults


def package_faults(files: dict[str, str]) -> list[str]:
    """Third-party imports outside the rooms that may have them."""
    faults = []
    for file, source in files.items():
        for line, module in imports(source):
            package = module.split(".")[0]
            if package in ("", "diffalign", "torch") or package in sys.stdlib_module_names:
                continue
            where = f"diffalign/{file}:{line} imports {module}"
            if FLOORS[room(file)] <= 2:
                faults.append(f"{where}: floors 0 to 2 need only torch")
            elif package in ONLY_IN and not {room(file), file} & ONLY_IN[package]:
                faults.append(f"{where}: {package} belongs in {', '.join(sorted(ONLY_IN[package]))}")
    return faults


def test_every_room_has_a_floor() -> None:
    assert sorted({room(file) for file in sources()} - FLOORS.keys()) == []


def test_modules_import_only_from_lower_floors_or_their_own_room() -> None:
    assert floor_faults(sources()) == []


def test_heavy_packages_stay_in_their_rooms() -> None:
    assert package_faults(sources()) == []


def test_what_is_imported_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [name for extra in project["optional-dependencies"].values() for name in extra]
    declared = {name.split(">=")[0].strip() for name in [*project["dependencies"], *extras]}
    known = {IMPORT_NAMES.get(name, name) for name in declared} | {"diffalign"} | set(sys.stdlib_module_names)
    used = {module.split(".")[0] for source in sources().values() for _, module in imports(source)} - {""}
    assert sorted(used - known) == []


@pytest.mark.parametrize(
    ("file", "source", "found"),
    [
        ("engine/x.py", "def f():\n    from diffalign.data.row import PairRow", "(floor 1) imports diffalign.data"),
        ("models/x.py", "import diffalign.data.row", "(floor 3) imports diffalign.data.row (floor 3)"),
        ("data/x.py", "from diffalign import training", "imports diffalign.training"),
        ("types.py", "from diffalign import NoiseSchedule", "(floor 0) imports diffalign.NoiseSchedule (floor 9)"),
        ("cli/main.py", "from diffalign import Trainer", "(floor 8) imports diffalign.Trainer (floor 9)"),
        ("training/x.py", "from diffalign.contrib.ppd import method", "(floor 6) imports diffalign.contrib"),
        ("cli/x.py", "def f():\n    import diffalign.contrib.ppd", "(floor 8) imports diffalign.contrib"),
        ("contrib/ppd/x.py", "from diffalign.cli import main", "(floor 8) imports diffalign.cli"),
        ("data/x.py", "from .rows import PairRow", "absolute name"),
        ("objectives/x.py", "import numpy as np", "floors 0 to 2 need only torch"),
        ("data/x.py", "if True:\n    from diffusers import AutoencoderKL", "diffusers belongs in"),
        ("training/loop.py", "import diffusers", "diffusers belongs in"),
    ],
)
def test_a_fault_is_found(file: str, source: str, found: str) -> None:
    faults = floor_faults({file: source}) + package_faults({file: source})
    assert len(faults) == 1
    assert found in faults[0]


def test_what_is_allowed_is_not_a_fault() -> None:
    allowed = {
        "engine/x.py": "import torch\nfrom diffalign.types import Probe\nfrom diffalign.engine.ddim import step",
        "training/optim/optimizers.py": "import diffusers\nfrom diffalign.config.schema import Config",
        "cli/main.py": "from diffalign import __version__",
        "contrib/ppd/x.py": "from diffalign.training.build import build",
    }
    assert floor_faults(allowed) + package_faults(allowed) == []
