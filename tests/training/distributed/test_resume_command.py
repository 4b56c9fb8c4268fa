"""The command that a stopped run prints is the one that started it, under every launcher."""

from __future__ import annotations

import pytest

from diffalign.training.distributed import resume_command as module
from diffalign.training.distributed.resume_command import resume_command

PYTHON = "/usr/bin/python"
OURS = ["train", "my runs/a.yaml", "seed=1", "training.resume_from_checkpoint=null"]
SAME = "train 'my runs/a.yaml' seed=1 training.resume_from_checkpoint=latest"
MAIN = "/usr/lib/diffalign/__main__.py"


@pytest.mark.parametrize(
    ("program", "parent", "expected"),
    [
        ("/usr/bin/diffalign", ["bash"], f"diffalign {SAME}"),
        (MAIN, ["bash", "-c", "python -m diffalign train x"], f"python -m diffalign {SAME}"),
        (MAIN, ["timeout", "60", PYTHON, "-m", "diffalign", *OURS], f"python -m diffalign {SAME}"),
        (
            MAIN,
            [PYTHON, "/usr/bin/accelerate", "launch", "--config_file", "ddp.yaml", "-m", "diffalign", *OURS],
            f"accelerate launch --config_file ddp.yaml -m diffalign {SAME}",
        ),
        (
            MAIN,
            [PYTHON, "/usr/bin/torchrun", "--nproc-per-node", "2", "-m", "diffalign", *OURS],
            f"torchrun --nproc-per-node 2 -m diffalign {SAME}",
        ),
        (
            MAIN,
            [PYTHON, "-m", "torch.distributed.run", "--nproc-per-node=2", "-m", "diffalign", *OURS],
            f"{PYTHON} -m torch.distributed.run --nproc-per-node=2 -m diffalign {SAME}",
        ),
    ],
)
def test_the_launcher_is_part_of_it(
    program: str, parent: list[str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", [program, *OURS])
    monkeypatch.setattr(module, "_parents_words", lambda: parent)
    assert resume_command() == expected


@pytest.mark.parametrize("argv", [["script.py", "train", "x.yaml"], ["/usr/bin/diffalign", "check", "x.yaml"], ["-c"]])
def test_other_programs_have_none(argv: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", argv)
    assert resume_command() is None
