"""Import levels: a module imports only from lower levels or from its own package. Read off the source.

Imports inside functions and under TYPE_CHECKING count like any other. A registry may name a module of a higher level in
a string, as `diffalign.rewards` does; such strings are not imports, and this test does not see them.
"""

from __future__ import annotations

import ast
import pkgutil
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "diffalign"

# The packages and modules at the top of diffalign/, lowest level first; CONTRIBUTING.md explains each level.
LEVELS = [
    "errors",
    "io types",
    "engine",
    "objectives",
    "models data rewards",
    "experimental sources world",
    "config evaluation pages",
    "export",
    "training",
    "arena",
    "cli contrib",  # contrib is above all that it uses, and beside cli, so that nothing in the package imports it
    "__init__ __main__",  # the public names, each imported when it is first used
]
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names.split()}
TORCH_ALONE = LEVEL["objectives"]  # up to this level torch is the only third-party package

# Files below the level where packages besides torch begin, each with the package that it is about.
ALSO_LOW = {("io/progress.py", "tqdm"), ("io/weight_files.py", "safetensors")}

# Where a third-party package may be imported: a package of ours, or one file of it.
ONLY_IN = {
    "diffusers": {"models", "experimental", "world", "evaluation", "training/optim/optimizers.py", "training/build.py"},
    "transformers": {"models", "world", "evaluation", "rewards", "contrib", "training/optim/optimizers.py"},
    "peft": {"models"},
    "torchao": {"training/optim/optimizers.py"},
    "triton": {"experimental/triton_norm.py", "experimental/triton_geglu.py"},
    "accelerate": {"training", "contrib", "cli/main.py"},
    "datasets": {"data"},
    "pyarrow": {"data", "world"},
    "fsspec": {"data"},
    "PIL": {
        "data",
        "rewards",
        "evaluation",
        "pages",
        "world",
        "contrib",
        "cli/demo.py",
        "arena",
        "export/card/evaluation.py",
    },
    "matplotlib": {"arena/plots.py"},
    "pydantic": {"config"},
    "yaml": {"config", "training", "arena/page.py"},
}
# The registries of the core that name what contrib adds: guidance, tuning methods, scorers, what a run trains.
NAMES_CONTRIB = {"evaluation/generate.py", "models/adapters/methods.py", "rewards/table.py", "training/run.py"}
IMPORT_NAMES = {"pillow": "PIL", "pyyaml": "yaml", "open-clip-torch": "open_clip"}


def sources() -> dict[str, str]:
    """Every file of the package by its path below diffalign/."""
    return {p.relative_to(PACKAGE).as_posix(): p.read_text() for p in sorted(PACKAGE.rglob("*.py"))}


def top(file: str) -> str:
    """The package or module at the top of diffalign/ that a file belongs to."""
    return file.split("/")[0].removesuffix(".py")


