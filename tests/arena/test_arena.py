"""A small arena from start to end: what it writes, what it reuses, and that it ranks a broken method last."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from diffalign.arena import jobs
from diffalign.arena.arena import run_arena, tables
from diffalign.arena.board import ranked
from diffalign.arena.entries import Protocol, entries
from diffalign.arena.folder import ArenaFolder
from diffalign.arena.sweep import chosen, finalists, save_sweep, sweep_settings
from diffalign.cli.main import main
from diffalign.errors import DiffalignError

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("inline")]

TINY = Protocol(steps=2, seeds=(0, 1), forwards_seeds=(0,), second_seeds=(0,), pictures=2, split="heldout")


@pytest.fixture(scope="module")
def held(tmp_path_factory: pytest.TempPathFactory, inline: None) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("arena")
    taking_part = entries(("dpo", "sft", "flipped"))
    return folder, run_arena(ArenaFolder(folder, 2), taking_part, TINY, {"dpo": {"objective.beta": 500.0}}, "a command")


def test_three_views_of_every_entry(held: tuple[Path, dict[str, Any]]) -> None:
    folder, found = held
    assert [view["preference"] for view in found["views"]] == ["world", "world", "world-size"]
    for view, runs in zip(found["views"], (2, 1, 1), strict=True):
        assert {row["name"] for row in view["rows"]} == {"dpo", "sft", "flipped"}
        assert {row["runs"] for row in view["rows"]} == {runs}
    assert json.loads((folder / "result.json").read_text())["views"] == found["views"]
    assert (folder / "leaderboard.md").read_text() == tables(found)
    assert found["command"] == "a command"
    assert found["environment"]["versions"]["torch"]
    commits = {commit for view in found["views"] for row in view["rows"] for commit in row["commits"]}
    assert commits == {found["environment"]["git_commit"]}


def test_equal_forwards_gives_a_cheap_method_more_steps(held: tuple[Path, dict[str, Any]]) -> None:
    folder, found = held
    steps, forwards, _ = ({row["name"]: row for row in view["rows"]} for view in found["views"])
    assert steps["dpo"]["unet_forwards"] == [TINY.unet_forwards] * 2
    assert forwards["dpo"]["gain_by_run"]["world"] == steps["dpo"]["gain_by_run"]["world"][:1]
    assert not (folder / "runs/world/forwards/dpo").exists()  # cost just that already, and is not trained again
    assert steps["sft"]["unet_forwards"] == [TINY.unet_forwards // 4] * 2  # one side, no reference
    assert forwards["sft"]["steps"] == [4 * TINY.steps]
    assert forwards["sft"]["unet_forwards"] == [TINY.unet_forwards]


def test_settings_of_the_sweep_are_used(held: tuple[Path, dict[str, Any]]) -> None:
    _, found = held
    rows = {row["name"]: row for row in found["views"][0]["rows"]}
    assert rows["dpo"]["config"]["objective"]["beta"] == 500.0
    assert rows["flipped"]["config"]["objective"]["beta"] == 500.0  # a control differs in one thing alone
    assert rows["flipped"]["config"]["data"]["invert_preference"] is True


def test_lines_of_an_earlier_arena_stay_where_nothing_is_run(held: tuple[Path, dict[str, Any]]) -> None:
    folder, earlier = held
    found = run_arena(ArenaFolder(folder, 2), entries(("sft",)), TINY, {}, "", earlier)
    assert found["kept"] == {"environment": earlier["environment"]}
    for now, before in zip(found["views"], earlier["views"], strict=True):
        rows = [{row["name"]: row for row in view["rows"]} for view in (now, before)]
        assert rows[0].keys() == rows[1].keys()
        assert all(rows[0][name] == rows[1][name] | {"kept": True} for name in ("dpo", "flipped"))
        assert "kept" not in rows[0]["sft"]
        assert now["rows"] == ranked(now["rows"], now["preference"])
    assert (folder / "arena.html").read_text().count("computed: dpo, flipped.") == 3
    with pytest.raises(DiffalignError, match=r"another protocol \(steps, unet_forwards\)"):
        run_arena(ArenaFolder(folder, 2), entries(("sft",)), replace(TINY, steps=3), {}, "", earlier)
    run_arena(ArenaFolder(folder, 2), entries(("dpo", "sft", "flipped")), TINY, {"dpo": {"objective.beta": 500.0}},
              "a command")  # the folder as the other tests read it  # fmt: skip


class _Page(HTMLParser):
    """Tags that are open, and addresses that a browser would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)
        self.handle_startendtag(tag, attrs)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_stands_alone(held: tuple[Path, dict[str, Any]]) -> None:
    folder, found = held
    text = (folder / "arena.html").read_text()
    reader = _Page()
    reader.feed(text)
    assert reader.open == []
    assert all(address.startswith(("data:", "#")) for address in reader.addresses)
    assert not re.search(r"<script|@import|url\((?!#)", text)
    assert text.count("ln 2</text>") == 2  # dpo and flipped; sft has no preference loss
    for row in found["views"][0]["rows"]:
        assert f"<article id='{row['name']}'>" in text
    assert text.count("<pre>") == 3
    assert text.count("data:image/png;base64,") == 6  # each entry beside the base


