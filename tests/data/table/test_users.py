"""Users of pairs, from columns and files into batches, online and cached; missing or wrong ones are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

from diffalign.data.cache.latents import CacheSpec, cache_key, open_cache
from diffalign.data.loader.offline_pairs import OfflinePairs
from diffalign.data.loader.online import Online
from diffalign.data.loader.spec import LoaderSpec
from diffalign.data.precompute.latents import encode_cache
from diffalign.data.row import DataError
from diffalign.data.table.open import open_pairs
from diffalign.data.table.users import open_users, parse_mixture, use_users
from tests.data.helpers import FakeEncoder, pick_rows, write_parquet

ANNA, BEN = [0.5, -1.0, 2.0], [0.0, 0.25, -3.0]


def write_users(file: Path) -> Path:
    embeddings = {"anna": ANNA, "ben": BEN}
    if file.suffix == ".json":
        file.write_text(json.dumps(embeddings))
    elif file.suffix == ".safetensors":
        save_file({name: torch.tensor(x) for name, x in embeddings.items()}, file)
    else:
        pq.write_table(pa.table({"user": list(embeddings), "user_embed": list(embeddings.values())}), file)
    return file


def rows_of(*users: Any, column: str = "user", n: int = 6) -> list[dict[str, Any]]:
    return [row | {column: users[i % len(users)]} for i, row in enumerate(pick_rows(n))]


@pytest.mark.parametrize("suffix", ["json", "parquet", "safetensors"])
def test_every_kind_of_file_says_the_same(suffix: str, tmp_path: Path) -> None:
    users = open_users(write_users(tmp_path / f"users.{suffix}"))
    assert users.dim == 3
    assert users.of("anna").tolist() == ANNA
    assert users.of("ben").tolist() == BEN


def test_a_mixture_is_the_weighted_average(tmp_path: Path) -> None:
    users = open_users(write_users(tmp_path / "users.json"))
    mixed = users.mixed(parse_mixture(["anna=3", "ben=1"]))
    assert mixed.tolist() == [(3 * a + b) / 4 for a, b in zip(ANNA, BEN, strict=True)]
    assert users.mixed(parse_mixture(["ben"])).tolist() == BEN
    with pytest.raises(DataError, match="did you mean 'anna'"):
        users.mixed({"ana": 1.0})
    with pytest.raises(DataError, match="not all 0"):
        users.mixed({"anna": 0.0})
    for odd in (float("nan"), float("inf"), -1.0):
        with pytest.raises(DataError, match=rf"finite weights of at least 0 .*{odd}"):
            users.mixed({"anna": 1.0, "ben": odd})
    with pytest.raises(DataError, match="write ID or ID=WEIGHT"):
        parse_mixture(["anna=much"])
    with pytest.raises(DataError, match="is given twice"):
        parse_mixture(["anna=1", "anna"])


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ("{}", "contains no user"),
        ("[1, 2]", "is not a file of users"),
        ('{"anna": [1, 2], "ben": [1]}', "anna has 2 numbers and that of ben 1"),
        ('{"anna": [1, NaN]}', "finite"),
        ('{"anna": "tall"}', "not a list of numbers"),
        ('{"anna": [1' + "0" * 400 + "]}", "not a list of numbers"),
        ('{"anna": [1], "anna": [2]}', "the key 'anna' occurs twice"),
        ('{"anna": [[1, 2]]}', "shape"),
    ],
)
def test_a_file_of_another_form(content: str, fault: str, tmp_path: Path) -> None:
    (tmp_path / "users.json").write_text(content)
    with pytest.raises(DataError, match=fault):
        open_users(tmp_path / "users.json")


def test_files_that_are_not_there_or_not_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no file of users"):
        open_users(tmp_path / "users.json")
    (tmp_path / "users.txt").write_text("anna")
    with pytest.raises(DataError, match=r"read from \.json, \.parquet, \.safetensors"):
        open_users(tmp_path / "users.txt")
    twice = tmp_path / "users.parquet"
    pq.write_table(pa.table({"user": ["anna", "anna"], "user_embed": [ANNA, BEN]}), twice)
    with pytest.raises(DataError, match="2 rows of 1 users"):
        open_users(twice)


@pytest.mark.parametrize("column", ["user", "user_id"])
def test_ids_and_embeddings_give_the_same_users(column: str, tmp_path: Path) -> None:
    users = open_users(write_users(tmp_path / "users.json"))
    by_id = open_pairs(write_parquet(tmp_path / "ids.parquet", rows_of("anna", "ben", column=column)))
    own = open_pairs(write_parquet(tmp_path / "own.parquet", rows_of(ANNA, BEN, column="user_embed")))
    use_users(by_id, users, where="users.json")
    use_users(own, None, where="")
    assert by_id.user_dim == own.user_dim == 3
    for i in range(6):
        assert by_id.user(i).tolist() == own.user(i).tolist() == (ANNA, BEN)[i % 2]


def test_rows_left_out_shift_no_user(tmp_path: Path) -> None:
    rows = rows_of("anna", "ben")
    rows[2]["label_0"] = rows[2]["label_1"] = 0.5  # a tie, dropped
    table = open_pairs(write_parquet(tmp_path / "pairs.parquet", rows))
    use_users(table, open_users(write_users(tmp_path / "users.json")), where="users.json")
    assert len(table) == 5
    assert [table.user(i)[0].item() for i in range(5)] == [0.5, 0.0, 0.0, 0.5, 0.0]


def test_pairs_that_do_not_say_whose_they_are(tmp_path: Path) -> None:
    users = open_users(write_users(tmp_path / "users.json"))
    plain = open_pairs(write_parquet(tmp_path / "plain.parquet", pick_rows(4)))
    with pytest.raises(DataError, match=r"no column user\. Name it \(data\.columns"):
        use_users(plain, users, where="users.json")
    with pytest.raises(DataError, match="no column user_embed"):
        use_users(plain, None, where="")
    named = open_pairs(write_parquet(tmp_path / "named.parquet", rows_of("anna", None, "carl")))
    with pytest.raises(DataError, match=r"or give data\.users"):
        use_users(named, None, where="")
    with pytest.raises(DataError, match=r"4 of 6 pairs have no user that is in users\.json \(.*row 1: None"):
        use_users(named, users, where="users.json")
    uneven = open_pairs(write_parquet(tmp_path / "uneven.parquet", rows_of([1.0, 2.0], [1.0], column="user_embed")))
    with pytest.raises(DataError, match=r"2 numbers and that of .*row 1 1"):
        use_users(uneven, None, where="")


@pytest.mark.parametrize("cached", [False, True])
def test_batches_carry_the_users_of_their_pairs(cached: bool, tmp_path: Path) -> None:
    table = open_pairs(write_parquet(tmp_path / "pairs.parquet", rows_of("anna", "ben")))
    use_users(table, open_users(write_users(tmp_path / "users.json")), where="users.json")
    encoder = FakeEncoder()
    content: Any = Online(encoder, 16)
    if cached:
        key = encode_cache(table, encoder, tmp_path / "cache", CacheSpec(16)).key
        content = open_cache(
            tmp_path / "cache",
            cache_key(table, encoder.fingerprint, CacheSpec(16)),
        )
        assert key.pairs == len(table)
    source = OfflinePairs(table, content, LoaderSpec(0, 4, with_uncond=True, prompt_dropout=0.5))
    batch = next(source.batches())
    assert batch.cond.user is not None
    assert batch.cond.user.shape == (2, 4, 3)
    assert batch.cond.user.stride(0) == 0  # the sides share it: one forward serves both
    for pair, name in enumerate(batch.ids):
        expected = table.user(table.ids.index(name))
        for cond in (batch.cond, batch.uncond):
            assert torch.equal(cond.user[0, pair], expected)
            assert torch.equal(cond.user[1, pair], expected)
    part = batch.select(pair=slice(1, 3)).to("cpu").cond
    assert torch.equal(part.user, batch.cond.user[:, 1:3])
    joined = part.flatten().followed_by(part.flatten())
    assert joined.user.shape == (8, 3)
