"""What a command prints at its end: the commands that come next, ready to be copied."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Sequence

from diffalign.cli.terminal import write_styled


def print_next(*commands: Sequence[str]) -> None:
    """Prints each command as it is typed; words are those behind `diffalign`."""
    if commands:
        write_styled("next:\n", "heading", sys.stdout)
    for words in commands:
        print(f"  {typed(words)}")


def typed(words: Sequence[str], width: int = 76) -> str:
    """A command as it is typed, `words` behind `diffalign`; lines of at most `width` characters where words allow.

    An option and its first value stay on one line.
    """
    pieces: list[str] = []
    for word in map(shlex.quote, words):
        if pieces and re.fullmatch(r"--[\w-]+", pieces[-1]) and not word.startswith("-"):
            pieces[-1] += f" {word}"
        else:
            pieces.append(word)
    lines = ["diffalign"]
    for piece in pieces:
        if len(f"{lines[-1]} {piece}") > width:
            lines[-1] += " \\"
            lines.append(" " * 8 + piece)
        else:
            lines[-1] += f" {piece}"
    return "\n".join(lines)


def export_commands(tuned: str, base: str) -> list[list[str]]:
    """How tuned weights become a file for other programs; nothing for user attention, which no other program has.

    base: of the weights, which the command needs where no run or merge is recorded beside them.
    """
    from diffalign.export.tuned_run import recorded_base
    from diffalign.models.adapters.lora_file import is_dora
    from diffalign.models.adapters.save_load import find_tuned

    found = find_tuned(tuned)
    to = {"lora": "kohya", "unet": "single-file"}.get(found.kind)
    if to == "kohya" and is_dora(found.path):
        to = "single-file"  # kohya's layout has no place for it
    of = [] if recorded_base(tuned) is not None else ["--base", base]
    return [["export", tuned, *of, "--to", to, "--out", "tuned.safetensors"]] if to else []


def card_commands(tuned: str, evaluation: str) -> list[list[str]]:
    """How an evaluation gets onto the card of weights; nothing where no run or merge is recorded beside them."""
    from diffalign.export.tuned_run import recorded_base

    return [["card", tuned, "--evaluation", evaluation]] if recorded_base(tuned) is not None else []
