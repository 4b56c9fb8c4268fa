"""`diffalign report`, and what `diffalign train` prints at the end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from diffalign.cli.main import main
from diffalign.cli.training.report import names
from diffalign.config.schema import load_config, packaged_config, save_config
from diffalign.errors import DiffalignError
from diffalign.io.folder_lock import folder_lock
from diffalign.pages.run_page.data import RunState, read_run
from diffalign.pages.run_page.summary import WIDTH, summary


def a_run(folder: Path, **settings: Any) -> Path:
    """The files of a run of two logs, without weights."""
    folder.mkdir(parents=True)
    save_config(load_config(packaged_config("world/dpo.yaml"), [f"output_dir={folder}"]), folder / "config.yaml")
    tree = yaml.safe_load((folder / "config.yaml").read_text())
    (folder / "config.yaml").write_text(yaml.safe_dump(tree | settings))
    lines = [{"step": 10, "loss": 0.69, "implicit_acc": 0.5}, {"step": 20, "loss": 0.5, "implicit_acc": 0.75}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_the_page_of_one_run_is_beside_its_metrics(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = a_run(tmp_path / "dpo")
    for _ in range(2):  # its own page is replaced
        main(["report", str(folder)])
    assert capsys.readouterr().out.splitlines()[:2] == [
        "dpo: ended, step 20 of 300",
        f"{folder}/run.html: open it in a browser",
    ]
    page = (folder / "run.html").read_text()
    assert "ln 2: policy = reference" in page
    assert "no final weights" in page
    with folder_lock(folder, "a training run"):
        main(["report", str(folder)])
    assert capsys.readouterr().out.startswith("dpo: running")
    assert '"running":true' in (folder / "run.html").read_text()


def test_several_runs_go_to_a_page_that_is_not_overwritten(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = a_run(tmp_path / "a/dpo"), a_run(tmp_path / "b/dpo", seed=7)
    monkeypatch.chdir(tmp_path)
    main(["report", str(one), str(two)])
    page = (tmp_path / "report.html").read_text()
    assert "<code>seed</code>" in page
    assert "<code>objective.beta</code>" not in page
    with pytest.raises(SystemExit) as ended:
        main(["report", str(one), str(two)])
    assert ended.value.code == 2
    assert "--overwrite" in capsys.readouterr().err
    main(["report", str(one), f"other={two}", "--out", "report.html", "--overwrite"])
    assert capsys.readouterr().out.splitlines()[:2] == ["dpo: ended, step 20 of 300", "other: ended, step 20 of 300"]


def test_what_is_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["report", str(tmp_path)])
    assert ended.value.code == 2
    assert "is not the folder of a run" in capsys.readouterr().err
    assert not (tmp_path / "run.html").exists()


def test_a_run_of_an_objective_that_is_not_installed_has_a_page(tmp_path: Path) -> None:
    folder = a_run(tmp_path / "mine", objective={"name": "not_there:Mine"})
    main(["report", str(folder)])
    assert "the start of the loss is left out" in (folder / "run.html").read_text()


def test_names_tell_runs_apart(tmp_path: Path) -> None:
    found = names([str(tmp_path / "a/dpo"), str(tmp_path / "b/dpo"), f"mine={tmp_path / 'c'}"])
    assert [name for name, _ in found] == ["a/dpo", "b/dpo", "mine"]
    assert [name for name, _ in names([str(tmp_path / "a/dpo"), str(tmp_path / "ipo")])] == ["dpo", "ipo"]
    for twice in ([str(tmp_path), str(tmp_path)], [f"x={tmp_path}", f"x={tmp_path / 'a'}"]):
        with pytest.raises(DiffalignError, match="is given twice"):
            names(twice)


def test_the_end_of_a_run_fits_a_terminal(tmp_path: Path) -> None:
    folder = a_run(tmp_path / "dpo")
    (folder / "health.jsonl").write_text(json.dumps({"step": 20, "action": "warn", "says": "x" * 300}) + "\n")
    (folder / "timing.jsonl").write_text(
        json.dumps({"step": 0, "seconds": 0, "pairs": 0})
        + "\n"
        + json.dumps({"step": 20, "seconds": 4, "pairs": 640})
        + "\n"
    )
    lines = summary(read_run(folder, {"training": {"max_train_steps": 30}}, RunState("finished")), folder).splitlines()
    assert max(map(len, lines)) <= WIDTH
    assert lines[:5] == [
        "     steps  20 of 30 in 4 s",
        "     pairs  640, 160 per second",
        "      loss  0.6900 at the first log, 0.5000 at the last log",
        "  accuracy  0.5000 at the first log, 0.7500 at the last log (training)",
        "    health  1 report (health.jsonl)",
    ]
