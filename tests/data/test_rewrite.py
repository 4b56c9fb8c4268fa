"""`diffalign data convert`, `split`, `dedupe`: what is written is what was read, and every pair that goes is said."""

from __future__ import annotations

import io
import json
import tarfile
from itertools import islice
from pathlib import Path

import pytest
import torch

from diffalign.cli.main import main
from diffalign.data.loader.offline_pairs import OfflinePairs
from diffalign.data.loader.online import Online
from diffalign.data.loader.spec import LoaderSpec
from diffalign.data.rewrite.duplicates import find_duplicates
from diffalign.data.spec import DataSpec
from diffalign.data.table.open import open_pairs
from diffalign.data.table.pairs import PairTable
from tests.data.helpers import FakeEncoder, pick_rows, picture, png, write_parquet
from tests.data.loader.test_offline_pairs import assert_same, joined

Said = pytest.CaptureFixture[str]


def batches(table: PairTable) -> list[object]:
    spec = LoaderSpec(3, 2, prompt_dropout=0.2)
    source = OfflinePairs(table, Online(FakeEncoder(), 16, center_crop=False, random_flip=True), spec)
    return list(islice(source.batches(), 9))


def refused(arguments: list[str], capsys: Said) -> str:
    with pytest.raises(SystemExit):
        main(["data", *arguments])
    return capsys.readouterr().err


def test_other_layouts_give_the_same_batches_to_the_bit(tmp_path: Path, capsys: Said) -> None:
    """Pick-a-Pic's parquet, jsonl with images beside it, and parquet again; a folder has the images and prompts."""
    rows = pick_rows(9)
    rows[4]["label_0"] = rows[4]["label_1"] = 0.5
    for i, row in enumerate(rows):
        row |= {"weight": 0.5 + i, "mask": [[0.0, i / 10]]}
    file = write_parquet(tmp_path / "pairs.parquet", rows)
    main(["data", "convert", str(file), "--out", str(tmp_path / "b.jsonl")])
    assert "b.jsonl: 9 pairs (of them 1 ties)" in capsys.readouterr().out
    main(["data", "convert", str(tmp_path / "b.jsonl"), "--out", str(tmp_path / "c.parquet")])
    expected = batches(open_pairs(file))
    for name in ("b.jsonl", "c.parquet"):
        table = open_pairs(tmp_path / name)
        assert table.ids == open_pairs(file).ids
        assert open_pairs(tmp_path / name, DataSpec(keep_ties=True)).ties == 1
        assert_same(joined(batches(table)), joined(expected))  # type: ignore[arg-type]
    main(["data", "convert", str(file), "--out", str(tmp_path / "folder")])
    assert "1 rows" in capsys.readouterr().out
    one, other = open_pairs(file), open_pairs(tmp_path / "folder")
    assert one.prompts == other.prompts
    for index in range(8):
        assert one[index].chosen.read() == other[index].chosen.read()
        assert one.numbers(index) == other.numbers(index)
        assert torch.equal(one.mask(index), other.mask(index))  # type: ignore[arg-type]


def test_a_split_shares_no_prompt_and_loses_no_pair(tmp_path: Path, capsys: Said) -> None:
    file = write_parquet(tmp_path / "pairs.parquet", pick_rows(20, prompts=10))
    outs = tmp_path / "train.parquet", tmp_path / "heldout.jsonl"
    main(["data", "split", str(file), "--share", "0.3", "--out", str(outs[0]), "--heldout-out", str(outs[1])])
    train, heldout = map(open_pairs, outs)
    assert (len(train), len(heldout)) == (14, 6)
    assert not set(train.prompts) & set(heldout.prompts)
    assert sorted(train.ids + heldout.ids) == sorted(open_pairs(file).ids)
    again = ["split", str(file), "--share", "0.3", "--out", str(outs[0]), "--heldout-out", str(outs[1])]
    assert "already" in refused(again, capsys) or "not an empty" in refused(again, capsys)
    few = ["split", str(file), "--share", "0.05", "--out", str(tmp_path / "a.jsonl"), "--heldout-out"]
    assert "--share: a share of 0.05" in refused([*few, str(tmp_path / "b.jsonl")], capsys)
    assert "name two places" in refused([*few, str(tmp_path / "a.jsonl")], capsys)


def test_images_of_the_source_stay(tmp_path: Path, capsys: Said) -> None:
    """A listing's folder of images, its own source, and the other part of a split are not replaced."""
    file = write_parquet(tmp_path / "a.parquet", pick_rows(6, prompts=6))
    main(["data", "convert", str(file), "--out", str(tmp_path / "pairs.jsonl")])
    listing = tmp_path / "copy.jsonl"
    listing.write_text((tmp_path / "pairs.jsonl").read_text())  # names files in pairs_images/
    overwrite = ["--out", str(tmp_path / "pairs.jsonl"), "--overwrite"]
    assert "has images of" in refused(["dedupe", str(listing), *overwrite], capsys)
    main(["data", "convert", str(file), "--out", str(tmp_path / "b_images")])
    assert "in the way of" in refused(
        ["convert", str(tmp_path / "b_images"), "--out", str(tmp_path / "b.jsonl")], capsys
    )
    for one, two in (("o.jsonl", "o_images"), ("q/train", "q")):
        parts = ["--out", str(tmp_path / one), "--heldout-out", str(tmp_path / two)]
        assert "in each other's way" in refused(["split", str(file), *parts, "--share", "0.4"], capsys)
    assert len(open_pairs(tmp_path / "pairs.jsonl")) == len(open_pairs(tmp_path / "b_images")) == 6


