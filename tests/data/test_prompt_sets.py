"""Prompt sets by name: read, checked, fetched once, refused with the command to get them, and recorded by their text.

No network: the Hub and GitHub are stand-ins that give files of the published form.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from diffalign.cli.main import main
from diffalign.config.schema import load_config
from diffalign.data.prompt_sets import fetch
from diffalign.data.prompt_sets.known import SETS, STYLES, Packaged, PromptSet, PromptSetError, named
from diffalign.data.table.prompts import open_prompts, read_prompts
from tests.cli.test_main import fails

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(fetch, "cache_folder", lambda: tmp_path / "cache")
    return tmp_path / "cache"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, object]]:
    """A Hub that has the sets' files with other prompts; the calls that reach it."""
    calls: list[dict[str, object]] = []

    def snapshot_download(repository: str, **how: object) -> str:
        calls.append({"repository": repository, **how})
        folder = tmp_path / "hub" / repository
        (folder / "benchmark").mkdir(parents=True, exist_ok=True)
        (folder / "data").mkdir(exist_ok=True)
        for style in STYLES:
            prompts = [f"{style} {i}" for i in range(799)]
            (folder / f"benchmark/{style}.json").write_text(json.dumps([*prompts, f"{style} 0"]))  # one repeated
        for split, name in (("test_unique", "t"), ("validation_unique", "v")):
            for shard in range(2):
                column = pa.array([f"{name}{shard} {i}\nsecond line" for i in range(250)])
                pq.write_table(pa.table({"caption": column}), folder / f"data/{split}-0000{shard}-of-00002.parquet")
        rows = [f'a sign that says "{i}" \tC\tB\t' for i in range(1632)]
        (folder / "PartiPrompts.tsv").write_text("\n".join(["Prompt\tCategory\tChallenge\tNote", *rows]) + "\n")
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return calls


def with_hash(monkeypatch: pytest.MonkeyPatch, name: str, sha256: str | None) -> PromptSet:
    changed = replace(SETS[name], sha256=sha256)
    monkeypatch.setitem(SETS, name, changed)
    return changed


@pytest.mark.parametrize("known", SETS.values(), ids=SETS)
def test_every_set_says_where_it_is_from(known: PromptSet) -> None:
    assert known.rows > 0
    assert known.licence
    assert known.sha256 is None or re.fullmatch(r"[0-9a-f]{64}", known.sha256)
    assert sum(known.part_rows.values()) in (0, known.rows)
    if isinstance(known.origin, Packaged):
        own = (ROOT / known.origin.path).read_text().splitlines()
        assert read_prompts(known.name) == own
        assert len(own) == known.rows


def test_json_lists_are_a_set_with_parts_and_fetched_once(hub: list[dict[str, object]], cache: Path) -> None:
    whole = read_prompts("hpdv2")
    assert (len(whole), whole[:2], whole[799]) == (4 * 799, ["anime 0", "anime 1"], "concept-art 0")
    assert read_prompts("hpdv2:photo", limit=2) == ["photo 0", "photo 1"]
    assert [call["allow_patterns"] for call in hub] == [
        [f"benchmark/{style}.json" for style in STYLES],
        ["benchmark/photo.json"],
    ]
    assert hub[0]["revision"] == "260dbde75ab1c68e86d32a8e7739f1b49b100578"
    assert read_prompts("hpdv2") == whole
    assert len(hub) == 2
    assert read_prompts(str(cache / "hpdv2.jsonl")) == whole  # the file can be given itself, on another machine


def test_a_split_is_read_whole_with_prompts_of_several_lines(hub: list[dict[str, object]]) -> None:
    prompts = read_prompts("pickapic-500")
    assert (len(prompts), prompts[0], prompts[250]) == (500, "t0 0\nsecond line", "t1 0\nsecond line")
    assert read_prompts("pickapic-500") == prompts
    assert read_prompts("pickapic-v1-validation")[0].startswith("v0")
    assert hub[0]["repository"] == "yuvalkirstain/pickapic_v2_no_images"


def test_text_with_another_hash_is_refused(hub: list[dict[str, object]], cache: Path, monkeypatch) -> None:
    with pytest.raises(PromptSetError, match=r"is not the set.s .1632 prompts"):
        read_prompts("partiprompts")
    assert not cache.exists()
    expected = [f'a sign that says "{i}"' for i in range(1632)]  # quotes stay, spaces around a prompt do not
    known = with_hash(
        monkeypatch, "partiprompts", hashlib.sha256("".join(f"{x}\n" for x in expected).encode()).hexdigest()
    )
    assert read_prompts("partiprompts") == expected
    file = fetch.stored_at(known)
    file.write_text(file.read_text().replace('\\"7\\"', '\\"8\\"'))
    with pytest.raises(PromptSetError, match=r"delete .*partiprompts.jsonl and give the name again"):
        read_prompts("partiprompts")


def test_a_set_with_other_rows_is_refused(hub: list[dict[str, object]], monkeypatch) -> None:
    monkeypatch.setitem(SETS, "drawbench", replace(SETS["drawbench"], origin=SETS["hpdv2"].origin))
    with pytest.raises(PromptSetError, match="has 3200 rows, not 200"):
        read_prompts("drawbench")


