"""The reference tables of the docs list exactly the keys and defaults of the code; their examples run."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from diffalign.config.schema import OBJECTIVE_ONLY, Config, PreferenceModelConfig, PreferenceModelSection
from diffalign.models.adapters.methods import METHODS, known_methods
from diffalign.objectives import OBJECTIVES
from diffalign.sources import SOURCES
from diffalign.training.run import _FREE

DOCS = Path(__file__).parent.parent / "docs"
ROW = re.compile(r"^\| `(\w+)` \| (—|`(.*?)`) \| (\S.*) \|$", re.MULTILINE)
SECTIONS = {"The run": Config} | {
    f"`{key}`": field.annotation
    for key, field in Config.model_fields.items()
    if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
}


def part(page: str, heading: str) -> str:
    """The text below a heading, up to the next one of its level or above."""
    text = (DOCS / page).read_text()
    found = re.search(rf"^(#+) {re.escape(heading)}$", text, re.MULTILINE)
    assert found, f"{page} has no section {heading}"
    return re.split(rf"^#{{1,{len(found[1])}}} ", text[found.end() :], maxsplit=1, flags=re.MULTILINE)[0]


def table(page: str, heading: str) -> dict[str, Any]:
    """Key -> default, as written; required keys have the default —."""
    rows = ROW.findall(part(page, heading))
    return {key: "—" if cell == "—" else yaml.safe_load(value) for key, cell, value, _ in rows}


def plain(default: Any) -> Any:
    return list(default) if isinstance(default, tuple) else default


@pytest.mark.parametrize("heading", SECTIONS)
def test_the_config_reference_is_the_config(heading: str) -> None:
    expected = {
        key: "—" if field.is_required() else plain(field.default)
        for key, field in SECTIONS[heading].model_fields.items()
        if key not in ("objective", "tuning", *(s.strip("`") for s in SECTIONS))
    }
    # YAML 1.1 reads a bare `no` as false; pydantic's Literal wants the string, and so does the reader
    assert table("training.md", heading) == {k: False if v == "no" else v for k, v in expected.items()}


def test_every_section_is_covered() -> None:
    assert set(SECTIONS) == {"The run", "`model`", "`data`", "`training`", "`validation`", "`health`"}


def test_the_tuning_reference_is_the_fields_of_all_methods() -> None:
    fields = {f.name: plain(f.default) for cls in known_methods().values() for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    assert table("training.md", "`tuning`") == {"method": "lora", **fields}
    assert [name for name in METHODS if f"`{name}`" not in part("training.md", "`tuning`")] == []


def test_the_preference_models_reference_is_its_section() -> None:
    fields = PreferenceModelSection.model_fields
    assert table("step_aware.md", "`preference_model`") == {key: field.default for key, field in fields.items()}
    text = part("step_aware.md", "The config")
    refused = [f"`{section}.{key}`" for section, keys in OBJECTIVE_ONLY.items() for key in keys]
    assert [name for name in refused if name not in text] == []
    shared = {"objective", "source", "tuning", "validation", "health"}
    assert Config.model_fields.keys() - PreferenceModelConfig.model_fields.keys() == shared


def test_every_metric_of_a_preference_model_is_explained() -> None:
    import torch

    from diffalign.contrib.step_aware.step import judge_metrics

    text = part("step_aware.md", "What is logged")
    explained = set(re.findall(r"`([\w/]+)`", text))
    labels = torch.tensor([[1.0, 0.5], [0.0, 0.5]])
    names = judge_metrics(torch.zeros(2, 2), labels, torch.zeros(2), torch.tensor([0, 999]), 1000)
    assert sorted((names.keys() | {"lr", "grad_norm"}) - explained) == []


OF_FAMILIES = dict.fromkeys(("inpo", "smpo", "inversion_dpo"), "inversion.md") | {"spo": "spo.md"}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_objectives_reference_is_the_dataclass(name: str) -> None:
    """Each has a page, or a section of its family's page; the overview links to it, and it shows the source."""
    cls: Any = OBJECTIVES[name]
    page, heading = (OF_FAMILIES[name], name) if name in OF_FAMILIES else (f"methods/{name}.md", "Settings")
    text = (DOCS / page).read_text()
    assert table(page, heading) == {f.name: plain(f.default) for f in dataclasses.fields(cls)}
    arxiv = re.search(r"arXiv (\d{4}\.\d{5})", cls.paper)
    assert arxiv is None or arxiv[1] in text
    anchor = f"#{name}" if name in OF_FAMILIES else ""
    assert f"[`{name}`]({page}{anchor})" in (DOCS / "objectives.md").read_text()
    assert re.search(rf"^\[Source of `{cls.__name__}\.score`\]", text, re.MULTILINE) or cls.score is not vars(cls).get(
        "score"
    )


