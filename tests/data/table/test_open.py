"""Every format gives the same pairs, and errors about whole files name the fault and the remedy."""

from __future__ import annotations

import csv
import json
import pickle
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from diffalign.data.row import DataError, PairRow
from diffalign.data.spec import DataSpec
from diffalign.data.table.open import open_pairs
from diffalign.data.table.pairs import PairTable
from diffalign.data.table.winners import open_winners
from tests.data.helpers import pick_rows, picture, png, write_jsonl, write_parquet, write_tar


def colours(table: PairTable) -> list[tuple[str, bytes, bytes]]:
    """Prompt and decoded images of each pair, in order."""
    rows: list[PairRow] = [table[i] for i in range(len(table))]
    return [(row.prompt, row.chosen.open().tobytes(), row.rejected.open().tobytes()) for row in rows]


def expected(n: int) -> list[tuple[str, bytes, bytes]]:
    """The pairs of `write_jsonl`: even images are chosen."""
    return [(f"prompt {i % 3}", picture(2 * i).tobytes(), picture(2 * i + 1).tobytes()) for i in range(n)]


def test_pickapic_takes_the_side_with_label_one(tmp_path: Path) -> None:
    rows = pick_rows(4)
    table = open_pairs(write_parquet(tmp_path / "pairs.parquet", rows))
    assert (table.format, len(table), table.problems) == ("pickapic", 4, [])
    for i, (prompt, chosen, rejected) in enumerate(colours(table)):
        winner = 2 * i + (0 if i % 2 else 1)  # label_0 = i % 2
        assert prompt == f"prompt {i % 3}"
        assert chosen == picture(winner).tobytes()
        assert rejected == picture(4 * i + 1 - winner).tobytes()
    assert table.ids == [f"a{i}:b{i}" for i in range(4)]


def test_inverted_preference_swaps_the_sides_only(tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "pairs.parquet", pick_rows(3))
    plain, inverted = open_pairs(file), open_pairs(file, DataSpec(invert_preference=True))
    assert colours(inverted) == [(prompt, rejected, chosen) for prompt, chosen, rejected in colours(plain)]
    assert inverted.ids == plain.ids
    assert inverted.identity != plain.identity


def test_preference_parquet_with_hf_image_structs_and_paths(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "r.png").write_bytes(png(1))
    row = {
        "prompt": "prompt 0",
        "chosen": {"bytes": png(0), "path": "x.png"},
        "rejected": {"bytes": None, "path": "images/r.png"},
    }
    table = open_pairs(write_parquet(tmp_path / "pairs.parquet", [row]))
    assert table.format == "preference"
    assert colours(table) == expected(1)


def test_jsonl(tmp_path: Path) -> None:
    table = open_pairs(write_jsonl(tmp_path / "pairs.jsonl", 4, chosen_score=2.5, rejected_score=-1))
    assert colours(table) == expected(4)
    assert table[0].scores == (2.5, -1.0)
    assert table[3].where == "pairs.jsonl line 4"


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_csv_with_a_line_break_in_a_prompt(tmp_path: Path, suffix: str) -> None:
    write_jsonl(tmp_path / "pairs.jsonl", 2)
    rows = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    rows[0]["prompt"] = 'two lines,\n"quoted"'
    with open(tmp_path / f"pairs{suffix}", "w", newline="") as stream:
        writer = csv.DictWriter(stream, rows[0].keys(), delimiter="\t" if suffix == ".tsv" else ",")
        writer.writeheader()
        writer.writerows(rows)
    table = open_pairs(tmp_path / f"pairs{suffix}")
    assert table.prompts == ['two lines,\n"quoted"', "prompt 1"]
    assert table[0].chosen.open().tobytes() == picture(0).tobytes()


