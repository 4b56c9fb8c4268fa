"""One invalid cell drops its row, with a reason that names row, value and remedy, in every layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from diffalign.data.formats.arrow import object_columns
from diffalign.data.formats.pickapic import judge
from diffalign.data.table.open import open_pairs
from diffalign.data.table.winners import open_winners
from tests.data.helpers import png

DEEP: Any = "x"
for _ in range(200):
    DEEP = [DEEP]

IMAGES: dict[str, tuple[Any, str, str]] = {
    "null": (None, "missing side", "is empty; fill it"),
    "nan": (float("nan"), "missing side", "is empty; fill it"),
    "no bytes, no path": ({"bytes": None, "path": None}, "missing side", "is empty; fill it"),
    "number": (5, "not an image", "is 5, a int; each side is one image: its bytes, or the path of its file"),
    "true": (True, "not an image", "is True, a bool; each side is one image"),
    "list": (["1a.png", "1b.png"], "not an image", "is ['1a.png', '1b.png'], a list; each side is one image"),
    "messages": ([{"role": "assistant", "content": "hi"}], "not an image", "a list; each side is one image"),
    "deep": (DEEP, "not an image", "a list; each side is one image"),
    "other object": ({"url": "x"}, "not an image", "has the fields ['url']; required: bytes or path"),
    "number as path": ({"path": 3}, "not an image", "is 3, a int"),
    "nul": ("images/\0.png", "not an image", "contains a NUL character: 'images/\\x00.png'; write the path"),
    "surrogate": ("\ud800.png", "not an image", "contains half a character (U+D800"),
    "address": ("https://x.org/1.png", "not an image", "https://x.org/1.png'; images are not downloaded: save it"),
    "data address": ("data:image/png;base64,aaaa", "not an image", "images are not downloaded"),
    "drive": ("C:\\pics\\1.png", "not an image", "Windows path 'C:\\\\pics\\\\1.png'; write it relative"),
    "long": ("a" * 5000, "missing side", "File name too long"),
    "leaves by backslash": ("..\\0.png", "path outside the data folder", "is '../0.png', which leaves"),
    "folder": ("images", "missing side", "images is not a file"),
}
PROMPTS: dict[str, tuple[Any, str, str]] = {
    "null": (None, "empty prompt", "is empty; write one"),
    "nan": (float("nan"), "empty prompt", "is empty; write one"),
    "number": (7, "bad prompt", "is 7, a int; write a string"),
    "object": ({"text": "a"}, "bad prompt", "is {'text': 'a'}, a dict; write a string"),
    "deep": (DEEP, "bad prompt", "is a list"),
    "nul": ("a\0b", "bad prompt", "contains a NUL character: 'a\\x00b'; write a string"),
    "surrogate": ("a\udc80", "bad prompt", "is not UTF-8 (byte 0x80)"),
    "two messages": (
        [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}],
        "bad prompt",
        "one user message",
    ),
    "an answer": ([{"role": "assistant", "content": "s"}], "bad prompt", "one user message"),
    "a picture in it": ([{"role": "user", "content": [{"type": "image"}]}], "bad prompt", "one user message"),
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "preference": {"prompt": "p", "chosen": "images/0.png", "rejected": "images/1.png"},
    "pickapic": {"caption": "p", "jpg_0": "images/0.png", "jpg_1": "images/1.png", "label_0": 1, "has_label": True},
    "two_prompts": {"prompt_0": "p", "prompt_1": "q", "jpg_0": "images/0.png", "jpg_1": "images/1.png"},
}


def written(folder: Path, layout: str, column: str, cell: Any, suffix: str) -> Path:
    """Three rows, the second of which has the odd cell."""
    (folder / "images").mkdir()
    for i in range(2):
        (folder / "images" / f"{i}.png").write_bytes(png(i))
    rows = [dict(LAYOUTS[layout]) for _ in range(3)]
    rows[1][column] = cell
    file = folder / f"pairs{suffix}"
    file.write_text(json.dumps(rows) if suffix == ".json" else "".join(json.dumps(row) + "\n" for row in rows))
    return file


def check(file: Path, kind: str, reason: str, pairs: int, named: str) -> None:
    table = open_pairs(file)
    dropped = [problem for problem in table.problems if problem.dropped]
    assert {problem.kind for problem in dropped} == {kind}
    for problem in dropped:
        assert problem.where.startswith(named)
        assert reason in problem.reason
    assert len(table) == pairs - len(dropped)
    table.identity.encode()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("odd", IMAGES)
def test_odd_image_cells(tmp_path: Path, layout: str, odd: str) -> None:
    cell, kind, reason = IMAGES[odd]
    column = list(LAYOUTS[layout])[2]
    suffix, named = (".json", "pairs.json entry 1") if layout == "pickapic" else (".jsonl", "pairs.jsonl line 2")
    pairs = 6 if layout == "two_prompts" else 3
    check(written(tmp_path, layout, column, cell, suffix), kind, reason, pairs, named)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("odd", PROMPTS)
def test_odd_prompts(tmp_path: Path, layout: str, odd: str) -> None:
    cell, kind, reason = PROMPTS[odd]
    column = next(iter(LAYOUTS[layout]))
    pairs = 6 if layout == "two_prompts" else 3
    check(written(tmp_path, layout, column, cell, ".jsonl"), kind, reason, pairs, "pairs.jsonl line 2")


@pytest.mark.parametrize(
    ("column", "cell", "kind", "reason"),
    [
        ("label_0", 10**400, "bad label", "label_0 = 1000000"),
        ("label_0", [1], "bad label", "label_0 = [1]"),
        ("has_label", "maybe", "bad label", "has_label is 'maybe'; write true or false"),
        ("has_label", "no", "no label", "were not compared"),
        ("weight", 10**400, "bad weight, margin or mask", "write a finite number, 0 or more"),
        ("mask", ["11", "00"], "bad weight, margin or mask", "its rows are not lists"),
        ("mask", {"0": [1]}, "bad weight, margin or mask", "its rows are not lists"),
        ("mask", "[" * 5000, "bad weight, margin or mask", "nested too deeply"),
        ("mask", [[10**400]], "bad weight, margin or mask", "is not a grid of numbers"),
    ],
)
def test_odd_labels_and_terms(tmp_path: Path, column: str, cell: Any, kind: str, reason: str) -> None:
    check(written(tmp_path, "pickapic", column, cell, ".jsonl"), kind, reason, 3, "pairs.jsonl line 2")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("[" * 100_000, "nested too deeply"),
        ("1" * 5000, "integer string"),
        ("\x00", "contains a NUL character"),
        ('{"prompt": 1, "prompt": 2}', "the key 'prompt' occurs twice"),
    ],
)
def test_odd_lines(tmp_path: Path, line: str, reason: str) -> None:
    file = written(tmp_path, "preference", "prompt", "p", ".jsonl")
    file.write_text(file.read_text() + line + "\n")
    (problem,) = [problem for problem in open_pairs(file).problems if problem.dropped]
    assert (problem.where, problem.kind) == ("pairs.jsonl line 4", "bad row")
    assert reason in problem.reason


def test_odd_scores_and_uids(tmp_path: Path) -> None:
    file = written(tmp_path, "pickapic", "label_0", 1, ".jsonl")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    odd = [(10**400, "a"), (float("inf"), "\ud800"), ([1], float("nan"))]
    for row, (score, uid) in zip(rows, odd, strict=True):
        row |= {"score_0": score, "score_1": 1, "uid_0": uid, "uid_1": "b"}
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    table = open_pairs(file)
    assert len(table) == 2
    assert [str(table[i].scores) for i in range(2)] == ["(nan, 1.0)"] * 2
    assert table.ids[0] == "a:b"
    assert "nan" not in table.ids[1]  # an absent uid is no uid
    assert "pairs.jsonl line 2: bad row: its uid contains half a character (U+D800" in str(table.problems[0])


def test_text_that_is_not_utf8_in_parquet_is_one_bad_prompt(tmp_path: Path) -> None:
    raw = pa.array([b"good", b"caf\xe9", b"fine"], pa.binary())
    prompts = pa.StringArray.from_buffers(3, raw.buffers()[1], raw.buffers()[2])
    images = {
        side: pa.array([png(2 * i + place) for i in range(3)]) for place, side in enumerate(("chosen", "rejected"))
    }
    pq.write_table(pa.table({"prompt": prompts, **images}), tmp_path / "pairs.parquet")
    table = open_pairs(tmp_path / "pairs.parquet")
    assert table.prompts == ["good", "fine"]
    assert "pairs.parquet row 1: bad prompt: prompt is not UTF-8 (byte 0xe9)" in str(table.problems[0])
    lists = pa.ListArray.from_arrays(pa.array([0, 1, 2, 3], pa.int32()), prompts)
    pq.write_table(pa.table({"prompt": lists, **images}), tmp_path / "pairs.parquet")
    said = [problem.reason for problem in open_pairs(tmp_path / "pairs.parquet").problems]
    assert said[1] == "a string in it is not UTF-8; write UTF-8"
    assert "prompt is a list, ['good']" in said[0]


def test_lists_of_bytes_in_parquet_are_named(tmp_path: Path) -> None:
    rows = [{"prompt": "p", "chosen": [png(0), png(1)], "rejected": [png(2)]}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "pairs.parquet")
    (problem,) = open_pairs(tmp_path / "pairs.parquet").problems
    assert str(problem).startswith("pairs.parquet row 0: not an image: pairs.parquet row 0 chosen is [b")


def test_a_chat_message_of_the_user_is_the_prompt(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "a fox"}]
    assert open_pairs(written(tmp_path, "preference", "prompt", messages, ".jsonl")).prompts == ["p", "a fox", "p"]


def test_backslashes_are_read_where_only_that_is_there(tmp_path: Path) -> None:
    file = written(tmp_path, "preference", "chosen", "images\\0.png", ".jsonl")
    table = open_pairs(file)
    assert len(table) == 3
    assert table.ids[1] == table.ids[0] + "#2"  # the same pair as with /


def test_path_objects_are_paths(tmp_path: Path) -> None:
    for i in range(2):
        (tmp_path / f"{i}.png").write_bytes(png(i))
    rows = [{"prompt": "p", "chosen": tmp_path / "0.png", "rejected": tmp_path / "1.png"}]
    assert len(open_pairs(object_columns(rows))) == 1


def test_winners_have_the_same_reasons(tmp_path: Path) -> None:
    (tmp_path / "0.png").write_bytes(png(0))
    rows = [{"prompt": p, "image": i} for p, i in (("p", "0.png"), (["x"], "0.png"), ("p", ["0.png"]), (None, "0.png"))]
    (tmp_path / "w.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    table = open_winners(tmp_path / "w.jsonl")
    assert [p.kind for p in table.problems] == ["bad prompt", "not an image", "empty prompt"]


@pytest.mark.parametrize(
    ("change", "kind", "reason"),
    [
        ({"human_preference": [float("nan"), float("nan")]}, "bad label", "label_0 = nan"),
        ({"human_preference": [None, 1]}, "bad label", "label_0 = None"),
        ({"human_preference": [1, None]}, "bad label", "label_1 = nan"),
        ({"human_preference": 1}, "bad row", "required: prompt, image_path"),
        ({"image_path": [None, "1.png"]}, "missing side", "is empty"),
        ({"image_path": [["0.png"], "1.png"]}, "not an image", "a list"),
        ({"image_path": ["\0", "1.png"]}, "not an image", "NUL"),
        ({"image_path": "0.png"}, "bad row", "its image paths are '0.png'"),
        ({"image_path": None}, "bad row", "its image paths are None"),
        ({"prompt": 3}, "bad prompt", "is 3, a int"),
        (3, "bad row", "a JSON int; write an object"),
    ],
)
def test_hpdv2_with_an_odd_entry_first(tmp_path: Path, change: Any, kind: str, reason: str) -> None:
    for i in range(2):
        (tmp_path / f"{i}.png").write_bytes(png(i))
    good = {"prompt": "p", "image_path": ["0.png", "1.png"], "human_preference": [1, 0]}
    entries = [good | change if isinstance(change, dict) else change, good]
    (tmp_path / "x.json").write_text(json.dumps(entries))
    table = open_pairs(tmp_path / "x.json")
    assert len(table) == 1
    (problem,) = table.problems
    assert problem.where.startswith("x.json entry 0")
    assert problem.kind == kind
    assert reason in problem.reason


def test_has_label_by_the_word() -> None:
    for yes in (True, 1, 1.0, "Yes", "TRUE", "t", " y "):
        assert judge(1, 0, yes) == 0
    for no in (False, 0, "no", "N", "f", "", None, float("nan"), "null"):
        assert judge(1, 0, no)[0] == "no label"  # type: ignore[index]
    for neither in ("maybe", 2, [True], {"a": 1}):
        assert judge(1, 0, neither)[0] == "bad label"  # type: ignore[index]
