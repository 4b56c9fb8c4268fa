"""Text files of users: byte order marks, line ends, delimiters, and one line that is not UTF-8."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from diffalign.data.row import DataError
from diffalign.data.spec import DataSpec
from diffalign.data.table.open import open_pairs
from diffalign.data.table.prompts import read_prompts
from diffalign.data.table.scores import read_scores
from diffalign.data.table.users import open_users
from tests.data.helpers import png, write_parquet

BOM = b"\xef\xbb\xbf"


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for i in range(6):
        (tmp_path / f"{i}.png").write_bytes(png(i))
    return tmp_path


@pytest.mark.parametrize(
    ("name", "raw"),
    [
        ("p.txt", b"a fox\nan owl\n"),
        ("p.TXT", b"a fox\r\n\r\nan owl"),
        ("p.txt", b"a fox\ran owl\r"),
        ("p.csv", b"id,prompt\n1,a fox\n2,an owl\n"),
        ("p.CSV", b"id;prompt\r\n1;a fox\r\n2;an owl\r\n"),
        ("p.csv", b"id\tprompt\n1\ta fox\n2\tan owl\n"),
        ("p.jsonl", b'{"prompt": "a fox"}\n\n"an owl"\n'),
        ("p.JSONL", b'{"caption": "a fox"}\r\n{"caption": "an owl"}\r\n'),
    ],
)
@pytest.mark.parametrize("bom", [b"", BOM])
def test_prompts_with_and_without_a_byte_order_mark(tmp_path: Path, name: str, raw: bytes, bom: bytes) -> None:
    (tmp_path / name).write_bytes(bom + raw)
    assert read_prompts(str(tmp_path / name)) == ["a fox", "an owl"]


def test_a_line_ends_at_line_ends_only(tmp_path: Path) -> None:
    text = "a fox\u2028in snow\x0cat night\x85and\x1cmore"
    (tmp_path / "p.txt").write_text(f"{text}\nan owl\n", encoding="utf-8")
    (tmp_path / "p.csv").write_text(f"prompt\n{text}\nan owl\n", encoding="utf-8")
    (tmp_path / "p.jsonl").write_text(json.dumps(text, ensure_ascii=False) + '\n"an owl"\n', encoding="utf-8")
    for name in ("p.txt", "p.csv", "p.jsonl"):
        assert read_prompts(str(tmp_path / name)) == [text, "an owl"]


@pytest.mark.parametrize(
    ("name", "raw", "message"),
    [
        ("p.txt", b"a\ncaf\xe9\n", r"p.txt line 2: not UTF-8 \(byte 0xe9\); save the file as UTF-8"),
        ("p.txt", "a fox".encode("utf-16"), "p.txt is UTF-16; save it as UTF-8"),
        ("p.csv", "prompt\na".encode("utf-16"), "p.csv is UTF-16; save it as UTF-8"),
        ("p.txt", b"a\n\0b\n", "p.txt, line 2: it contains a NUL character; write a string"),
        ("p.csv", b"prompt\na\ncaf\xe9\n", r"p.csv line 3: prompt is not UTF-8 \(byte 0xe9\): 'caf\\udce9'"),
        (
            "p.csv",
            b"prompt\na fox, in snow\n",
            "p.csv line 2: 2 fields where the header has 1; put values that hold a comma",
        ),
        ("p.csv", b"prompt,id\na\n", "p.csv line 2: 1 fields where the header has 2"),
        ("p.csv", b'prompt\n"a fox\nan owl\n', "p.csv line 2: a quote is opened and not closed before the file ends"),
        ("p.csv", b'prompt,id\n"a" fox,1\n', "p.csv line 2: .*quote the whole value"),
        (
            "p.csv",
            b"prompt,id;no\na,b\n",
            "several delimiters split its header 'prompt,id;no' \\(comma and semicolon\\)",
        ),
        ("p.csv", b"prompt,prompt\na,b\n", r"line 1: the header \['prompt', 'prompt'\] names a column twice"),
        ("p.jsonl", b'"a"\n5\n', "p.jsonl line 2: prompt is 5, a int; write a string"),
        ("p.jsonl", b'"a"\n"\\ud800"\n', r"p.jsonl line 2: prompt contains half a character \(U\+D800"),
        ("p.jsonl", b'"a"\n' + b"[" * 100_000, "p.jsonl line 2: not JSON .*nested too deeply"),
        ("p.parquet", b"PAR1nothing", "p.parquet is not a readable parquet file"),
    ],
)
def test_prompts_that_cannot_be_read_name_file_and_line(tmp_path: Path, name: str, raw: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(DataError, match=message):
        read_prompts(str(tmp_path / name))


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("pairs.csv", "prompt,chosen,rejected|a fox,0.png,1.png"),
        ("pairs.CSV", "prompt;chosen;rejected|a fox;0.png;1.png"),
        ("pairs.csv", "prompt\tchosen\trejected|a fox\t0.png\t1.png"),
        ("pairs.TSV", "prompt\tchosen\trejected, or worse|a fox\t0.png\t1.png"),
        ("pairs.csv", "prompt, chosen ,rejected|a fox,0.png,1.png"),
        ("pairs.JSONL", '{"prompt": "a fox", "chosen": "0.png", "rejected": "1.png"}'),
        ("pairs.JSON", '[{"prompt": "a fox", "chosen": "0.png", "rejected": "1.png"}]'),
    ],
)
def test_listings_by_delimiter_and_any_case(images: Path, name: str, rows: str) -> None:
    (images / name).write_bytes(BOM + rows.replace("|", "\r\n").encode())
    columns = {"rejected": "rejected, or worse"} if "worse" in rows else {}
    for path in (images / name, images):  # by itself, and as the one listing of its folder
        assert open_pairs(path, DataSpec(columns=columns)).prompts == ["a fox"]


def test_parquet_and_tar_by_any_case(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a" / "X.PARQUET", [{"prompt": "p", "chosen": png(0), "rejected": png(1)}])
    assert len(open_pairs(tmp_path)) == len(open_pairs(tmp_path / "a" / "X.PARQUET")) == 1


def test_a_line_of_a_listing_that_cannot_be_used_is_one_bad_row(images: Path) -> None:
    lines = [
        b"prompt,chosen,rejected",
        b"a fox, in snow,0.png,1.png",
        b"caf\xe9,0.png,1.png",
        b"short,0.png",
        b'"a" b,0.png,1.png',
        b'"good, quoted",0.png,1.png',
    ]
    (images / "pairs.csv").write_bytes(b"\n".join(lines))
    table = open_pairs(images / "pairs.csv")
    assert table.prompts == ["good, quoted"]
    said = [f"{p.where}: {p.reason}" for p in table.problems]
    for place, wanted in enumerate(
        (
            "line 2: 4 fields where the header has 3; put values that hold a comma in double quotes",
            "line 3: prompt is not UTF-8 (byte 0xe9)",
            "line 4: 2 fields where the header has 3",
            "line 5: ',' expected after '\"'; quote the whole value",
        )
    ):
        assert wanted in said[place]
    (images / "pairs.jsonl").write_bytes(
        b'{"prompt": "caf\xe9"}\n{"prompt": "p", "chosen": "0.png", "rejected": "1.png"}'
    )
    table = open_pairs(images / "pairs.jsonl")
    assert len(table) == 1
    assert "pairs.jsonl line 1: bad row: the line is not UTF-8 (byte 0xe9); save the file" in str(table.problems[0])


def test_a_value_that_runs_on_names_its_lines_and_a_large_mask_is_read(images: Path) -> None:
    mask = json.dumps([[0.125] * 200] * 200).replace(" ", "")
    assert len(mask) > csv.field_size_limit()  # of Python's own
    lines = ["prompt,chosen,rejected,mask", '"a fox,0.png,1.png,', 'b,"0.png",1.png,', f'c,0.png,1.png,"{mask}"']
    (images / "pairs.csv").write_text("\n".join(lines))
    table = open_pairs(images / "pairs.csv")
    assert table.prompts == ["c"]
    assert table.mask(0).shape == (200, 200)  # type: ignore[union-attr]
    assert "line 2: bad row: ',' expected after '\"' (lines 2 to 3); quote" in str(table.problems[0])


def test_scores_and_users_with_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "s.jsonl").write_bytes(
        BOM + b'{"scorer": "x"}\n{"id": "a\xe2\x80\xa8b", "score_0": 1, "score_1": Infinity}\n'
    )
    assert str(read_scores(tmp_path / "s.jsonl")) == str({"a\u2028b": (1.0, float("nan"))})
    (tmp_path / "u.JSON").write_bytes(BOM + b'{"anna": [0.5]}')
    assert open_users(tmp_path / "u.JSON").dim == 1
    (tmp_path / "u.json").write_text("[" * 100_000)
    with pytest.raises(DataError, match=r"u.json is not a file of users .*nested too deeply.*write \{id"):
        open_users(tmp_path / "u.json")
    (tmp_path / "s.jsonl").write_bytes(b'{"scorer": "x"}\n{"id": "\xe9"}\n')
    with pytest.raises(DataError, match=r"s.jsonl line 2: not UTF-8 \(byte 0xe9\)"):
        read_scores(tmp_path / "s.jsonl")


def test_prompts_of_damaged_or_odd_parquet(tmp_path: Path) -> None:
    pq.write_table(pa.table({"prompt": ["a", None]}), tmp_path / "p.parquet")
    with pytest.raises(DataError, match=r"p.parquet row 1: prompt is empty; write one or remove the row"):
        read_prompts(str(tmp_path / "p.parquet"))


@pytest.mark.parametrize("name", ["p.parquet", "p.tar", "p.json", "p.jsonl", "p.csv"])
def test_what_a_download_left_in_place_of_the_file_is_named(tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    file.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1000\n")
    with pytest.raises(DataError, match=rf"{name}: it is a Git-LFS pointer .*`git lfs pull`.*hf download"):
        open_pairs(file)
    file.write_bytes(b"\n<!DOCTYPE html><html></html>")
    with pytest.raises(DataError, match=rf"{name}: it is a web page and not the file itself; download it again"):
        open_pairs(file)


def test_prompts_and_images_that_are_pointers_are_named(images: Path) -> None:
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1000\n"
    (images / "p.txt").write_bytes(pointer)  # three lines of text
    with pytest.raises(DataError, match="it is a Git-LFS pointer"):
        read_prompts(str(images / "p.txt"))
    (images / "1.png").write_bytes(pointer)
    (images / "p.csv").write_text("prompt,chosen,rejected\np,0.png,1.png")
    (problem,) = open_pairs(images / "p.csv").problems
    assert str(problem).startswith("p.csv line 2: corrupt image: p.csv line 2 rejected: it is a Git-LFS pointer")
