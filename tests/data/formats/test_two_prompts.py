"""Rows with two prompts are two ordinary pairs, in every storage."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from diffalign.data.row import DataError
from diffalign.data.spec import DataSpec
from diffalign.data.table.open import open_pairs
from diffalign.data.table.report import check_pairs
from tests.data.helpers import png, write_parquet

N = 4


def parquet(folder: Path) -> Path:
    rows = [
        {"prompt_0": f"a {i}", "prompt_1": f"b {i}", "jpg_0": png(2 * i), "jpg_1": png(2 * i + 1), "row": i}
        for i in range(N)
    ]
    return write_parquet(folder / "pairs.parquet", rows)


def listing(folder: Path) -> Path:
    (folder / "images").mkdir()
    lines = []
    for i in range(N):
        for side in range(2):
            (folder / "images" / f"{i}-{side}.png").write_bytes(png(2 * i + side))
        images = {f"image_{side}": f"images/{i}-{side}.png" for side in range(2)}
        lines.append(
            json.dumps({"prompt_0": f"a {i}", "prompt_1": f"b {i}", **images, "uid_0": f"l{i}", "uid_1": f"r{i}"})
        )
    (folder / "pairs.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "pairs.jsonl"


def saved(folder: Path) -> Path:
    """As `datasets` saves what a Hub data set is."""
    from datasets import load_dataset

    load_dataset("parquet", data_files=str(parquet(folder)), split="train").save_to_disk(folder / "saved")
    return folder / "saved"


@pytest.mark.parametrize("write", [parquet, listing, saved])
@pytest.mark.parametrize("verify", ["none", "header"])
def test_each_image_is_chosen_for_its_own_prompt(write, verify, tmp_path: Path) -> None:
    table = open_pairs(write(tmp_path), DataSpec(verify=verify))
    assert table.format == "two_prompts"
    assert len(table) == 2 * N
    assert len(set(table.ids)) == 2 * N
    for i in range(N):
        for side in range(2):
            row = table[2 * i + side]
            assert row.prompt == f"{'ab'[side]} {i}"
            assert row.chosen.read() == png(2 * i + side)
            assert row.rejected.read() == png(2 * i + 1 - side)
            assert f"(prompt_{side})" in row.where
    assert not table.problems


def test_ids_come_from_the_images_uids(tmp_path: Path) -> None:
    table = open_pairs(listing(tmp_path))
    assert table.ids[:4] == ["l0:r0", "r0:l0", "l1:r1", "r1:l1"]


def test_inverted_both_ways(tmp_path: Path) -> None:
    table = open_pairs(parquet(tmp_path), DataSpec(invert_preference=True))
    assert table[0].chosen.read() == png(1)
    assert table[1].chosen.read() == png(0)


def test_the_report_counts_pairs_and_names_faults_by_prompt(tmp_path: Path) -> None:
    file = listing(tmp_path)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows[1]["prompt_1"] = rows[1]["prompt_0"]  # both images would be preferred over the other
    rows[2]["prompt_1"] = " "
    rows[3]["image_0"] = "images/gone.png"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = check_pairs(file)
    assert report.usable == 3
    assert {kind: [p.where for p in found] for kind, found in report.by_kind.items()} == {
        "bad row": ["pairs.jsonl line 2 (prompt_0)", "pairs.jsonl line 2 (prompt_1)"],
        "empty prompt": ["pairs.jsonl line 3 (prompt_1)"],
        "missing side": ["pairs.jsonl line 4 (prompt_0)", "pairs.jsonl line 4 (prompt_1)"],
    }
    text = report.text()
    assert "two_prompts columns in pairs.jsonl, two pairs per row" in text
    assert "rows          8 = 2 for each of 4" in text


def test_columns_of_other_names_and_missing_ones(tmp_path: Path) -> None:
    rows = [{"c0": "a", "c1": "b", "jpg_0": png(0), "jpg_1": png(1)}]
    file = write_parquet(tmp_path / "pairs.parquet", rows)
    table = open_pairs(file, DataSpec(format="two_prompts", columns={"prompt_0": "c0", "prompt_1": "c1"}))
    assert table.prompts == ["a", "b"]
    with pytest.raises(DataError, match=r"two_prompts needs prompt_0 \(one of prompt_0, caption_0\)"):
        open_pairs(file, DataSpec(format="two_prompts"))
    labelled = [{**rows[0], "caption": "c", "label_0": 1.0, "label_1": 0.0, "prompt_0": "a", "prompt_1": "b"}]
    both = write_parquet(tmp_path / "more.parquet", labelled)
    assert open_pairs(both, DataSpec(format="pickapic")).format == "pickapic"
    with pytest.raises(
        DataError, match=r"(?s)columns of several formats.*two_prompts: prompt_0.*data.format: pickapic"
    ):
        open_pairs(both)


def test_weight_margin_and_mask_are_of_both_pairs(tmp_path: Path) -> None:
    rows = [
        {"prompt_0": "a", "prompt_1": "b", "jpg_0": png(0), "jpg_1": png(1)}
        | {"weight": 0.5, "margin": 2.0, "mask": "[[0, 1]]"},
        {"prompt_0": "c", "prompt_1": "d", "jpg_0": png(2), "jpg_1": png(3)}
        | {"weight": 3.0, "margin": 1.0, "mask": None},
    ]
    table = open_pairs(write_parquet(tmp_path / "pairs.parquet", rows))
    assert table.terms == ("weight", "margin", "mask")
    assert [table.number("weight", i) for i in range(4)] == [0.5, 0.5, 3.0, 3.0]
    assert [table.number("margin", i) for i in range(4)] == [2.0, 2.0, 1.0, 1.0]
    assert table.mask(1).tolist() == [[0.0, 1.0]]
    assert table.mask(2).tolist() == [[1.0]]
    table.leave_out("axes disagree", {0: "so"})
    assert [table.number("weight", i) for i in range(3)] == [0.5, 3.0, 3.0]