def test_the_image_is_one(held: tuple[Path, dict[str, Any]]) -> None:
    with Image.open(held[0] / "leaderboard.png") as image:
        assert image.format == "PNG"
        assert image.width > 800


def test_a_flipped_sign_is_ranked_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An arena must rank a broken method last, with the interval of its win rate below one half."""
    monkeypatch.setattr(jobs, "STEPS", 10)  # sampling steps; enough for the true reward to tell images apart
    protocol = Protocol(steps=24, seeds=(0,), forwards_seeds=(), second_seeds=(), pictures=2, split="heldout")
    found = run_arena(ArenaFolder(tmp_path, 2), entries(("dpo", "flipped")), protocol, {}, "")
    dpo, flipped = found["views"][0]["rows"]
    assert (dpo["name"], flipped["name"]) == ("dpo", "flipped")
    assert flipped["rewards"]["world"]["win_rate"][2] < 0.5
    assert dpo["rewards"]["world"]["gain"][1] > 0


def test_a_sweep_tries_chooses_and_keeps_what_is_known(tmp_path: Path) -> None:
    protocol = Protocol(steps=1, seeds=(0, 1), forwards_seeds=(), second_seeds=(), pictures=2, split="heldout")
    mapo = replace(entries(("mapo",))[0], rates=(1e-5, 2e-5), scales=(0.5,))
    found = sweep_settings(ArenaFolder(tmp_path, 2), [mapo], "", protocol)
    trials = found["entries"]["mapo"]["trials"]
    asked = [(t["seed"], *t["settings"].values()) for t in trials]
    assert asked[:2] == [(0, 1e-5), (0, 2e-5)]
    assert asked[2] in [(0, 1e-5, 0.5), (0, 2e-5, 0.5)]  # at the better rate
    assert [t["settings"] for t in trials[3:]] == finalists(trials[:3], 2)
    assert {t["seed"] for t in trials[3:]} == {1}
    assert {t["git_commit"] for t in trials} == {found["environment"]["git_commit"]}
    assert found["entries"]["mapo"]["chosen"] == chosen(trials)

    shutil.rmtree(tmp_path / "sweep")  # nothing is left that could be read again
    marked = json.loads(json.dumps(found).replace(f'"{trials[0]["git_commit"]}"', '"old"'))
    again = sweep_settings(ArenaFolder(tmp_path, 2), [replace(mapo, rates=(1e-5, 2e-5, 4e-5))], "", protocol, marked)
    held = again["entries"]["mapo"]["trials"]
    assert [t for t in held if t["git_commit"] == "old"] == marked["entries"]["mapo"]["trials"]
    assert {t["settings"]["training.learning_rate"] for t in held if t["git_commit"] != "old"} >= {4e-5}


def trial(gain: float | None, guards: tuple[str, ...] = (), name: str = "", seed: int = 0) -> dict[str, Any]:
    return {"gain": gain, "guards": list(guards), "settings": {"name": name or str(gain)}, "seed": seed}


def test_the_best_trial_is_one_whose_guards_are_silent() -> None:
    def best(*trials: dict[str, Any]) -> str:
        names = [settings["name"] for settings in finalists(trials, 1)]
        assert [chosen(trials)["name"]] == names
        return str(names[0])

    assert best(trial(0.1), trial(0.2), trial(0.3, ("diversity",)), trial(None)) == "0.2"
    assert best(trial(0.1, ("faithfulness",)), trial(0.3, ("diversity",))) == "0.3"
    assert best(trial(None), trial(-0.4)) == "-0.4"


def test_chosen_is_the_mean_over_seeds_and_a_guard_of_any_seed_counts() -> None:
    one_seed = trial(0.9, name="one seed")
    a, b = [trial(0.3, name="a"), trial(0.1, name="a", seed=1)], [trial(0.2, name="b"), trial(0.25, name="b", seed=1)]
    assert chosen([one_seed, *a, *b])["name"] == "b"
    b[1]["guards"] = ["diversity"]
    assert chosen([one_seed, *a, *b])["name"] == "a"
    a[1]["gain"] = None  # failed
    assert chosen([one_seed, *a, *b])["name"] == "b"


def test_what_another_sweep_found_is_kept(tmp_path: Path) -> None:
    file = tmp_path / "tuned.json"
    save_sweep({"environment": {"git_commit": "old"}, "entries": {"a": {"chosen": 1}, "b": {"chosen": 1}}}, file)
    now = {"environment": {"git_commit": "new"}, "entries": {"b": {"git_commit": "new", "chosen": 2}}}
    save_sweep(now, file)
    kept = {"a": {"git_commit": "old", "chosen": 1}, "b": {"git_commit": "new", "chosen": 2}}
    assert json.loads(file.read_text()) == now | {"entries": kept}


def test_the_command_refuses_what_it_cannot_do(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        main(["arena", "--only", "dpoo", "--out", str(tmp_path)])
    assert "no entry is called dpoo" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["arena", "--workers", "0", "--out", str(tmp_path)])
    assert "argument --workers: '0' is not allowed" in capsys.readouterr().err
    (tmp_path / "record.json").write_text("[]")
    for file, message in (("record.json", "not the result.json of an arena"), ("none.json", "no such file")):
        with pytest.raises(SystemExit):
            main(["arena", "--only", "sft", "--keep", str(tmp_path / file), "--out", str(tmp_path)])
        assert message in capsys.readouterr().err
