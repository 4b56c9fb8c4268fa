"""The command that continues a run: the one that started it, launcher included, from the latest checkpoint."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

RESUME = "training.resume_from_checkpoint="
_ACCELERATE = ("accelerate", "accelerate.commands.launch", "accelerate.commands.accelerate_cli")
LAUNCHERS = {"torchrun", "torch.distributed.run", *_ACCELERATE}


def resume_command() -> str | None:
    """None where this process was not started by `diffalign train` or `python -m diffalign train`."""
    program, arguments = Path(sys.argv[0]), sys.argv[1:]
    module = program.parts[-2:] == ("diffalign", "__main__.py")
    if arguments[:1] != ["train"] or not (module or program.name == "diffalign"):
        return None
    words = launcher(_parents_words(), arguments) + (["-m", "diffalign"] if module else ["diffalign"])
    if words[0] == "-m":
        words = ["python", *words]
    return shlex.join([*words, *(word for word in arguments if not word.startswith(RESUME)), f"{RESUME}latest"])


def launcher(words: Sequence[str], arguments: Sequence[str]) -> list[str]:
    """The launcher and its own options, from the command line of the parent process; empty where it is none."""
    ours = len(arguments)
    if list(words[-ours:]) != list(arguments):
        return []
    own = list(words[:-ours])
    if own[-2:] == ["-m", "diffalign"]:
        own = own[:-2]
    if len(own) > 1 and Path(own[1]).name in LAUNCHERS:  # a script that Python runs
        return [Path(own[1]).name, *own[2:]]
    return own if LAUNCHERS & set(own[1:3]) else []


def _parents_words() -> list[str]:
    """The command line of the parent process; empty where the system has no /proc."""
    try:
        return Path(f"/proc/{os.getppid()}/cmdline").read_text().split("\0")[:-1]
    except (OSError, UnicodeDecodeError):
        return []
