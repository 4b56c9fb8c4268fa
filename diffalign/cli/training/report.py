"""`diffalign report`: the page of a run that is finished, goes on or was killed, or of several side by side."""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from diffalign.cli.common import overwrite_argument, path, path_text, writable
from diffalign.errors import DiffalignError
from diffalign.io.paths import expanded

if TYPE_CHECKING:
    from diffalign.pages.run_page.data import RunData

SEVERAL = Path("report.html")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The runs, and where the page goes."""
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", type=path_text, help="output_dir of a run; NAME=RUN gives it another name"
    )
    parser.add_argument(
        "--out", type=path, help=f"the page (default: RUN/run.html of one run, {SEVERAL} here of several)"
    )
    overwrite_argument(parser)


def run(args: argparse.Namespace) -> None:
    """Writes the page. One run's own run.html is replaced, as the run itself does; any other file is not."""
    from diffalign.pages.html import save_page
    from diffalign.pages.run_page.page import run_page
    from diffalign.training.metrics import RUN_PAGE

    named = names(args.runs)
    own = len(named) == 1 and args.out is None
    out = args.out or (named[0][1] / RUN_PAGE if own else SEVERAL)
    writable([("--out", out)], args.overwrite or (own and out.is_file()))
    found = [read(name, folder) for name, folder in named]
    save_page(out, run_page(found, now=time.time()))
    for run in found:
        print(f"{run.name}: {run.state.kind}, step {run.step}{f' of {run.max_steps}' if run.max_steps else ''}")
    print(f"{out}: open it in a browser")


def read(name: str, folder: Path) -> RunData:
    """What a run has written so far. Raises MissingFileError for a folder without a run, ConfigError for its config."""
    from diffalign.config.schema import parse_config
    from diffalign.config.strict_yaml import read_yaml
    from diffalign.io.folder_lock import folder_in_use
    from diffalign.pages.run_page.data import RunState, read_run
    from diffalign.training.callbacks.run_page import start_loss
    from diffalign.training.checkpoints.final_weights import is_finished

    config = folder / "config.yaml"
    settings = read_yaml(config) if config.is_file() else {}
    start, problems = None, []
    try:
        start = start_loss(parse_config(settings, str(config), recorded=True)) if settings else None
    except DiffalignError:  # e.g. an objective of another project, which is not installed here
        problems.append(
            "config.yaml cannot be used here (an objective of another project?): the start of the loss is left out"
        )
    if folder_in_use(folder):
        state = RunState("running")
    elif is_finished(folder):
        state = RunState("finished")
    else:
        state = RunState("ended", "No process trains there now, and there are no final weights.")
    found = read_run(folder, settings, state, name=name, start_loss=start)
    found.problems.extend(problems)
    return found


def names(texts: Sequence[str]) -> list[tuple[str, Path]]:
    """Name and folder of each run: NAME=RUN, or the folder's own name with as many parents as tell all apart.

    Raises DiffalignError for a run or a name that is given twice.
    """
    given = []
    for text in texts:
        name, sign, place = text.partition("=")
        given.append((name, Path(expanded(place))) if sign and not Path(text).exists() else ("", Path(text)))
    deepest = max(len(folder.resolve().parts) for _, folder in given)
    for depth in range(1, deepest + 1):
        found = [(name or "/".join(folder.resolve().parts[-depth:]), folder) for name, folder in given]
        twice = [name for name, number in Counter(name for name, _ in found).items() if number > 1]
        if not twice:
            return found
    raise DiffalignError(f"{twice[0]} is given twice; give each run once, and each NAME=RUN a name of its own")
