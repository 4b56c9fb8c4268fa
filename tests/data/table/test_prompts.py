from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from diffalign.data.table.prompts import PromptError, read_prompts

WANTED = ["a red fox", "snow, at night"]


def test_every_format_gives_the_same_prompts(tmp_path):
    (tmp_path / "p.txt").write_text("a red fox\n\nsnow, at night\na red fox\n")
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"id": 1, "prompt": p}) + "\n" for p in WANTED))
    (tmp_path / "plain.jsonl").write_text("".join(json.dumps(p) + "\n" for p in WANTED))
    (tmp_path / "p.csv").write_text('id,caption\n1,a red fox\n2,"snow, at night"\n')
    parquet.write_table(pa.table({"caption": WANTED, "jpg_0": [b"", b""]}), tmp_path / "p.parquet")
    for file in tmp_path.iterdir():
        assert read_prompts(str(file)) == WANTED, file.name
    assert read_prompts(str(tmp_path / "p.txt"), limit=1) == WANTED[:1]


def test_anything_else_is_a_prompt():
    assert read_prompts("a red fox") == ["a red fox"]


def test_faults_are_named(tmp_path):
    (tmp_path / "columns.csv").write_text("id,text\n1,a\n")
    (tmp_path / "empty.csv").write_text("prompt\na\n  \n")
    (tmp_path / "broken.jsonl").write_text('{"prompt": "a"}\n{"prompt": \n')
    (tmp_path / "blank.txt").write_text("\n\n")
    (tmp_path / "p.yaml").write_text("a")
    for file, message in {
        "columns.csv": r"no column prompt or caption; its columns are \['id', 'text'\]",
        "empty.csv": "empty.csv line 3: prompt is empty",
        "broken.jsonl": "line 2: not JSON",
        "blank.txt": "contains no prompt",
        "p.yaml": "allowed: .txt, .jsonl",
        "missing.txt": "no such file",
    }.items():
        with pytest.raises(PromptError, match=message):
            read_prompts(str(tmp_path / file))


@pytest.mark.parametrize(
    "source",
    [
        "prompt.txt",  # misspelled
        "heldout.json",
        "lists/heldout.prm",
        "~/lists/mine",
        "./mine",
        "/data/prompts",
        "pictures.parquet",
        "my prompts.csv",
        "C:\\data\\p.tsv",
    ],
)
def test_what_reads_as_a_file_is_never_a_prompt(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("a")
    with pytest.raises(PromptError, match="no such file") as error:
        read_prompts(source)
    assert source in str(error.value)
    assert "write it into a .txt file" in str(error.value)
    if source == "prompt.txt":
        assert "did you mean prompts.txt?" in str(error.value)
    if source.startswith("lists"):
        assert "there is no folder lists" in str(error.value)


def test_a_folder_is_no_prompt(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts").mkdir()
    with pytest.raises(PromptError, match=r"prompts is a folder; name a file in it that ends in \.txt"):
        read_prompts("prompts")


@pytest.mark.parametrize(
    "prompt",
    [
        "a red fox",
        "fox",
        "portrait, 1/2 profile, f/1.8",
        "AC/DC on stage, no. 5",
        "a cat.",
        "first\nsecond.txt",
        "e.g. a fox",
    ],
)
def test_prompts_with_dots_and_slashes_are_prompts(prompt, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert read_prompts(prompt) == [prompt]


@pytest.mark.parametrize(("prompt", "words"), [("a\0b", "NUL character"), ("a\udcff", "not UTF-8"), (" ", "no prompt")])
def test_a_prompt_is_a_text(prompt, words):
    with pytest.raises(PromptError, match=words):
        read_prompts(prompt)


@pytest.mark.parametrize("limit", [0, -1])
def test_a_limit_below_one_is_refused(limit: int) -> None:
    with pytest.raises(PromptError, match=rf"limit={limit}: must be at least 1; leave it out"):
        read_prompts("a red fox", limit=limit)
