"""Manifests of image folders: each fault is named with file, line and field, before a scorer is called."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from diffalign.errors import DiffalignError
from diffalign.evaluation.manifest import MANIFEST, GeneratedImage, manifest_rows, mend_end, read_image_manifest

GOOD = {"file": "a.png", "prompt": "a fox", "seed": 0}


def write(folder: Path, *lines: object, end: str = "\n") -> Path:
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    (folder / MANIFEST).write_text(text + end, encoding="utf-8")
    Image.new("RGB", (8, 8)).save(folder / "a.png")
    return folder


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": "a", "seed": 0}, "file is missing; it must be a file name"),
        ({"file": "a.png", "seed": 0}, "prompt is missing; it must be a text"),
        ({"file": "a.png", "prompt": "a"}, "seed is missing; it must be a number from 0"),
        ({**GOOD, "file": 3}, "file is 3"),
        ({**GOOD, "file": ""}, "file is ''"),
        ({**GOOD, "file": "a\0"}, r"file is 'a\\x00'"),
        ({**GOOD, "prompt": None}, "prompt is None"),
        ({**GOOD, "prompt": ["a"]}, r"prompt is \['a'\]"),
        ({**GOOD, "prompt": "\ud800"}, "prompt is"),
        ({**GOOD, "seed": "0"}, "seed is '0'"),
        ({**GOOD, "seed": True}, "seed is True"),
        ({**GOOD, "seed": 1.5}, "seed is 1.5"),
        ({**GOOD, "seed": -1}, "seed is -1"),
        ({**GOOD, "seed": 2**63}, "seed is 9223372036854775808"),
        ({**GOOD, "settings": 5}, "settings is 5; leave it out"),
        ("[1]", "is not an image; write"),
        ("5", "is not an image; write"),
        ('{"file": ', "not JSON"),
        ("[" * 5000, "not JSON"),
        ({**GOOD, "file": "b.png"}, "'a.png' on line 1 and 'b.png' here; keep one"),
    ],
)
def test_a_fault_has_file_line_and_field(row: object, words: str, tmp_path: Path) -> None:
    with pytest.raises(DiffalignError, match=rf"manifest\.jsonl, line 2: .*{words}"):
        read_image_manifest(write(tmp_path, GOOD, row))


def test_a_whole_last_line_needs_no_end_and_a_torn_one_is_left_out(tmp_path: Path) -> None:
    folder = write(tmp_path, GOOD, {**GOOD, "seed": 1}, end="")
    assert [picture.seed for picture in read_image_manifest(folder)] == [0, 1]
    folder = write(tmp_path, GOOD, '{"file": "a.png", "pro', end="")
    assert [picture.seed for picture in read_image_manifest(folder)] == [0]
    mend_end(folder)
    assert (folder / MANIFEST).read_text() == json.dumps(GOOD) + "\n"


def test_text_is_utf_8_with_or_without_a_mark(tmp_path: Path) -> None:
    folder = write(tmp_path, "\ufeff" + json.dumps(GOOD), "", {**GOOD, "prompt": "a\u2028b", "seed": 1})
    assert [row["prompt"] for row in manifest_rows(folder)] == ["a fox", "a\u2028b"]
    (folder / MANIFEST).write_bytes(b'{"file": "a.png", "prompt": "a", "seed": 0}\n{"file": "\xe9.png"}\n')
    with pytest.raises(DiffalignError, match=r"manifest\.jsonl, line 2: not UTF-8; save"):
        read_image_manifest(folder)


@pytest.mark.parametrize("content", [b"", b"no picture", b"\x89PNG\r\n\x1a\n" + b"\0" * 40, None])
def test_an_image_that_does_not_open_is_named(content: bytes | None, tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    if content is None:
        Image.new("RGB", (64, 64)).save(file)
        content = file.read_bytes()[:-60]
    file.write_bytes(content)
    with pytest.raises(DiffalignError, match=r"a\.png: the image cannot be read .*generate it again"):
        GeneratedImage("a", 0, file).open()
