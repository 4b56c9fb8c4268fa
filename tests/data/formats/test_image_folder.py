"""Folders of pairs: every file in chosen/ and rejected/ is used, or reported with the reason."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from diffalign.data.row import DataError
from diffalign.data.table.open import open_pairs
from tests.data.helpers import picture, png


def pair(folder: Path, name: str, seed: int = 0, suffix: str = ".png") -> None:
    for place, side in enumerate(("chosen", "rejected")):
        file = folder / side / f"{name}{suffix}"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(png(2 * seed + place))


def problems(folder: Path) -> dict[str, tuple[str, str]]:
    """What is said of each row that is not used."""
    table = open_pairs(folder)
    dropped = {p.where: (p.kind, p.reason) for p in table.problems if p.dropped}
    assert len(table) + len(dropped) == table.total_rows
    return dropped


@pytest.mark.parametrize(
    "captions",
    [
        {"captions.json": json.dumps({f"{i}.png": f"prompt {i}" for i in range(3)})},
        {"captions.json": "\ufeff" + json.dumps({str(i): f"prompt {i}" for i in range(3)})},
        {"captions.jsonl": "".join(json.dumps({"name": str(i), "prompt": f"prompt {i}"}) + "\n" for i in range(3))},
        {"captions.csv": "\ufeffname;prompt\r\n0;prompt 0\r\n1;prompt 1\r\n2;prompt 2\r\n"},
        {f"{i}.txt": f"\ufeffprompt {i}\n" for i in range(3)},
        {f"{i}.TXT": f"prompt {i}" for i in range(3)},
        {f"prompts/{i}.caption": f"prompt {i}" for i in range(3)},
        {f"chosen/{i}.png.txt": f"prompt {i}" for i in range(3)},
        {f"{side}/{i}.txt": f"prompt {i}" for i in range(3) for side in ("chosen", "rejected")},
        {f"rejected/{i}.CAPTION": f"prompt {i}" for i in range(3)},
    ],
)
def test_captions_in_every_usual_place(tmp_path: Path, captions: dict[str, str]) -> None:
    for i in range(3):
        pair(tmp_path, str(i), i)
    for name, text in captions.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    table = open_pairs(tmp_path)
    assert table.problems == []
    assert table.prompts == [f"prompt {i}" for i in range(3)]
    assert table[2].chosen.open().tobytes() == picture(4).tobytes()


@pytest.mark.parametrize("suffix", [".gif", ".avif", ".jfif", ".jp2", ".JPG", ".jpe", ".ppm", ".tga"])
def test_every_image_ending_is_read(tmp_path: Path, suffix: str) -> None:
    pair(tmp_path, "a", suffix=suffix)
    for place, side in enumerate(("chosen", "rejected")):
        kind = {".jp2": "JPEG2000", ".jfif": "JPEG", ".jpe": "JPEG", ".JPG": "JPEG"}.get(suffix, suffix[1:].upper())
        picture(place).save(tmp_path / side / f"a{suffix}", kind)
    (tmp_path / "a.txt").write_text("p")
    assert len(open_pairs(tmp_path)) == 1


def test_subfolders_are_part_of_the_name_and_links_are_followed(tmp_path: Path) -> None:
    data, elsewhere = tmp_path / "data", tmp_path / "elsewhere"
    pair(data, "1", 0)
    pair(data, "cats/1", 1)
    pair(elsewhere, "1", 2)
    for side in ("chosen", "rejected"):
        (data / side / "dogs").symlink_to(elsewhere / side)
        (data / side / "dogs" / "again").symlink_to(data / side)  # a circle
    for name in ("1.txt", "cats/1.txt", "chosen/dogs/1.txt"):
        (data / name).parent.mkdir(exist_ok=True)
        (data / name).write_text(name)
    table = open_pairs(data)
    assert table.problems == []
    assert list(zip((table.where(i) for i in range(3)), table.prompts, strict=True)) == [
        ("pair 1", "1.txt"),
        ("pair cats/1", "cats/1.txt"),
        ("pair dogs/1", "chosen/dogs/1.txt"),
    ]


def test_what_is_not_used_is_named(tmp_path: Path) -> None:
    for name in ("good", "uncaptioned", "latin", "two", "left"):
        pair(tmp_path, name, ord(name[0]))
        (tmp_path / f"{name}.txt").write_text("p")
    (tmp_path / "uncaptioned.txt").unlink()
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "chosen" / "two.txt").write_text("q")
    (tmp_path / "rejected" / "left.png").unlink()
    (tmp_path / "chosen" / "work.psd").write_bytes(b"")
    (tmp_path / "chosen" / "old" / "lonely.txt").parent.mkdir()
    (tmp_path / "chosen" / "old" / "lonely.txt").write_text("p")
    (tmp_path / "rejected" / "Thumbs.db").write_bytes(b"")
    (tmp_path / "rejected" / ".DS_Store").write_bytes(b"")
    said = problems(tmp_path)
    wanted = {
        "pair uncaptioned": ("empty prompt", "there is no uncaptioned.txt beside the folders, in prompts/, chosen/ or"),
        "pair latin": ("bad row", f"{tmp_path}/latin.txt line 1: not UTF-8 (byte 0xe9); save the file as UTF-8"),
        "pair two": ("bad row", "two.txt have different prompts, and a pair has one; remove all but one"),
        "pair left": (
            "missing side",
            "there is no rejected/left with the ending of an image; add it, or remove chosen/",
        ),
        "file chosen/work.psd": ("bad row", "the ending .psd is not supported; known: .png, .jpg"),
        "file chosen/old/lonely.txt": ("bad row", "a caption without an image of its name in chosen/ or rejected/"),
    }
    assert said.keys() == wanted.keys()
    for where, (kind, reason) in wanted.items():
        assert said[where][0] == kind
        assert reason in said[where][1]


def test_lines_of_a_captions_file_that_cannot_be_used(tmp_path: Path) -> None:
    for name in ("good", "comma", "twice", "unlisted"):
        pair(tmp_path, name, ord(name[0]))
    lines = ["name,prompt", "good,a fox", "comma,a fox, in snow", "twice,a", "twice.png,b", "Good,a fox", '"x" y,p']
    (tmp_path / "captions.csv").write_text("\n".join(lines))
    said = problems(tmp_path)
    assert {where: reason.partition(";")[0] for where, (_, reason) in said.items()} == {
        "pair comma": "captions.csv line 3: 3 fields where the header has 2",
        "pair twice": "captions.csv has 'twice' twice, with different values",
        "pair unlisted": "captions.csv names no 'unlisted'",
        "captions.csv name Good": "there is no image of that name in chosen/ or rejected/",
        "captions.csv line 7": "',' expected after '\"'",
    }


@pytest.mark.parametrize("prompt", [3, ["a"], {"prompt": "p"}, None])
def test_captions_that_are_no_text(tmp_path: Path, prompt: object) -> None:
    pair(tmp_path, "a")
    (tmp_path / "captions.json").write_text(json.dumps({"a": prompt}))
    kind = "bad prompt" if prompt else "empty prompt"
    assert {where: found[0] for where, found in problems(tmp_path).items()} == {"pair a": kind}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{]", "is not JSON"),
        ("[]", "one object"),
        ("[" * 10**5, "too deeply"),
        ('{"a": "1", "a": "2"}', "the key .a. occurs twice"),
    ],
)
def test_captions_files_of_another_form(tmp_path: Path, text: str, message: str) -> None:
    pair(tmp_path, "a")
    (tmp_path / "captions.json").write_text(text)
    with pytest.raises(DataError, match=f"captions.json .*{message}"):
        open_pairs(tmp_path)


def test_two_captions_files_are_refused_and_names_may_be_numbers(tmp_path: Path) -> None:
    pair(tmp_path, "1")
    (tmp_path / "captions.jsonl").write_text('{"name": 1, "prompt": "p"}')
    assert open_pairs(tmp_path).prompts == ["p"]
    (tmp_path / "captions.json").write_text('{"1": "q"}')
    with pytest.raises(
        DataError, match=r"captions.json and captions.jsonl; remove all but the one with the right prompts"
    ):
        open_pairs(tmp_path)


def test_a_file_name_that_is_not_utf8_is_one_bad_row(tmp_path: Path) -> None:
    pair(tmp_path, "a")
    pair(tmp_path, os.fsdecode(b"caf\xe9"), 1)
    (tmp_path / "a.txt").write_text("p")
    table = open_pairs(tmp_path)
    assert len(table) == 1
    assert "is not UTF-8 (byte 0xe9)" in table.problems[0].reason


def test_two_images_of_one_name_are_refused(tmp_path: Path) -> None:
    pair(tmp_path, "a")
    (tmp_path / "chosen" / "a.jpg").write_bytes(png(3))
    with pytest.raises(
        DataError, match=r"chosen has both a.jpg and a.png; remove one, so that there is one image per name"
    ):
        open_pairs(tmp_path)