@pytest.mark.parametrize("name", SOURCES)
def test_the_sources_reference_is_the_dataclass(name: str) -> None:
    cls: Any = SOURCES[name]
    page = "spo.md" if name == "rollout" else "online.md"
    required = dataclasses.MISSING
    expected = {f.name: "—" if f.default is required else plain(f.default) for f in dataclasses.fields(cls)}
    assert table(page, name) == expected
    assert re.search(r"arXiv (\d{4}\.\d{5})", cls.paper)[1] in part(page, name)  # type: ignore[index]
    assert f"[`{name}`]({page.replace('online.md', '')}#{name})" in part(
        "online.md", "Online: pairs generated during training"
    )


def test_every_health_rule_is_explained_and_has_a_remedy() -> None:
    from diffalign.training.callbacks.health_rules import RULES

    pages = ("health.md", *(f"how_to/{page}.md" for page in ("training", "images")))
    explained, *remedies = ((DOCS / page).read_text() for page in pages)
    for rule in (*RULES, "not_finite"):
        assert f"| `{rule}` |" in explained
        assert any(f"`{rule}`" in page for page in remedies), rule


def test_every_paper_of_the_code_and_the_pages_is_in_the_index() -> None:
    paper = re.compile(r"(?:arXiv:? ?|arxiv\.org/abs/)(\d{4}\.\d{5})")
    index = set(paper.findall((DOCS / "papers.md").read_text()))
    for file in [*(DOCS.parent / "diffalign").rglob("*.py"), *DOCS.rglob("*.md"), DOCS.parent / "README.md"]:
        assert sorted(set(paper.findall(file.read_text())) - index) == [], file


def test_what_may_change_on_resuming_is_listed() -> None:
    listed = set(re.findall(r"`((?:\w+\.)?\w+)`", part("training.md", "Resuming")))
    assert _FREE - {"output_dir", "overwrite_output_dir"} <= listed


def test_every_logged_metric_is_explained() -> None:
    """Each name a run writes, from a step of every objective on toy networks."""
    from diffalign.engine.measure import measure
    from diffalign.objectives.base import ask
    from diffalign.objectives.modified import modified
    from diffalign.training.metrics import observe
    from tests.toy import toy_batch, toy_models

    text = part("objectives.md", "What the metrics mean")
    explained = set(re.findall(r"`([\w/]+)`", text))
    models = toy_models()
    every = modified(OBJECTIVES["dpo"](), safeguard_mu=0.5, sft_weight=1.0, distance_weight=1.0)
    for objective in (*(cls() for cls in OBJECTIVES.values()), every):
        evidence = measure(models, ask(objective, toy_batch(), models))
        names = {re.sub(r"q[1-4]$", "q1", n) for n in observe(evidence, objective.score(evidence), 1000)}
        assert sorted(names - explained) == []


def test_migration_leads_to_modules_that_exist() -> None:
    rows = re.findall(
        r"^\| `(diffalign[.\w]+)` \| `(diffalign[.\w]+)`", (DOCS.parent / "MIGRATION.md").read_text(), re.MULTILINE
    )

    def exists(module: str) -> bool:
        path = DOCS.parent / module.replace(".", "/")
        return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()

    assert len(rows) > 90
    assert [new for _, new in rows if not exists(new)] == []


def test_the_objective_of_contributing_is_whole() -> None:
    """Its code block runs as it stands, gives the case worked by hand in its docstring, and takes a real batch."""
    import torch

    from diffalign.engine.measure import measure
    from diffalign.objectives.base import ask
    from diffalign.types import Evidence
    from tests.toy import toy_batch, toy_models

    code = re.findall(r"```python\n(.*?)```", (DOCS.parent / "CONTRIBUTING.md").read_text(), re.DOTALL)[0]
    names: dict[str, Any] = {"__name__": "tests.test_docs"}
    exec(compile(code, "CONTRIBUTING.md", "exec"), names)
    objective = names["HingeDPO"](beta=10.0)
    score = objective.score(Evidence(torch.tensor([[0.4], [0.5]]), torch.tensor([[0.5], [0.5]])))
    assert (float(score.logit), float(score.loss)) == (pytest.approx(0.5), pytest.approx(0.5))
    models = toy_models()
    assert objective.score(measure(models, ask(objective, toy_batch(), models))).loss.isfinite().all()
