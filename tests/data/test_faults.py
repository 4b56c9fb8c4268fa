"""A faulty row is reported by name with the reason; the others stay usable, and both columns stay aligned."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from diffalign.data.formats.pickapic import judge
from diffalign.data.row import Problem
from diffalign.data.spec import DataSpec
from diffalign.data.table.open import open_pairs
from tests.data.helpers import pick_rows, picture, png, write_jsonl, write_parquet


def truncated() -> bytes:
    """An image whose header is fine and whose data end early."""
    whole = png(5, (64, 64))
    return whole[: len(whole) // 2]


FAULTS: dict[str, tuple[dict[str, Any], str, str]] = {
    "corrupt": ({"jpg_0": b"not an image"}, "corrupt image", "row 1 jpg_0: does not open as an image"),
    "missing": ({"jpg_1": None}, "missing side", "row 1 jpg_1 is empty"),
    "empty": ({"jpg_0": b""}, "missing side", "row 1 jpg_0 is empty"),
    "tie": ({"label_0": 0.5, "label_1": 0.5}, "tie", "label_0 = label_1 = 0.5"),
    "no prompt": ({"caption": ""}, "empty prompt", "caption is empty"),
    "blank prompt": ({"caption": " \n"}, "empty prompt", "caption is empty"),
    "null prompt": ({"caption": None}, "empty prompt", "caption is empty"),
    "label of 2": ({"label_0": 2.0}, "bad label", "label_0 = 2.0, label_1 = 0.0; allowed are"),
    "sum is one": ({"label_0": 2.0, "label_1": -1.0}, "bad label", "label_0 = 2.0, label_1 = -1.0"),
    "both": ({"label_0": 1.0, "label_1": 1.0}, "bad label", "label_0 = 1.0, label_1 = 1.0"),
    "soft": ({"label_0": 0.7, "label_1": 0.3}, "bad label", "label_0 = 0.7"),
    "nan": ({"label_0": math.nan, "label_1": math.nan}, "bad label", "label_0 = nan"),
    "null label": ({"label_1": None}, "bad label", "label_1 = nan"),
    "unlabelled": ({"has_label": False}, "no label", "has_label is false"),
    "one pixel": ({"jpg_1": png(3, (1, 1))}, "tiny image", "row 1 jpg_1: 1x1 pixels; each side needs at least 8"),
    "thin": ({"jpg_1": png(3, (64, 7))}, "tiny image", "64x7 pixels"),
    "same image": ({"jpg_0": png(2), "jpg_1": png(2)}, "identical images", "both sides are the same image"),
    "same uid": ({"image_1_uid": "a1"}, "identical images", "both sides are image a1"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_named_by_row_and_the_rest_is_used(tmp_path: Path, fault: str) -> None:
    change, kind, reason = FAULTS[fault]
    rows = pick_rows(4)
    rows[1] |= change
    table = open_pairs(write_parquet(tmp_path / "pairs.parquet", rows))
    assert [(p.where, p.kind, p.dropped) for p in table.problems] == [("pairs.parquet row 1", kind, True)]
    assert reason in table.problems[0].reason
    assert table.ids == ["a0:b0", "a2:b2", "a3:b3"]
    assert table[1].chosen.open().tobytes() == picture(5).tobytes()  # row 2, label_1 = 1
    assert table[1].rejected.open().tobytes() == picture(4).tobytes()


def test_truncated_data_are_found_by_full_verification_only(tmp_path: Path) -> None:
    rows = pick_rows(2)
    rows[1]["jpg_0"] = truncated()
    file = write_parquet(tmp_path / "pairs.parquet", rows)
    assert len(open_pairs(file, DataSpec(verify="header"))) == 2
    table = open_pairs(file, DataSpec(verify="full"))
    assert [p.kind for p in table.problems] == ["corrupt image"]
    assert "jpg_0" in table.problems[0].reason


def test_kept_ties_say_so(tmp_path: Path) -> None:
    rows = pick_rows(3)
    rows[1] |= {"label_0": 0.5, "label_1": 0.5}
    table = open_pairs(write_parquet(tmp_path / "pairs.parquet", rows), DataSpec(keep_ties=True))
    assert [table[i].tie for i in range(3)] == [False, True, False]
    assert [table[i].scores for i in range(3)] == [(1.0, 0.0), (0.5, 0.5), (1.0, 0.0)]
    assert (table.ties, table.problems) == (1, [])


def test_scores_follow_their_images(tmp_path: Path) -> None:
    rows = [row | {"score_0": 10.0 + i, "score_1": 20.0 + i} for i, row in enumerate(pick_rows(2))]
    rows[1]["score_1"] = None
    table = open_pairs(write_parquet(tmp_path / "pairs.parquet", rows))
    assert table[0].scores == (20.0, 10.0)  # label_1 = 1: image 1 is chosen
    chosen, rejected = table[1].scores or (0, 0)
    assert chosen == 11.0
    assert math.isnan(rejected)


def fault_in_listing(tmp_path: Path, change: dict[str, Any]) -> list[Problem]:
    file = write_jsonl(tmp_path / "data" / "pairs.jsonl", 3)
    lines = file.read_text().splitlines()
    lines[1] = json.dumps(json.loads(lines[1]) | change)
    file.write_text("\n".join(lines))
    table = open_pairs(file)
    assert len(table) == 2
    return table.problems


@pytest.mark.parametrize("path", ["../secret.png", "images/../../secret.png", "/etc/passwd"])
def test_paths_stay_in_the_data_folder(tmp_path: Path, path: str) -> None:
    (tmp_path / "secret.png").write_bytes(png(9))
    (problem,) = fault_in_listing(tmp_path, {"rejected": path})
    assert (problem.where, problem.kind) == ("pairs.jsonl line 2", "path outside the data folder")
    assert repr(path) in problem.reason


def test_a_linked_image_folder_is_inside(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "elsewhere" / "pairs.jsonl", 2)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "images").symlink_to(tmp_path / "elsewhere" / "images")
    (tmp_path / "data" / "pairs.jsonl").write_text(file.read_text())
    assert len(open_pairs(tmp_path / "data" / "pairs.jsonl")) == 2


@pytest.mark.parametrize("verify", ["none", "header"])
def test_a_missing_file_is_named(tmp_path: Path, verify: str) -> None:
    file = write_jsonl(tmp_path / "pairs.jsonl", 3)
    (tmp_path / "images" / "1r.png").unlink()
    (problem,) = open_pairs(file, DataSpec(verify=verify)).problems  # type: ignore[arg-type]
    assert (problem.where, problem.kind) == ("pairs.jsonl line 2", "missing side")
    assert "1r.png (No such file or directory)" in problem.reason


def test_a_line_that_does_not_parse_is_a_bad_row(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "pairs.jsonl", 2)
    file.write_text(file.read_text() + "{broken\n[1]\n")
    problems = open_pairs(file).problems
    assert [(p.where, p.kind) for p in problems] == [
        ("pairs.jsonl line 3", "bad row"),
        ("pairs.jsonl line 4", "bad row"),
    ]
    assert "not JSON" in problems[0].reason
    assert "a JSON list" in problems[1].reason


def test_hpdv2_entries_with_faults(tmp_path: Path) -> None:
    for i in range(2):
        (tmp_path / f"{i}.png").write_bytes(png(i))
    good = {"prompt": "p", "image_path": ["0.png", "1.png"], "human_preference": [1, 0]}
    tie = good | {"human_preference": [1, 1]}
    short = good | {"human_preference": [1]}
    (tmp_path / "x.json").write_text(json.dumps([good, tie, short, {"image_path": []}]))
    table = open_pairs(tmp_path / "x.json")
    assert len(table) == 1
    assert [p.kind for p in table.problems] == ["tie", "bad row", "bad row"]


def test_a_bomb_is_a_huge_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    stream = io.BytesIO()
    Image.new("RGB", (64, 64)).save(stream, "PNG")
    rows = pick_rows(1)
    rows[0]["jpg_0"] = stream.getvalue()
    (problem,) = open_pairs(write_parquet(tmp_path / "pairs.parquet", rows)).problems
    assert problem.kind == "huge image"
    assert "pixels" in problem.reason


def test_labels_by_the_rule() -> None:
    assert judge(1.0, 0.0) == 0
    assert judge("0", "1") == 1
    assert judge(1, None) == 0
    assert judge(0, None) == 1
    for has_label in (False, 0, "False", None, math.nan):
        assert judge(1, 0, has_label)[0] == "no label"  # type: ignore[index]
    for labels in ((None, None), ("x", "y"), (1, math.nan)):
        assert judge(*labels)[0] == "bad label"  # type: ignore[index]


def test_an_image_that_another_program_would_draw_is_not_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from PIL import EpsImagePlugin

    from diffalign.data.row import ImageError, ImageRef

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: pytest.fail("Ghostscript was called"))
    (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\nshowpage\n")
    for look in (ImageRef.open, ImageRef.size):
        with pytest.raises(ImageError, match=r"a\.png: EPS is drawn by another program; save it as PNG or JPEG"):
            look(ImageRef(None, str(tmp_path / "a.png"), "a.png"))