def test_lost_columns_are_named_and_odd_formats_keep_their_ending(tmp_path: Path, capsys: Said) -> None:
    rows = [{"prompt": f"p{i}", "uid": f"id{i}", "model": "m"} for i in range(2)]
    for i, row in enumerate(rows):
        for side in ("chosen", "rejected"):
            row[side] = f"{i}_{side}.tiff"
            picture(10 * i + len(side)).save(tmp_path / row[side])
    (tmp_path / "pairs.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    with tarfile.open(tmp_path / "pairs.tar", "w") as file:
        for i, row in enumerate(rows):
            for part, name in (("txt", None), ("chosen.tiff", row["chosen"]), ("rejected.tiff", row["rejected"])):
                data = row["prompt"].encode() if name is None else (tmp_path / name).read_bytes()
                info = tarfile.TarInfo(f"{i:03d}.{part}")
                info.size = len(data)
                file.addfile(info, io.BytesIO(data))
    main(["data", "convert", str(tmp_path / "pairs.jsonl"), "--out", str(tmp_path / "out.parquet")])
    assert "left out: the columns uid, model" in capsys.readouterr().out
    main(["data", "convert", str(tmp_path / "pairs.tar"), "--out", str(tmp_path / "folder")])
    assert sorted(p.suffix for p in (tmp_path / "folder/chosen").iterdir()) == [".tif", ".tif"]
    assert len(open_pairs(tmp_path / "folder")) == 2


def test_ties_and_users_have_labels_of_their_own(tmp_path: Path) -> None:
    rows = pick_rows(1) * 5
    rows = [{**row, "user": "b" if i == 4 else "a"} for i, row in enumerate(rows)]
    for i, (one, two) in enumerate(((0.5, 0.5), (1.0, 0.0), (0.5, 0.5), (1.0, 0.0), (0.0, 1.0))):
        rows[i] |= {"label_0": one, "label_1": two}
    table = open_pairs(write_parquet(tmp_path / "pairs.parquet", rows), DataSpec(keep_ties=True))
    found = find_duplicates(table)
    assert found.repeated == [2, 3]
    assert found.contradictory == [0, 1, 2, 3]  # a tie and a preference of one user; the other user has one label


def test_lists_become_pairs_only_when_asked(tmp_path: Path, capsys: Said) -> None:
    row = {"prompt": "p", "images": [png(k) for k in range(3)], "ranking": [2, 3, 1]}
    file, out = write_parquet(tmp_path / "lists.parquet", [row]), tmp_path / "out.parquet"
    to, marks = [str(file), "--out", str(out)], tmp_path / "decisions.csv"
    marks.write_text("id,decision\nnone,swap\n")
    for arguments, instead in (
        (["relabel", *to, "--decisions", str(marks)], "--pairs-of-ranking all"),
        (["convert", *to], "--pairs-of-ranking"),
        (["split", *to, "--heldout-out", str(tmp_path / "held.parquet")], "validation.pairs: 0.1"),
        (["dedupe", *to], "from the file itself"),
        (["lists", *to], "listwise_dpo"),
    ):
        said = " ".join(refused(arguments, capsys).split())
        assert "lists.parquet has ranked lists" in said
        assert instead in said
    assert not out.exists()
    main(["data", "convert", *to, "--pairs-of-ranking", "best_worst"])
    table = open_pairs(out)
    assert [(table[0].chosen.read(), table[0].rejected.read())] == [(png(2), png(1))]


def test_doubles_go_and_contradictions_are_asked_about(tmp_path: Path, capsys: Said) -> None:
    rows = pick_rows(8)
    rows[5] |= {name: rows[2][name] for name in rows[2]}  # the same pair again
    rows[6] |= {"caption": rows[1]["caption"]} | {f"jpg_{i}": rows[1][f"jpg_{1 - i}"] for i in range(2)}
    rows[6] |= {"label_0": rows[1]["label_0"], "label_1": rows[1]["label_1"]}  # and so the label contradicts
    for row in rows:
        row.pop("image_0_uid", None), row.pop("image_1_uid", None)
    file = write_parquet(tmp_path / "pairs.parquet", rows)
    table = open_pairs(file)
    found = find_duplicates(table)
    assert (found.repeated, found.contradictory, found.shared) == ([5], [1, 6], [])
    out = tmp_path / "out.parquet"
    assert "2 pairs of" in refused(["dedupe", str(file), "--out", str(out)], capsys)
    main(["data", "dedupe", str(file), "--out", str(out), "--contradictions", "keep"])
    assert len(open_pairs(out)) == 7
    test = pick_rows(1)
    test[0] |= {"jpg_0": rows[3]["jpg_1"], "jpg_1": png(99)}
    write_parquet(tmp_path / "test.parquet", test)
    options = ["--contradictions", "drop", "--against", str(tmp_path / "test.parquet"), "--overwrite"]
    main(["data", "dedupe", str(file), "--out", str(out), *options])
    said = capsys.readouterr().out
    assert "dropped: 1 repeated, 2 with both labels, 1 with an image of" in said
    assert [row.prompt for row in map(open_pairs(out).__getitem__, range(4))] == [
        rows[i]["caption"] for i in (0, 2, 4, 7)
    ]
    assert "in the way of the pairs" in refused(["dedupe", str(file), "--out", str(file), "--overwrite"], capsys)