@pytest.mark.parametrize("odd", [7, None, "  "])
def test_a_row_that_is_no_prompt_is_refused(odd: object, hub: list[dict[str, object]], monkeypatch) -> None:
    monkeypatch.setattr(fetch, "_from_hub", lambda *_: ["a dog"] * 199 + [odd])
    with pytest.raises(PromptSetError, match=rf"row 199 of Hub data set zhwang/HPDv2 is {odd!r}, not a prompt"):
        read_prompts("drawbench")


@pytest.mark.parametrize(
    "text",
    ['{"prompt": "a dog"}\n{"pro\n', '{"prompt": "a dog"}\n{"prompt": "a c', "", '{"prompt": 7}\n', '{"prompt": ""}\n'],
)
def test_a_damaged_file_of_a_set_is_named(cache: Path, text: str) -> None:
    cache.mkdir()
    (cache / "drawbench.jsonl").write_text(text)
    with pytest.raises(PromptSetError, match=r"drawbench.jsonl is damaged .*delete it"):
        read_prompts("drawbench")
    assert fetch.which_set(["a dog"])["set"] is None


def test_a_file_of_github(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [json.dumps({"tag": "counting", "prompt": f"a photo of {n} dogs"}) + "\n" for n in range(553)]
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(fetch, "urlopen", lambda url, timeout: io.BytesIO("".join(rows).encode()))
    with_hash(monkeypatch, "geneval", None)
    assert read_prompts("geneval", limit=2) == ["a photo of 0 dogs", "a photo of 1 dogs"]


@pytest.mark.parametrize("name", ["geneval", "hpdv2:anime"])
def test_without_a_connection_the_command_is_named(name: str, monkeypatch, capsys) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def refuse(*_: object, **__: object) -> str:
        raise OSError("offline")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    monkeypatch.setattr(fetch, "urlopen", refuse)
    said = fails(capsys, "generate", "BASE", "--prompts", name, "--out", "images")
    file = name.replace(":", "-")
    assert f"`diffalign data prompts {name} --out {file}.jsonl`" in said
    assert "HF_HUB_OFFLINE is set" in said


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("partiprompt", "did you mean partiprompts?"),
        ("hpdv2:photos", "its parts are anime, concept-art, paintings, photo"),
        ("geneval:counting", "it has no parts"),
    ],
)
def test_a_slip_is_no_prompt(text: str, said: str) -> None:
    with pytest.raises(PromptSetError, match=re.escape(said)):
        read_prompts(text)


@pytest.mark.parametrize("text", ["lighthouse", "a photo: of a dog", "draw a bench", "prompts.txt", "partiprompts.txt"])
def test_other_texts_are_no_sets(text: str) -> None:
    assert named(text) is None


def test_a_source_takes_a_set() -> None:
    assert len(open_prompts("world-heldout", limit=5)) == 5
    with pytest.raises(ValueError, match="diffalign list prompts"):
        open_prompts("nothing")


def test_validation_takes_prompts_themselves() -> None:
    config = ROOT / "training_configs/world/dpo.yaml"
    assert load_config(config, ["validation.prompts=[a dog]"]).validation.prompts == ("a dog",)
    with pytest.raises(ValueError, match="'geneval' is a set of 553 prompts; write the prompts themselves"):
        load_config(config, ["validation.prompts=[geneval]"])


def test_what_is_recorded(hub: list[dict[str, object]], tmp_path: Path) -> None:
    lines = (ROOT / "assets/world/heldout.txt").read_text().splitlines()
    whole = fetch.which_set(lines)
    digest = hashlib.sha256((ROOT / "assets/world/heldout.txt").read_bytes()).hexdigest()
    assert whole == {"count": 24, "sha256": digest, "set": "world-heldout", "verified": True}
    first = fetch.which_set(lines[:8])
    assert (first["set"], first["count"], first["of"]) == ("world-heldout", 8, 24)
    assert fetch.which_set(lines[::-1])["set"] is None
    assert fetch.which_set(["a dog"])["set"] is None
    photo = fetch.which_set(read_prompts("hpdv2:photo"))
    assert (photo["set"], photo["verified"]) == ("hpdv2:photo", False)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    def said(*words: str) -> str:
        main(list(words))
        return capsys.readouterr().out

    return said


def test_the_commands(hub: list[dict[str, object]], tmp_path: Path, run: Callable[..., str], capsys) -> None:
    out = tmp_path / "anime.jsonl"
    assert f"{out}: 799 prompts, SHA-256" in run("data", "prompts", "hpdv2:anime", "--out", str(out))
    assert read_prompts(str(out)) == read_prompts("hpdv2:anime")
    assert "exists" in fails(capsys, "data", "prompts", "hpdv2:anime", "--out", str(out))
    assert "anime.jsonl" in fails(capsys, "data", "prompts", "hpdv2", "--out", str(tmp_path / "anime.txt"))
    assert "no prompt set" in fails(capsys, "data", "prompts", "dogs", "--out", str(tmp_path / "x.jsonl"))
    listed = run("list", "prompts")
    for known in SETS.values():
        assert re.search(rf"^  {known.name}$", listed, re.MULTILINE)
        assert known.about in listed
    assert "hpdv2:photo" in listed
    assert listed.count("not verified") == sum(x.sha256 is None and not x.packaged for x in SETS.values())
