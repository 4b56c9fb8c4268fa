"""What a command prints at its end: the commands that come next, ready to be copied."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from diffalign.cli.terminal import write_styled
from diffalign.errors import MissingFileError


def print_next(*commands: Sequence[str]) -> None:
    """Prints each command as it is typed; words are those behind `diffalign`.

    Below them it says what PickScore needs, where a command names it and its weights are not on this machine.
    """
    if commands:
        write_styled("next:\n", "heading", sys.stdout)
    for words in commands:
        print(f"  {typed(words)}")
    if any("pickscore" in words for words in commands):
        _say_what_pickscore_needs()


def scorer_for(base: str | Path) -> str:
    """The scorer to suggest for images of a base: an embedded world's own true reward, PickScore for all others."""
    from diffalign import world
    from diffalign.world import emoji

    for name, path in (("world", world.base_path), ("emoji", emoji.base_path)):
        try:
            if Path(base).resolve() == path().resolve():
                return name
        except MissingFileError:  # an installation without the assets
            continue
    return "pickscore"


def _say_what_pickscore_needs() -> None:
    """Prints where its weights come from, unless the Hub's cache on this machine has them."""
    from huggingface_hub import try_to_load_from_cache

    from diffalign.rewards.table import PICKSCORE

    if not isinstance(try_to_load_from_cache(PICKSCORE, "config.json"), str):
        print(
            f"  (pickscore loads {PICKSCORE} from the Hub, or pickscore=FOLDER;\n"
            "  `diffalign list scorers` has the others)"
        )


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
