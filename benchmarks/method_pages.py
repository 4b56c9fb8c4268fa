"""Tables of three pages whose figures come from records: what papers report beside what the arena measured, by method.

    python -m benchmarks.method_pages            # writes them into docs/papers.md, which_method.md and arena.md

docs/papers.md: published gains over the base (diffalign/evaluation/published/published.json, each of one source and
protocol) beside the lines of benchmarks/results/arena.json. docs/which_method.md: those lines and their cost, by what
data a method needs. docs/arena.md: what the sweep chose (assets/arena/tuned.json), and the views of the arena's record.
Texts are written in the pages; a table is found by its head, below a heading where several have it, and replaced whole.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from diffalign.arena.board import interval, leaderboard_table
from diffalign.arena.entries import PREFERENCES, entries
from diffalign.arena.sweep import RATE
from diffalign.evaluation.published.catalogue import Catalogue, catalogue
from diffalign.evaluation.report import BASE

ROOT = Path(__file__).resolve().parent.parent
RECORD = ROOT / "benchmarks/results/arena.json"
SWEEP = ROOT / "assets/arena/tuned.json"
PAPERS, CHOICE, ARENA = (ROOT / "docs" / name for name in ("papers.md", "which_method.md", "arena.md"))

METRIC = "PickScore"  # the one column that every published table has
NONE = "no figure with its protocol was found"
UNMEASURED = "not measured"
# our name -> the name in published tables
PUBLISHED = {
    "dpo": "DPO", "sft": "SFT on winners", "kto": "KTO", "mapo": "MaPO", "inpo": "InPO", "spo": "SPO", "seppo": "SePPO",
    "poly_dpo": "Poly-DPO", "lpo": "LPO",
}  # fmt: skip
PAGES = dict.fromkeys(("inpo", "smpo", "inversion_dpo"), "inversion.md#{}") | {
    "spo": "spo.md",
    "lpo": "lpo.md",
    "spin": "methods/seppo.md",
    "raft": "online.md#best_of",
    "online_dpo": "online.md#online_pairs",
    "advantage": "online.md#weighted_groups",
}
# what the data are -> methods that train on them
NEEDS = {
    "pairs: a chosen and a rejected image": (
        "dpo", "kto", "linear_dpo", "dmpo", "poly_dpo", "f_dpo", "dso_dro", "ipo", "cdpo", "robust_dpo", "mapo", "dspo",
    ),
    "ranked lists of images": ("listwise_dpo",),
    "pairs, through inversion": ("inpo", "smpo", "inversion_dpo"),
    "good images alone": ("sft", "seppo", "diffusion_dro", "spin"),
    "prompts and a scorer": ("raft", "online_dpo", "spo", "lpo", "diffusion_nft", "advantage"),
}  # fmt: skip


def paper_table(record: dict[str, Any], known: Catalogue) -> str:
    """Every method of the arena: its configs, published gains over the base, and its lines in the arena."""
    first, second = _lines(record, 0), _lines(record, 2)
    lines = [
        f"| method | configs | published: {METRIC} over its base | dR, {PREFERENCES[0]} | dR, {PREFERENCES[1]} |",
        "|---|---|---|---|---|",
    ]
    for entry in entries():
        if not entry.control:
            name = entry.name
            gains = (_gain(first.get(name), PREFERENCES[0]), _gain(second.get(name), PREFERENCES[1]))
            lines.append(f"| {' | '.join((_link(name), _configs(name), _published(name, known), *gains))} |")
    return "\n".join(lines) + "\n"


def choice_table(record: dict[str, Any]) -> str:
    """Methods by what data they need: gain, what it cost in accuracy and diversity, and the cost of a run."""
    found = _lines(record, 0)
    dpo = found["dpo"]
    lines = [
        "| data | method | dR | accuracy | diversity | UNet forwards, DPO = 1 |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for data, names in NEEDS.items():
        measured = [name for name in names if name in found]
        measured.sort(key=lambda name: -found[name]["rewards"][PREFERENCES[0]]["gain"][0])
        for place, name in enumerate(measured):
            row = found[name]
            cost = _mean(row["unet_forwards"]) / _mean(dpo["unet_forwards"])
            mark = " (guard)" if row["guards"] else ""
            cells = (
                data if place == 0 else "",
                _link(name),
                _gain(row, PREFERENCES[0]) + mark,
                f"{row['accuracy']['change'][0]:+z.3f}",
                f"{row['diversity'][0]:.2f}",
                f"{cost:.2g}",
            )
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def sweep_table(found: dict[str, Any]) -> str:
    """What the sweep chose for each entry, its gain by seed, and how far it looked."""
    lines = [
        "| method | trials | rates | chosen: rate | scale | dR, seed by seed | at the edge |",
        "|---|---:|---|---:|---|---|---|",
    ]
    for name, entry in found["entries"].items():
        trials, chosen = entry["trials"], entry["chosen"]
        rates = sorted({trial["settings"][RATE] for trial in trials})
        scales = {key: value for key, value in chosen.items() if key != RATE}
        gains = [f"{trial['gain']:+.3f}" for trial in trials if trial["settings"] == chosen]
        edge = {rates[0]: "lowest rate", rates[-1]: "highest rate"}.get(chosen[RATE], "")
        cells = (
            f"`{name}`",
            str(len(trials)),
            f"{rates[0]:.0e} to {rates[-1]:.0e}".replace("e-0", "e-"),
            f"{chosen[RATE]:.0e}".replace("e-0", "e-"),
            ", ".join(f"{key.partition('.')[2]} {value:g}" for key, value in scales.items()) or "its config's",
            " ".join(gains),
            edge,
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def replaced(page: str, table: str, below: str = "") -> str:
    """The page with the table in place of the first one with its head after the text `below`.

    Raises ValueError where there is none.
    """
    head = table.splitlines()[0]
    start = page.index(head, page.index(below))
    end = start + len("".join(line for line in _until_blank(page[start:])))
    return page[:start] + table + page[end:]


def main() -> None:
    """Writes the pages."""
    record, tuned = json.loads(RECORD.read_text()), json.loads(SWEEP.read_text())
    for page, table in (
        (PAPERS, paper_table(record, catalogue())),
        (CHOICE, choice_table(record)),
        (ARENA, sweep_table(tuned)),
    ):
        page.write_text(replaced(page.read_text(), table))
    for view in record["views"]:
        table = leaderboard_table(view["rows"], view["preference"])
        ARENA.write_text(replaced(ARENA.read_text(), table, f"\n### {view['preference']}: {view['budget']}"))


def _until_blank(text: str) -> list[str]:
    lines = text.splitlines(keepends=True)
    return lines[: next((n for n, line in enumerate(lines) if not line.strip()), len(lines))]


def _lines(record: dict[str, Any], view: int) -> dict[str, Any]:
    return {row["name"]: row for row in record["views"][view]["rows"]}


def _gain(row: dict[str, Any] | None, preference: str) -> str:
    return UNMEASURED if row is None else interval(row["rewards"][preference]["gain"], "+.3f")


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _link(name: str) -> str:
    return f"[`{name}`]({PAGES.get(name, 'methods/{}.md').format(name)})"


def _configs(name: str) -> str:
    folder = ROOT / "training_configs"
    files = [*folder.glob(f"*/{name}.yaml"), *folder.glob(f"*/{name}_full.yaml"), *folder.glob(f"*/{name}_lora.yaml")]
    names = sorted(file.relative_to(folder).with_suffix("").as_posix() for file in files)
    return ", ".join(f"[{each}](../training_configs/{each}.yaml)" for each in names)


def _published(name: str, known: Catalogue) -> str:
    """The method's mean less the base's, of every table that has both."""
    parts = []
    for base, about in known.bases.items():
        gains = []
        for table in known.tables:
            rows, column = table.figures.get(base, {}), table.metrics.index(METRIC)
            if {BASE, PUBLISHED.get(name, "")} <= rows.keys():
                gain = rows[PUBLISHED[name]][column] - rows[BASE][column]
                gains.append(f"{gain:+.2f} ([{table.title}](published.md#{table.title.lower().replace(' ', '-')}))")
        if gains:
            parts.append(f"{about.title} {', '.join(gains)}")
    return "; ".join(parts) or NONE


if __name__ == "__main__":
    main()
