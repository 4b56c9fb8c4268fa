"""`label --by-eye`, `compare --blind` and `votes`, with a scripted annotator in place of the browser."""

from __future__ import annotations

import argparse
import json
import re
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from diffalign.cli.labels import by_eye
from diffalign.cli.main import main
from diffalign.data.spec import DataSpec
from diffalign.data.table.open import open_pairs
from diffalign.evaluation.by_eye.session import Session
from tests.cli.test_images import paint
from tests.cli.test_main import fails
from tests.evaluation.by_eye.helpers import post

Decide = Callable[[int, int, str], str]  # grey on the left, on the right, prompt -> key

LIGHTER: Decide = lambda left, right, _: "left" if left > right else "right"  # noqa: E731


@pytest.fixture
def annotator(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Replaces the browser: sees the images, sends keys, and finishes when all is judged or after `most` votes."""
    sessions: list[Session] = []
    begin = Session.__init__

    def remember(self: Session, *args: object) -> None:
        begin(self, *args)  # type: ignore[arg-type]
        sessions.append(self)

    monkeypatch.setattr(Session, "__init__", remember)

    def use(decide: Decide, most: int = 10**6) -> None:
        def serve(args: argparse.Namespace, url: str, port: int, forever: Callable[[float], None]) -> None:
            session, thread = sessions[-1], threading.Thread(target=forever, args=(0.01,), daemon=True)
            thread.start()
            try:
                judge(session, url)
            finally:
                forever.__self__.shutdown()  # type: ignore[attr-defined]  # a closed server would be polled for ever
                thread.join()

        def judge(session: Session, url: str) -> None:
            state = session.state()
            for n in range(most):
                if (current := state["current"]) is None:
                    assert post(url, "finish", {})[0] == 200
                    return
                shown = session.order[current["place"]]
                first, second = session.material.images(shown.comparison.id)
                greys = [image.open().getpixel((0, 0))[0] for image in (first, second)]
                key = decide(greys[shown.left], greys[1 - shown.left], current["prompt"])
                vote = {"event": f"{session.annotator}-{session.judged}-{n:06d}", "place": current["place"]}
                _, state = post(url, "vote", {**vote, "key": key, "seconds": 1})

        monkeypatch.setattr(by_eye, "_serve", serve)

    return use


def test_images_become_pairs(
    tmp_path: Path, annotator: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    """The lighter image is preferred; a tie is written with labels .5, a skipped pair left out; a session resumes."""
    folder = paint(
        tmp_path / "images", {"a": [10, 20, 30], "tie": [40, 50], "skip": [60, 70], "one": [80], "b": [1, 2]}
    )
    out = tmp_path / "pairs.parquet"
    label = ["label", str(folder), "--by-eye", "--out", str(out), "--annotator", "ana", "--per-prompt", "3"]
    annotator(lambda left, right, prompt: prompt if prompt in ("tie", "skip") else LIGHTER(left, right, ""), most=3)
    main(label)
    said = capsys.readouterr().out
    assert "1 prompts have one image" in said
    assert "3 pairs are left; the same command continues" in said
    annotator(lambda left, right, prompt: prompt if prompt in ("tie", "skip") else LIGHTER(left, right, ""))
    main(label)  # what the first session wrote is replaced
    said = capsys.readouterr().out
    assert "ana: 3 of 6 pairs are judged" in said
    assert f"{out}: 4 pairs, and 1 ties written with the labels .5 and .5; 1 not judged" in said
    table = open_pairs(out, DataSpec(keep_ties=True))
    assert table.problems == []
    greys = [tuple(side.open().getpixel((0, 0))[0] for side in (pair.chosen, pair.rejected)) for pair in table]
    assert {(pair.prompt, grey) for pair, grey in zip(table, greys) if not pair.tie} == {
        ("a", (20, 10)), ("a", (30, 10)), ("a", (30, 20)), ("b", (2, 1)),
    }  # fmt: skip
    assert sum(pair.tie for pair in table) == 1
    assert len(open_pairs(out)) == 4
    out.write_bytes(out.read_bytes() + b" ")  # somebody else's now
    assert "exists; name another file" in fails(capsys, *label)
    as_folder = tmp_path / "folder"
    main([*label[:4], str(as_folder), "--votes", f"{out}.votes", "--per-prompt", "3", "--no-serve"])
    assert "1 ties left out (a folder has no place for them)" in capsys.readouterr().out
    assert sorted(pair.prompt for pair in open_pairs(as_folder)) == ["a", "a", "a", "b"]


def test_pairs_are_labelled_again(
    tmp_path: Path, annotator: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    """Two annotators; the majority of one for and one against is a tie; the old label where nobody judged."""
    listing, rows = tmp_path / "pairs.jsonl", []
    for i in range(6):
        for side, grey in (("c", 10 + i), ("r", 100 + i)):
            Image.new("RGB", (8, 8), (grey,) * 3).save(tmp_path / f"{side}{i}.png")
        rows.append({"prompt": f"p{i}", "chosen": f"c{i}.png", "rejected": f"r{i}.png", "weight": 2.0})
        rows[-1] |= {"chosen_score": i, "rejected_score": -i}
    listing.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out, votes = tmp_path / "new.parquet", tmp_path / "votes"
    label = ["label", "--pairs", str(listing), "--by-eye", "--out", str(out), "--votes", str(votes), "--keep-unjudged"]
    assert "leave them out of the new pairs with --without weight" in fails(capsys, *label)
    (tmp_path / "odd.csv").write_text("id,margin\nnone,0\n")
    odd = ["--without", "weight", "--only", str(tmp_path / "odd.csv")]
    assert "odd.csv has the id 'none', which is none of the pairs" in fails(capsys, *label, *odd)
    label += ["--without", "weight", "--annotator"]
    annotator(lambda left, right, prompt: "skip" if prompt == "p5" else LIGHTER(left, right, ""))
    main([*label, "ana"])
    assert "5 pairs, and 0 ties" not in capsys.readouterr().out  # six: one with its old label
    annotator(lambda left, right, prompt: "skip" if prompt == "p5" else LIGHTER(right, left, ""), most=0)
    main([*label, "nobody"])
    (votes / "nobody.jsonl").unlink()
    annotator(
        lambda left, right, prompt: (
            "skip" if prompt in ("p4", "p5") else LIGHTER(*(left, right)[:: 1 if prompt == "p0" else -1], "")
        )
    )
    main([*label, "ben"])
    said = capsys.readouterr().out
    # common: p0 equal, p1 p2 p3 opposite. ana rejected x4; ben rejected, chosen x3: p_o = 1/4 = p_e, kappa 0
    assert re.search(r"ana ben +4 +0\.25 \[.*\] +0\.00 \[", said)
    found = {pair.prompt: pair for pair in open_pairs(out, DataSpec(keep_ties=True))}
    greys = {prompt: pair.chosen.open().getpixel((0, 0))[0] for prompt, pair in found.items() if not pair.tie}
    assert greys == {"p0": 100, "p4": 104, "p5": 15}
    assert {prompt for prompt, pair in found.items() if pair.tie} == {"p1", "p2", "p3"}
    assert found["p4"].scores == (-4.0, 4.0)  # a score stays with its image
    main(
        [
            *label[:5],
            str(tmp_path / "bens.parquet"),
            *label[6:8],
            "--without",
            "weight",
            "--no-serve",
            "--labels-of",
            "ben",
        ]
    )
    assert len(open_pairs(tmp_path / "bens.parquet")) == 4
    assert "annotator 'eve' has no votes" in fails(
        capsys,
        *label[:5],
        str(tmp_path / "x.parquet"),
        *label[6:8],
        "--without",
        "weight",
        "--no-serve",
        "--labels-of",
        "eve",
    )


def test_a_list_of_ids_corrects_a_data_set(
    tmp_path: Path, annotator: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    """As of doubtful pairs: the pairs of the list are judged, the others keep their labels."""
    old, out = tmp_path / "old", tmp_path / "new.parquet"
    for i in range(4):
        for side, grey in (("chosen", 10 + i), ("rejected", 100 + i)):
            (old / side).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (grey,) * 3).save(old / side / f"{i}.png")
        (old / f"{i}.txt").write_text(f"p{i}")
    ids = open_pairs(old).ids
    listed = tmp_path / "doubtful.csv"
    listed.write_text("rank,id,score\n" + "".join(f"{n},{ids[i]},-.5\n" for n, i in enumerate((2, 0), start=1)))
    annotator(LIGHTER)
    main(["label", "--pairs", str(old), "--only", str(listed), "--by-eye", "--keep-unjudged", "--out", str(out)])
    said = capsys.readouterr().out
    assert "2 pairs are not in --only" in said
    assert f"{out}: 4 pairs, and 0 ties written with the labels .5 and .5; 0 not judged; 2 with their old label" in said
    greys = {pair.prompt: pair.chosen.open().getpixel((0, 0))[0] for pair in open_pairs(out)}
    assert greys == {"p0": 100, "p1": 11, "p2": 102, "p3": 13}


def test_a_blind_comparison(tmp_path: Path, annotator: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    """Two prompts gain, one image equals the base's and counts as a tie; the table comes at the end alone."""
    base = paint(tmp_path / "base", {"a": [10, 20], "b": [30, 40], "c": [50, 60]})
    dpo = paint(tmp_path / "dpo", {"a": [15, 25], "b": [35, 45], "c": [50, 55]})
    votes = tmp_path / "votes"
    command = ["compare", str(base), f"dpo={dpo}", "--blind", "--out", str(votes), "--annotator", "ana"]
    annotator(LIGHTER, most=0)
    main([*command[:-1], "eve"])  # who opens the page and leaves is not an annotator
    assert "5 pairs of 3 prompts; nobody has judged any" in capsys.readouterr().out
    annotator(LIGHTER, most=2)
    main(command)
    said = capsys.readouterr().out
    assert "1 images equal the base's to the byte: they count as ties" in said
    assert "win rate" not in said
    main(["votes", str(votes)])
    assert "win rate" not in capsys.readouterr().out
    annotator(LIGHTER)
    out = tmp_path / "pairs.jsonl"
    main([*command, "--pairs-out", str(out)])
    said = capsys.readouterr().out
    assert re.search(r"dpo +ana +4/1/1 +0\.750 \[", said)  # (4 + 1/2) / 6
    assert f"{out}: 5 pairs, and 0 ties" in said
    annotator(lambda left, right, prompt: "tie")
    main([*command[:-1], "ben", "--pairs-out", str(out)])  # what the votes wrote before is replaced
    table = open_pairs(out)
    greys = [tuple(side.open().getpixel((0, 0))[0] for side in (pair.chosen, pair.rejected)) for pair in table]
    assert sorted(greys) == [(15, 10), (25, 20), (35, 30), (45, 40), (60, 55)]
    assert {str(pair.chosen.path).startswith(str(tmp_path / "pairs_images")) for pair in table} == {True}
    said = capsys.readouterr().out
    assert re.search(r"dpo +all +4/7/1 +0\.625 \[", said)
    assert re.search(r"dpo +ben +0/6/0 +0\.500 \[", said)
    file = tmp_path / "votes.json"
    main(["votes", str(votes), "--json", str(file)])
    found = json.loads(file.read_text())
    assert found["win_rates"][0]["wins"] == 4
    assert [each["judged"] for each in found["progress"]] == [5, 5]
    # other images are another comparison
    paint(tmp_path / "other", {"a": [16, 25], "b": [35, 45], "c": [50, 55]})
    message = fails(capsys, *command[:2], f"dpo={tmp_path / 'other'}", *command[3:])
    assert "has the votes of another comparison: 5 comparisons now and 5 then, 4 of them the same" in message


def test_options_that_do_not_go_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = str(paint(tmp_path / "base", {"a": [10, 20]}))
    out = ["--out", str(tmp_path / "pairs.parquet")]
    for command, said in (
        (["label", base, *out], "give folders of images and --scorer NAME, or judge with --by-eye"),
        (["label", base, *out, "--port", "8000"], "--port needs --by-eye"),
        (["label", base, *out, "--by-eye", "--scorer", "world"], "--scorer does not go with --by-eye"),
        (["label", base, *out, "--by-eye", "--tie", "0"], "--tie does not go with --by-eye"),
        (["label", *out, "--by-eye"], "give folders of images, or --pairs"),
        (["label", base, "--by-eye", "--out", str(tmp_path / "base")], "is not an empty folder"),
        (["label", base, *out, "--by-eye", "--keep-unjudged"], "--keep-unjudged belongs to --pairs"),
        (["label", base, "--by-eye", "--out", "pairs.csv"], "to a .parquet file, to a .jsonl file"),
        (["label", base, *out, "--by-eye", "--annotator", "../x"], "1 to 40 letters, digits"),
        (["label", base, *out, "--by-eye", "--annotator", "majority"], "means the votes of several people"),
        (["label", base, *out, "--by-eye", "--labels-of", "eve"], "annotator 'eve' has no votes"),
        (["compare", base, f"a={base}"], "give --scorer NAME, or vote with --blind"),
        (["compare", base, f"a={base}", "--limit", "2"], "--limit needs --blind"),
        (["compare", base, f"a={base}", "--pairs-out", "x.jsonl"], "--pairs-out needs --blind"),
        (["compare", base, f"a={base}", "--blind"], "--blind needs --out FOLDER"),
        (["compare", base, f"a={base}", "--blind", "--out", str(tmp_path / "v")], "equals the base's"),
        (["compare", base, f"a={base}", f"a={base}", "--blind", "--out", str(tmp_path / "v")], "a name of its own"),
        (["votes", base], "plan.json does not exist"),
        (["label", base, *out, "--by-eye", "--votes", base], "has other files (0_0.png), and no votes"),
    ):
        assert said in fails(capsys, *command)
    assert not (tmp_path / "pairs.parquet").exists()