def imports(source: str) -> Iterator[tuple[int, str]]:
    """(line, dotted module) of every import; `from a import b` counts as a.b, which may be a module."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = "." * node.level + (node.module or "")
            yield from ((node.lineno, f"{start}.{alias.name}") for alias in node.names)


def imported_top(module: str) -> str:
    """The top of a module of ours; a public name of diffalign belongs to `__init__`."""
    name = top(module.split(".")[1]) if "." in module else "__init__"
    return name if name in LEVEL else "__init__"


def level_faults(files: dict[str, str]) -> list[str]:
    """Imports that go up, sideways, or by a relative name."""
    faults = []
    for file, source in files.items():
        for line, module in imports(source):
            if module.startswith("."):
                faults.append(f"diffalign/{file}:{line} imports {module}: write the absolute name")
            if module.split(".")[0] != "diffalign" or module == "diffalign.__version__":
                continue
            here, there = top(file), imported_top(module)
            if here != there and LEVEL[there] >= LEVEL[here]:
                faults.append(f"diffalign/{file}:{line} (level {LEVEL[here]}) imports {module} (level {LEVEL[there]})")
    return faults


def package_faults(files: dict[str, str]) -> list[str]:
    """Third-party imports outside the packages that may have them."""
    faults = []
    for file, source in files.items():
        for line, module in imports(source):
            package = module.split(".")[0]
            if package in ("", "diffalign", "torch") or package in sys.stdlib_module_names:
                continue
            where = f"diffalign/{file}:{line} imports {module}"
            if LEVEL[top(file)] <= TORCH_ALONE and (file, package) not in ALSO_LOW:
                faults.append(f"{where}: levels up to objectives need only torch")
            elif package in ONLY_IN and not {top(file), file} & ONLY_IN[package]:
                faults.append(f"{where}: {package} belongs in {', '.join(sorted(ONLY_IN[package]))}")
    return faults


def test_every_package_has_a_level() -> None:
    assert sorted({top(file) for file in sources()} - LEVEL.keys()) == []


def test_contributing_explains_the_levels() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    rows = re.findall(r"^\| (\d+) \| ([^|]+) \|", text.partition("## Import levels")[2], re.MULTILINE)
    explained = {name: int(level) for level, cell in rows for name in re.findall(r"`(\w+?)(?:/|\.py)`", cell)}
    assert explained == LEVEL


def test_modules_import_only_from_lower_levels_or_their_own_package() -> None:
    assert level_faults(sources()) == []


def test_the_core_names_contrib_only_in_its_registries() -> None:
    """By strings, since an import would go up; each of them exists."""
    named = {
        (file, node.value)
        for file, source in sources().items()
        for node in ast.walk(ast.parse(source))
        if top(file) != "contrib" and isinstance(node, ast.Constant) and str(node.value).startswith("diffalign.contrib")
    }
    assert {file for file, _ in named} == NAMES_CONTRIB
    for _, name in named:
        assert pkgutil.resolve_name(str(name)) is not None


def test_third_party_packages_stay_where_they_belong() -> None:
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
        ("engine/x.py", "def f():\n    from diffalign.data.row import PairRow", "(level 2) imports diffalign.data"),
        ("models/x.py", "import diffalign.data.row", "(level 4) imports diffalign.data.row (level 4)"),
        ("data/x.py", "from diffalign import training", "imports diffalign.training"),
        ("types.py", "from diffalign import NoiseSchedule", "(level 1) imports diffalign.NoiseSchedule (level 11)"),
        ("cli/main.py", "from diffalign import Trainer", "(level 10) imports diffalign.Trainer (level 11)"),
        ("training/x.py", "from diffalign.contrib.ppd import method", "(level 8) imports diffalign.contrib"),
        ("cli/x.py", "def f():\n    import diffalign.contrib.ppd", "(level 10) imports diffalign.contrib"),
        ("contrib/ppd/x.py", "from diffalign.cli import main", "(level 10) imports diffalign.cli"),
        ("data/x.py", "from .rows import PairRow", "absolute name"),
        ("objectives/x.py", "import numpy as np", "need only torch"),
        ("data/x.py", "if True:\n    from diffusers import AutoencoderKL", "diffusers belongs in"),
        ("training/loop.py", "import diffusers", "diffusers belongs in"),
    ],
)
def test_a_fault_is_found(file: str, source: str, found: str) -> None:
    faults = level_faults({file: source}) + package_faults({file: source})
    assert len(faults) == 1
    assert found in faults[0]


def test_what_is_allowed_is_not_a_fault() -> None:
    allowed = {
        "engine/x.py": "import torch\nfrom diffalign.types import Probe\nfrom diffalign.engine.ddim import step",
        "training/optim/optimizers.py": "import diffusers\nfrom diffalign.config.schema import Config",
        "cli/main.py": "from diffalign import __version__",
        "contrib/ppd/x.py": "from diffalign.training.build import build",
    }
    assert level_faults(allowed) + package_faults(allowed) == []
