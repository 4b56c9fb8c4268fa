"""`diffalign list objectives`: each registered objective with its paper, its file, its configs and a citation."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from diffalign.cli.list import cited, objective_entries
from diffalign.cli.main import main
from diffalign.objectives import OBJECTIVES
from diffalign.rewards import declared_tie
from diffalign.rewards.table import SCORERS

ROOT = Path(__file__).parent.parent.parent
ENTRIES = {entry.name: entry for entry in objective_entries()}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_has_paper_file_configs_and_citation(name: str) -> None:
    entry = ENTRIES[name]
    assert re.match(r"[A-Z]\w+( et al\.)?, \S", entry.paper)
    assert re.fullmatch(r"(arXiv (\d{4}\.\d{5}), https://arxiv\.org/abs/\2|https://\S+)", entry.citation)
    assert f'name: ClassVar[str] = "{name}"' in (ROOT / entry.file).read_text()
    assert entry.configs
    for config in entry.configs:
        node = yaml.safe_load((ROOT / "training_configs" / config).read_text())
        assert node["objective"]["name"] == name


def test_every_config_with_an_objective_is_listed_once() -> None:
    listed = sorted(config for entry in ENTRIES.values() for config in entry.configs)
    folder = ROOT / "training_configs"
    files = [file for file in folder.rglob("*.yaml") if file.parent.name != "accelerate"]
    texts = {file.relative_to(folder).as_posix(): yaml.safe_load(file.read_text()) for file in files}
    assert listed == sorted(name for name, node in texts.items() if "objective" in node)


def test_all_four_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    main(["list", "objectives"])
    printed = capsys.readouterr().out
    for entry in ENTRIES.values():
        for part in (entry.paper, entry.citation, entry.file, ", ".join(entry.configs), entry.settings):
            assert part in printed
    assert "world/spin.yaml" in printed  # SPIN is a setting of seppo
    assert "pickscore" not in printed


def test_every_scorer_is_printed_and_documented_with_its_tie(capsys: pytest.CaptureFixture[str]) -> None:
    main(["list", "scorers"])
    printed = capsys.readouterr().out
    documented = {
        name: row.split("|")[4].strip()
        for row in (ROOT / "docs/scorers.md").read_text().partition("## Weights")[0].splitlines()
        if row.startswith("| `")
        for name in re.findall(r"`([^`]+)`", row.split("|")[1])
    }
    assert set(documented) == set(SCORERS)
    for name, entry in SCORERS.items():
        lines = printed.partition(f"  {name}\n")[2].splitlines()
        assert lines[0].strip() == f"score     {entry.score}; tie {declared_tie(name):g}"
        assert (lines[1].split(maxsplit=1)[1], lines[2].split(maxsplit=1)[1]) == (entry.needs, entry.licence)
        assert float(documented[name].split(",")[0]) == declared_tie(name)


def test_a_paper_that_cites_nothing_is_named() -> None:
    assert cited("A et al., T, arXiv 2401.00001, eq. 3") == (
        "A et al., T, eq. 3",
        "arXiv 2401.00001, https://arxiv.org/abs/2401.00001",
    )
    with pytest.raises(ValueError, match=r"'A et al., T, 2023' cites nothing"):
        cited("A et al., T, 2023")
