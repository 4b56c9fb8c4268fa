"""The report of `diffalign data check`."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffalign.cli.main import main
from diffalign.data.row import DataError
from diffalign.data.spec import DataSpec
from diffalign.data.table.report import check_pairs
from tests.data.helpers import pick_rows, png, write_jsonl, write_parquet
from tests.data.test_transforms import bomb


@pytest.fixture
def faulty(tmp_path: Path) -> Path:
    rows = pick_rows(20)
    rows[0]["jpg_1"] = None
    for i in range(1, 8):
        rows[i] |= {"label_0": 0.5, "label_1": 0.5}
    rows[8]["caption"] = ""
    rows[9]["label_0"] = 2.0
    rows[10]["jpg_0"] = b"no"
    rows[11]["jpg_0"] = png(1, (1, 1))
    rows[12]["jpg_0"] = png(1, (100, 50))
    rows[13] = rows[14]
    return write_parquet(tmp_path / "pairs.parquet", rows)


def test_text_and_json(faulty: Path) -> None:
    report = check_pairs(faulty, resolution=50)
    text = report.text()
    for line in (
        "pickapic columns in 1 parquet file",
        "rows          20",
        "usable pairs  8",
        "  7 x tie",
        "      … and 2 more",
        "      pairs.parquet row 1: label_0 = label_1 = 0.5",
        "  1 x missing side",
        "      pairs.parquet row 0: jpg_1 is empty; fill it or remove the row",
        "  1 x empty prompt",
        "  1 x bad label",
        "  1 x corrupt image",
        "  1 x tiny image",
        "  1 x duplicate id (kept)",
        "image sizes   24x16 smallest, 24x16 median, 100x50 largest",
        "15 of 16 images are smaller than 50 px",
        "prompts       8 to 8 characters, median 8",
        "3 different; most repeated, 3 times: prompt 0",
    ):
        assert line in text, f"{line!r} not in\n{text}"
    content = json.loads(json.dumps(report.json()))
    assert content["usable_pairs"] == 8
    assert len(content["problems"]["tie"]) == 7
    assert content["problems"]["bad label"][0]["row"] == "pairs.parquet row 9"
    assert content["images_smaller_than_resolution"] == 15


def test_every_row_is_accounted_for(faulty: Path) -> None:
    report = check_pairs(faulty)
    assert report.usable + sum(problem.dropped for problem in report.problems) == report.table.total_rows


def test_kept_ties_and_partial_reading_are_said(faulty: Path) -> None:
    assert "usable pairs  15 (of them 7 ties)" in check_pairs(faulty, DataSpec(keep_ties=True)).text()
    assert "rows          20 (14 examined)" in check_pairs(faulty, DataSpec(max_pairs=2)).text()


def test_contact_sheet_shows_the_chosen_image_on_the_left(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "pairs.jsonl", 3)
    Image.new("RGB", (32, 32), (255, 0, 0)).save(tmp_path / "images" / "0c.png")
    Image.new("RGB", (32, 32), (0, 0, 255)).save(tmp_path / "images" / "0r.png")
    sheet = check_pairs(file).contact_sheet(tmp_path / "out" / "sheet.png", pairs=2)
    pixels = np.array(Image.open(sheet))
    assert pixels.shape == (20 + 2 * (256 + 48), 2 * 256, 3)
    assert pixels[148, 128].tolist() == [255, 0, 0]
    assert pixels[148, 384].tolist() == [0, 0, 255]
    assert (pixels[276:324] < 128).any()  # the prompt is written
    assert all((pixels[:20, left : left + 256] < 128).any() for left in (0, 256))  # each column has its name


def test_contact_sheet_of_unreadable_pairs_says_so(tmp_path: Path) -> None:
    rows = pick_rows(1)
    rows[0]["jpg_0"] = b"no"
    report = check_pairs(write_parquet(tmp_path / "pairs.parquet", rows), DataSpec(verify="none"))
    assert report.size_range is None
    report.contact_sheet(tmp_path / "sheet.png")
    assert (tmp_path / "sheet.png").is_file()


def test_nothing_usable_still_reports(tmp_path: Path) -> None:
    rows = pick_rows(2)
    for row in rows:
        row["caption"] = ""
    report = check_pairs(write_parquet(tmp_path / "pairs.parquet", rows))
    assert "usable pairs  0" in report.text()
    assert report.json()["sizes"] is None
    report.contact_sheet(tmp_path / "sheet.png")


def test_full_verification_decodes(tmp_path: Path) -> None:
    rows = pick_rows(3)
    rows[1]["jpg_0"] = png(5, (64, 64))[:6000]
    file = write_parquet(tmp_path / "pairs.parquet", rows)
    assert check_pairs(file).usable == 3
    assert check_pairs(file, DataSpec(verify="full")).usable == 2
    with pytest.raises(DataError, match="verify='fast'; allowed are 'none', 'header' and 'full'"):
        check_pairs(file, DataSpec(verify="fast"))  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_long_images_huge_ones_and_the_columns_are_said(tmp_path: Path) -> None:
    rows = pick_rows(3)
    rows[0]["jpg_0"] = png(1, (100, 10))
    rows[1]["jpg_1"] = bomb(12000)
    rows[2]["caption"] = "red\x1b[2J fox"
    report = check_pairs(write_parquet(tmp_path / "pairs.parquet", rows), DataSpec(verify="full"))
    text = report.text()
    for line in (
        "columns       prompt: caption; images: jpg_0, jpg_1; label: label_0",
        "  1 x huge image",
        "row 1: jpg_1: 12000x12000 is 144000000 pixels",
        "1 of 2 pairs have an image over 4 times as long as wide, cropped to a square without aspect buckets: pairs",
        "red\\x1b[2J fox",
    ):
        assert line in text, f"{line!r} not in\n{text}"
    assert "\x1b" not in text
    assert report.json()["extreme_aspect_ratios"] == [{"row": "pairs.parquet row 0", "size": "100x10"}]


def test_a_terminal_that_is_not_utf8_gets_the_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = pick_rows(8)
    for row in rows:
        row["caption"] = "un café, à la carte \u2014 " + "x" * 80  # the report shortens it with an ellipsis
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", terminal)
    main(["data", "check", str(write_parquet(tmp_path / "pairs.parquet", rows))])
    terminal.flush()
    text = terminal.buffer.getvalue().decode("ascii")  # type: ignore[attr-defined]
    assert "usable pairs  8" in text
    assert r"un caf\xe9, \xe0 la carte \u2014" in text