def test_hpdv2_train_and_ranked_json(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    for i in range(3):
        (tmp_path / "train" / f"{i}.png").write_bytes(png(i))
    pair = {"prompt": "p", "image_path": ["0.png", "1.png"], "human_preference": [0, 1]}
    ranked = {"prompt": "p", "image_path": ["0.png", "1.png", "2.png"], "rank": [2, 3, 1]}
    (tmp_path / "train.json").write_text(json.dumps([pair, ranked]))
    table = open_pairs(tmp_path / "train.json")
    names = [
        (Path(str(row.chosen.path)).stem, Path(str(row.rejected.path)).stem) for row in map(table.__getitem__, range(4))
    ]
    assert names == [("1", "0"), ("0", "1"), ("2", "0"), ("2", "1")]


def test_webdataset_shards(tmp_path: Path) -> None:
    write_tar(tmp_path / "0000.tar", 3)
    assert colours(open_pairs(tmp_path)) == expected(3)


def test_hostile_tar_members_write_nothing_and_are_not_followed(tmp_path: Path) -> None:
    secret = tmp_path / "secret.png"
    secret.write_bytes(png(99))
    link = tarfile.TarInfo("000000.jpg_1.jpg")
    link.type, link.linkname = tarfile.SYMTYPE, str(secret)
    (tmp_path / "data").mkdir()
    write_tar(tmp_path / "data" / "0.tar", 1, (link, b""))
    escape = tarfile.TarInfo("../../000000.jpg_0.jpg")
    escape.size = 4
    write_tar(tmp_path / "data" / "1.tar", 1, (escape, b"evil"))
    before = sorted(tmp_path.rglob("*"))
    table = open_pairs(tmp_path / "data")
    assert colours(table) == expected(1) * 2
    assert [p.where for p in table.problems if p.dropped] == ["1.tar sample ../../000000"]
    assert sorted(tmp_path.rglob("*")) == before


def test_saved_data_set_keeps_images_encoded(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = [{"prompt": f"prompt {i % 3}", "chosen": picture(2 * i), "rejected": picture(2 * i + 1)} for i in range(3)]
    features = datasets.Features(prompt=datasets.Value("string"), chosen=datasets.Image(), rejected=datasets.Image())
    saved = datasets.Dataset.from_list(rows, features=features)
    datasets.DatasetDict(train=saved).save_to_disk(tmp_path / "saved")
    table = open_pairs(tmp_path / "saved")
    assert table[0].chosen.data is not None
    assert colours(table) == expected(3)
    with pytest.raises(DataError, match=r"no split 'tran'; it has .'train'.; did you mean 'train'"):
        open_pairs(tmp_path / "saved", DataSpec(split="tran"))


def test_ids_do_not_depend_on_place_or_sharding(tmp_path: Path) -> None:
    rows = [{key: row[key] for key in ("caption", "jpg_0", "jpg_1", "label_0", "label_1")} for row in pick_rows(4)]
    one = open_pairs(write_parquet(tmp_path / "a" / "x.parquet", rows))
    write_parquet(tmp_path / "b" / "1.parquet", rows[:1])
    write_parquet(tmp_path / "b" / "2.parquet", rows[1:])
    assert open_pairs(tmp_path / "b").ids == one.ids
    assert open_pairs(tmp_path / "b").identity == one.identity
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir(), there.mkdir()
    assert open_pairs(write_jsonl(here / "p.jsonl", 3)).ids == open_pairs(write_jsonl(there / "q.jsonl", 3)).ids


def test_identity_changes_with_an_image_file(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "pairs.jsonl", 2)
    before = open_pairs(file).identity
    (tmp_path / "images" / "1c.png").write_bytes(png(50, (40, 40)))
    assert open_pairs(file).identity != before


def test_a_folder_may_have_the_name_of_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "~").mkdir()
    write_parquet(tmp_path / "~" / "pairs.parquet", pick_rows(2))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "other"))
    assert len(open_pairs("./~")) == 2
    with pytest.raises(DataError, match="no file or folder ~"):
        open_pairs("~")


def test_many_rows_say_how_to_do_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    file = write_parquet(tmp_path / "pairs.parquet", pick_rows(3))
    open_pairs(file)
    monkeypatch.setattr("diffalign.data.table.examine.MANY_ROWS", 3)
    open_pairs(file, DataSpec(verify="none"))
    assert "images of all" not in caplog.text
    open_pairs(file)
    assert "checking the images of all 3 rows (verify='header'); verify='none' skips it" in caplog.text


def test_duplicate_ids_are_kept_with_a_suffix_and_pointed_out(tmp_path: Path) -> None:
    rows = pick_rows(2)
    table = open_pairs(write_parquet(tmp_path / "pairs.parquet", [rows[0], rows[1], rows[0]]))
    assert table.ids == ["a0:b0", "a1:b1", "a0:b0#2"]
    assert [(p.kind, p.where, p.dropped) for p in table.problems] == [("duplicate id", "pairs.parquet row 2", False)]


