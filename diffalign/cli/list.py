"""`diffalign list`: what comes with the package, objectives and prompt sets with their origin."""

from __future__ import annotations

import argparse
import dataclasses
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from diffalign.errors import DiffalignError

WHAT = ("objectives", "sources", "configs", "scorers", "prompts")
CITED = re.compile(r", (?:arXiv (?P<arxiv>\d{4}\.\d{5})|(?P<url>https://\S+))")


@dataclass(frozen=True)
class ObjectiveEntry:
    """What there is to say about an objective."""

    name: str
    paper: str  # authors and title
    citation: str  # arXiv id with its address, or the address alone
    file: str  # path inside the repository
    configs: tuple[str, ...]  # packaged configs that use it, e.g. world/dpo.yaml
    settings: str  # fields with their defaults


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `diffalign list`."""
    parser.add_argument("what", nargs="?", choices=WHAT, help="only these")


def run(args: argparse.Namespace) -> None:
    """Prints what was asked for, or all of it."""
    from diffalign.config.schema import packaged_configs
    from diffalign.rewards import declared_tie
    from diffalign.rewards.table import SCORERS
    from diffalign.sources import SOURCES

    if args.what in (None, "objectives"):
        print("objectives")
        for entry in objective_entries():
            print(_entry_text(entry))
    if args.what in (None, "sources"):
        print("sources")
        for name, source in SOURCES.items():
            print(f"  {name:<12} {source.paper}; from {source.data}")
    if args.what in (None, "configs"):
        print("configs")
        for path, purpose in packaged_configs():
            print(f"  {path}\n      {purpose}")
    if args.what in (None, "scorers"):
        print("scorers (higher is better; differences below the tie threshold count as equal)")
        for name, scorer in sorted(SCORERS.items(), key=lambda item: item[0].startswith(("world", "emoji"))):
            print(f"  {name}\n      score     {scorer.score}; tie {declared_tie(name):g}")
            print(f"      needs     {scorer.needs}\n      licence   {scorer.licence}")
    if args.what in (None, "prompts"):
        print("prompts")
        _print_prompt_sets()


def _print_prompt_sets() -> None:
    """Each named set: number of prompts, origin, licence, and what its text is checked by."""
    from diffalign.data.prompt_sets.fetch import stored_at
    from diffalign.data.prompt_sets.known import SETS

    for name, known in SETS.items():
        parts = f"; parts {', '.join(f'{name}:{part}' for part in known.part_rows)}" if known.part_rows else ""
        here = "packaged" if known.packaged else "fetched" if stored_at(known).is_file() else "not fetched yet"
        text = "in the package" if known.packaged else f"SHA-256 {known.sha256}" if known.sha256 else "not verified"
        lines = (
            f"{known.about}{parts}",
            f"prompts   {known.rows} ({here})",
            f"origin    {known.origin}",
            f"licence   {known.licence}",
            f"text      {text}",
        )
        print(f"  {name}\n" + "\n".join(f"      {line}" for line in lines))


def objective_entries() -> list[ObjectiveEntry]:
    """Every registered objective, in the table's order. Raises ValueError for one whose `paper` cites nothing."""
    from diffalign.config.schema import configs_by_objective
    from diffalign.objectives import OBJECTIVES

    configs = configs_by_objective()
    entries = []
    for name, cls in OBJECTIVES.items():
        paper, citation = cited(cls.paper)
        file = Path(str(sys.modules[cls.__module__].__file__))
        settings = ", ".join(f"{f.name}={f.default}" for f in dataclasses.fields(cls))  # type: ignore[arg-type]
        entries.append(
            ObjectiveEntry(
                name,
                paper,
                citation,
                file.relative_to(Path(__file__).parents[2]).as_posix(),
                tuple(configs.get(name, ())),
                settings,
            )
        )
    return entries


def cited(paper: str) -> tuple[str, str]:
    """An objective's `paper` as authors with title (and what follows), and its citation. Raises ValueError."""
    found = CITED.search(paper)
    if found is None:
        raise DiffalignError(f"{paper!r} cites nothing; end it with ', arXiv NNNN.NNNNN' or ', https://...'")
    text = paper[: found.start()] + paper[found.end() :]
    arxiv = found["arxiv"]
    return text, found["url"] if arxiv is None else f"arXiv {arxiv}, https://arxiv.org/abs/{arxiv}"


def _entry_text(entry: ObjectiveEntry) -> str:
    lines = (
        f"{entry.paper}. {entry.citation}",
        f"file      {entry.file}",
        f"configs   {', '.join(entry.configs) or 'none'}",
        f"settings  {entry.settings or 'none'}",
    )
    return f"  {entry.name}\n" + "\n".join(f"      {line}" for line in lines)
