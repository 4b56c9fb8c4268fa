"""`run.html` and its records in a run: training is as it was, a failure is a warning, a resumed run goes on."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import diffalign.training.callbacks.run_page as module
import diffalign.training.run as run_module
from diffalign.config.schema import Config
from diffalign.objectives import OBJECTIVES
from diffalign.pages.html import save_page
from diffalign.training.callbacks.base import Callback, TrainingState
from diffalign.training.callbacks.run_page import RunPage, start_loss
from diffalign.training.callbacks.run_records import RunRecords
from diffalign.training.metrics import Meter
from diffalign.training.run import run_training
from diffalign.training.trainable import TrainingError
from tests.training.test_run import metrics, same, weights

MakeConfig = Callable[..., Config]


def lines(folder: str | Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(folder) / f"{name}.jsonl").read_text().splitlines()]


def text(folder: str | Path) -> str:
    return (Path(folder) / "run.html").read_text(encoding="utf-8")


def test_a_run_with_its_page_has_the_weights_of_one_without(
    make_config: MakeConfig, tiny_sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SECONDS", 0.0)
    monkeypatch.setattr(module, "SHARE", 1e9)  # a page at every log
    with_page = make_config(tiny_sd)
    run_training(with_page)
    assert "finished" in text(with_page.output_dir)
    assert [line["step"] for line in lines(with_page.output_dir, "margins")] == [1, 2, 3, 4]
    assert lines(with_page.output_dir, "margins")[0]["counts"][16] == 2  # both pairs of the first step are at 0

    made = run_module.run_callbacks
    ours = (RunPage, RunRecords)
    monkeypatch.setattr(
        run_module, "run_callbacks", lambda *given: [c for c in made(*given) if not isinstance(c, ours)]
    )
    monkeypatch.setattr(Meter, "add_margins", lambda *_: None)
    without = make_config(tiny_sd, {"output_dir": str(tmp_path / "without")})
    run_training(without)
    assert not (Path(without.output_dir) / "run.html").exists()
    assert same(weights(with_page.output_dir), weights(without.output_dir))
    assert metrics(with_page.output_dir) == metrics(without.output_dir)


def test_a_resumed_run_continues_its_records(make_config: MakeConfig, tiny_sd: Path, tmp_path: Path) -> None:
    whole = make_config(tiny_sd)
    run_training(whole)
    parts = {"output_dir": str(tmp_path / "parts"), "training.checkpointing_steps": 2}
    run_training(make_config(tiny_sd, {**parts, "training.max_train_steps": 3}))
    first = lines(parts["output_dir"], "timing")
    (tmp_path / "early").mkdir()
    (tmp_path / "early/timing.jsonl").write_text(json.dumps(first[0]) + "\n")  # killed before the first checkpoint
    early = {"output_dir": str(tmp_path / "early"), "training.resume_from_checkpoint": "latest"}
    run_training(make_config(tiny_sd, {**early, "training.max_train_steps": 1}))
    assert [line["step"] for line in lines(early["output_dir"], "timing")] == [0, 1]
    resumed = {**parts, "training.resume_from_checkpoint": str(tmp_path / "parts/checkpoint-2")}
    run_training(make_config(tiny_sd, resumed))
    assert lines(parts["output_dir"], "margins") == lines(whole.output_dir, "margins")
    timing = lines(parts["output_dir"], "timing")
    assert timing[:3] == first[:3]  # steps 0, 1 and 2
    assert [(line["step"], line["pairs"]) for line in timing] == [(0, 0), (1, 2), (2, 4), (3, 6), (4, 8)]
    seconds = [line["seconds"] for line in timing]
    assert seconds == sorted(seconds)
    assert [line["unet_forwards"] for line in timing[1:]] == [x["unet_forwards"] for x in metrics(whole.output_dir)]


def test_a_page_that_cannot_be_written_is_one_warning(
    make_config: MakeConfig, tiny_sd: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object, **__: object) -> str:
        raise OSError("the disk is gone")

    monkeypatch.setattr(module, "run_page", broken)
    config = make_config(tiny_sd, {"training.max_train_steps": 1})
    folder = Path(config.output_dir)
    with caplog.at_level(logging.WARNING):
        run_training(config)
    warnings = [record.getMessage() for record in caplog.records if "run.html" in record.getMessage()]
    assert warnings == ["no run.html, training continues: OSError: the disk is gone"]
    assert not (folder / "run.html").exists()
    assert weights(folder)


def test_half_a_page_never_replaces_a_whole_one(
    make_config: MakeConfig, tiny_sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The page is not there under its name before it is complete."""
    page = tmp_path / "run.html"
    page.write_text("whole")

    def torn(self: Path, content: str, **_: object) -> int:
        with self.open("w") as file:
            file.write(content[:3])
        raise OSError("torn")

    monkeypatch.setattr(Path, "write_text", torn)
    with pytest.raises(OSError, match="torn"):
        save_page(page, "another")
    assert page.read_text() == "whole"
    assert [path.name for path in tmp_path.iterdir()] == ["run.html"]


def test_a_run_that_fails_says_so_on_its_page(make_config: MakeConfig, tiny_sd: Path, tmp_path: Path) -> None:
    class Fails(Callback):
        def on_step_end(self, state: TrainingState) -> None:
            if state.step == 2:
                raise TrainingError("enough <of> it")

    config = make_config(tiny_sd)
    with pytest.raises(TrainingError):
        run_training(config, callbacks=[Fails()])
    assert "ended early" in text(config.output_dir)
    assert "TrainingError: enough &lt;of&gt; it" in text(config.output_dir)
    assert "step 2 of 4" in text(config.output_dir)


def test_pages_are_written_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    """At most every 10 seconds; less often where writing takes more than a hundredth of the time."""
    now, written = [100.0], []

    def write(callback: RunPage, cost: float) -> None:
        def page(*_: object) -> None:
            written.append(now[0])
            now[0] += cost

        monkeypatch.setattr(module, "write_run_page", page)
        callback.on_log(state)

    class Anything:
        def __getattr__(self, _: str) -> Any:
            return self

    state = TrainingState(Anything(), [], 1)  # type: ignore[arg-type]
    callback = RunPage(lambda: now[0])
    callback.state = state
    for at, cost in ((100.0, 0.0), (109.0, 0.0), (110.0, 1.0), (205.0, 1.0), (211.0, 0.0)):
        now[0] = at
        write(callback, cost)
    assert written == [100.0, 110.0, 211.0]


def test_where_the_loss_starts(make_config: MakeConfig, tiny_sd: Path) -> None:
    """As each objective's own docstring has it; none where it depends on more than the difference of errors."""

    def start(name: str) -> float | None:
        return start_loss(make_config(tiny_sd).model_copy(update={"objective": OBJECTIVES[name]()}))

    assert start("dpo") == start("cdpo") == start("inpo") == pytest.approx(0.6931472)
    assert start("kto") == 0.5
    assert start("sft") is start("mapo") is start("spo") is start("smpo") is None