def test_columns_by_name_and_forced_format(tmp_path: Path) -> None:
    rows = [{"q": "prompt 0", "good": png(0), "bad": png(1)}]
    file = write_parquet(tmp_path / "pairs.parquet", rows)
    table = open_pairs(file, DataSpec(columns={"prompt": "q", "chosen": "good", "rejected": "bad"}))
    assert colours(table) == expected(1)
    with pytest.raises(DataError, match="columns names the part 'chosn'; the parts are chosen"):
        open_pairs(file, DataSpec(columns={"chosn": "good"}))
    with pytest.raises(DataError, match=r"columns maps chosen to 'goood', which has.*nearest name: 'good'"):
        open_pairs(file, DataSpec(columns={"chosen": "goood"}))
    with pytest.raises(DataError, match="format='pick'; allowed are auto, pickapic, preference"):
        open_pairs(file, DataSpec(format="pick"))


def test_the_columns_of_two_formats_are_refused_until_one_is_named(tmp_path: Path) -> None:
    """The first image is the chosen one by the name of its column, and the rejected one by its label."""
    row = {"prompt": "prompt 0", "chosen": png(0), "rejected": png(1)}
    row |= {"jpg_0": png(1), "jpg_1": png(0), "label_0": 1, "label_1": 0}
    file = write_parquet(tmp_path / "pairs.parquet", [row])
    message = (
        r"(?s)columns of several formats.*pickapic: prompt, jpg_0.*preference: prompt, chosen.*data.format: pickapic"
    )
    for opened in (open_pairs, open_winners):
        with pytest.raises(DataError, match=message):
            opened(file)
    assert colours(open_pairs(file, DataSpec(format="preference"))) == expected(1)
    assert colours(open_pairs(file, DataSpec(columns={"chosen": "chosen"}))) == expected(1)
    assert colours(open_pairs(file, DataSpec(format="pickapic", invert_preference=True))) == expected(1)
    assert open_pairs(file, DataSpec(columns={"label_0": "label_0"})).format == "pickapic"


def test_a_part_with_two_columns_says_which_is_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"prompt": "long", "caption": "prompt 0", "chosen": png(0), "rejected": png(1)}]
    file = write_parquet(tmp_path / "pairs.parquet", rows)
    assert open_pairs(file).prompts == ["long"]
    assert (
        "prompt is read from the column prompt, not from caption; to read that one, set data.columns: {prompt: caption}"
        in caplog.text
    )
    caplog.clear()
    assert open_pairs(file, DataSpec(columns={"prompt": "caption"})).prompts == ["prompt 0"]
    assert caplog.text == ""


def test_what_a_folder_holds_besides_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_parquet(tmp_path / "pairs.parquet", pick_rows(1))
    (tmp_path / "._pairs.parquet").write_bytes(b"Mac OS X")
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "x.parquet").write_bytes(b"a part")
    assert len(open_pairs(tmp_path)) == 1
    assert caplog.text == ""
    write_tar(tmp_path / "more.tar", 1)
    write_jsonl(tmp_path / "pairs.jsonl", 1)
    assert len(open_pairs(tmp_path)) == 1
    assert "only its .parquet files are read; left out: ['more.tar', 'pairs.jsonl']" in caplog.text


def test_a_column_twice_is_refused(tmp_path: Path) -> None:
    table = pa.table([["p"], [png(0)], [png(1)], [png(2)]], names=["prompt", "chosen", "chosen", "rejected"])
    pq.write_table(table, tmp_path / "pairs.parquet")
    with pytest.raises(DataError, match=r"pairs.parquet has a duplicate column: \['prompt', 'chosen', 'chosen', 'rej"):
        open_pairs(tmp_path / "pairs.parquet")


