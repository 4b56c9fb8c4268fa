"""The cost of importing the package and of --help, in a fresh interpreter."""

from __future__ import annotations

import json
import subprocess
import sys
import time

from diffalign.objectives import OBJECTIVES
from diffalign.sources import SOURCES

HEAVY = (
    "diffusers",
    "transformers",
    "peft",
    "PIL",
    "pydantic",
    "datasets",
    "accelerate",
    "torchao",
    "pyarrow",
    "triton",
)
HELP_SECONDS = 60.0  # measured: 2 s, nearly all of it torch; far above, so that a busy machine does not fail it


def run(*command: str) -> str:
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def loaded_by(statement: str) -> list[str]:
    """The heavy packages that a statement brings in."""
    code = f"{statement}\nimport json, sys\nprint(json.dumps([p for p in {HEAVY!r} if p in sys.modules]))"
    return json.loads(run("-c", code).splitlines()[-1])


def test_import_brings_in_nothing_heavy() -> None:
    assert loaded_by("import diffalign, diffalign.engine.ddim, diffalign.engine.measure, diffalign.objectives") == []


def test_rooms_with_libraries_load_them_late() -> None:
    assert loaded_by("import diffalign.models, diffalign.data, diffalign.training, diffalign.cli.main") == []
    assert loaded_by("import diffalign.sources") == []
    assert loaded_by("import diffalign.rewards, diffalign.world, diffalign.evaluation") in ([], ["PIL"])


def test_the_probe_sees_what_is_imported() -> None:
    assert loaded_by("import PIL") == ["PIL"]


def test_help_names_the_commands_and_is_quick() -> None:
    start = time.monotonic()
    text = run("-m", "diffalign", "--help")
    assert time.monotonic() - start < HELP_SECONDS
    for command in ("train", "check", "encode", "generate", "evaluate", "data", "list", "demo"):
        assert command in text


def test_help_imports_nothing_heavy() -> None:
    code = "from diffalign.cli.main import main\ntry:\n    main(['--help'])\nexcept SystemExit:\n    pass"
    assert loaded_by(code) == []


def test_list_names_objectives_and_configs() -> None:
    text = run("-m", "diffalign", "list")
    for name in (*OBJECTIVES, *SOURCES):
        assert name in text
    assert "world/dpo.yaml" in text