def test_wrong_column_names_list_found_needed_and_nearest(tmp_path: Path) -> None:
    rows = [{"prompt": "p", "choosen": png(0), "rejected": png(1)}]
    with pytest.raises(DataError) as caught:
        open_pairs(write_parquet(tmp_path / "pairs.parquet", rows))
    text = str(caught.value)
    assert "1 parquet file has the columns prompt, choosen, rejected" in text
    assert "preference needs chosen (one of chosen, chosen_image" in text
    assert "nearest name: 'choosen'" in text
    assert "pickapic needs label_0" in text


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("pairs.parquet", b"no", "not a readable parquet file"),
        ("pairs.txt", b"no", "ends in .txt; pairs are read from .parquet"),
        ("pairs.json", b"{]", "is not JSON"),
        ("pairs.json", b"{}", "must be a non-empty list"),
        ("pairs.jsonl", b"", "has no rows"),
        ("pairs.jsonl", b"\xff\xfe\x00", "save it as UTF-8"),
        ("pairs.tar", b"no", "is not a plain tar file"),
    ],
)
def test_unreadable_files_are_errors(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        open_pairs(tmp_path / name)


def test_a_path_that_is_not_there_names_the_nearest(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "pairs.jsonl", 1)
    with pytest.raises(DataError, match=r"no file or folder .*pair\.jsonl; did you mean .*pairs\.jsonl"):
        open_pairs(tmp_path / "pair.jsonl")
    with pytest.raises(DataError, match="chosen/ and rejected/"):
        open_pairs(tmp_path / "images")


def test_a_hub_id_offline_says_so() -> None:
    pytest.importorskip("datasets")
    with pytest.raises(
        DataError,
        match=r"'nobody/nothing' here, and as a dataset: .* is offline .*--repo-type dataset.*give DIR as the path",
    ):
        open_pairs("nobody/nothing")


def test_opening_without_verification_opens_no_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []
    real = Image.open
    monkeypatch.setattr(Image, "open", lambda *args: opened.append(args) or real(*args))
    listing = write_jsonl(tmp_path / "pairs.jsonl", 50)
    shard = write_parquet(tmp_path / "shard" / "pairs.parquet", pick_rows(20))
    fetched = []
    real_read = pq.ParquetFile.read_row_group
    monkeypatch.setattr(
        pq.ParquetFile,
        "read_row_group",
        lambda self, group, **options: fetched.append(group) or real_read(self, group, **options),
    )
    assert len(open_pairs(listing, DataSpec(verify="none"))) == 50
    assert len(open_pairs(shard, DataSpec(verify="none"))) == 20
    assert opened == []
    assert fetched == []  # with uid columns not even the bytes are read
    open_pairs(shard, DataSpec(verify="header"))
    assert len(opened) == 40
    assert fetched == list(range(7))  # each row group once


def test_the_index_is_small(tmp_path: Path) -> None:
    """Bytes per pair of what a loader worker gets: ids, prompts and a few numbers, never images."""
    table = open_pairs(
        write_parquet(tmp_path / "pairs.parquet", pick_rows(400), row_group_size=50), DataSpec(verify="none")
    )
    table[0].chosen.open()  # a row group is in memory now; it must not travel
    assert len(pickle.dumps(table)) / 400 < 80


@pytest.mark.parametrize("storage", ["parquet", "arrow", "jsonl", "tar"])
def test_a_table_travels_to_other_processes(tmp_path: Path, storage: str, request: pytest.FixtureRequest) -> None:
    if storage == "arrow":
        request.getfixturevalue("arrow")
    write = {
        "parquet": lambda: write_parquet(tmp_path / "pairs.parquet", pick_rows(3)),
        "arrow": lambda: write_parquet(tmp_path / "pairs.parquet", pick_rows(3)),
        "jsonl": lambda: write_jsonl(tmp_path / "pairs.jsonl", 3),
        "tar": lambda: write_tar(tmp_path / "pairs.tar", 3),
    }
    table = open_pairs(write[storage]())
    sent = pickle.loads(pickle.dumps(table))
    assert colours(sent) == colours(table)
    assert sent.identity == table.identity


def test_max_pairs_stops_early(tmp_path: Path) -> None:
    rows = pick_rows(6)
    rows[0]["label_0"] = rows[0]["label_1"] = 0.5
    table = open_pairs(write_parquet(tmp_path / "pairs.parquet", rows), DataSpec(max_pairs=2))
    assert table.ids == ["a1:b1", "a2:b2"]
    assert (table.total_rows, table.index.examined_rows) == (6, 3)
