"""A run on faulty pairs names each excluded row and continues, or stops before a model is loaded."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from diffalign.config.schema import Config
from diffalign.data.row import DataError
from diffalign.training import build as setup
from diffalign.training.run import run_training
from tests.training.test_run import metrics

MakeConfig = Callable[..., Config]


def png(seed: int, side: int = 40) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (side, side, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def write(path: Path, rows: list[dict], rename: dict[str, str] | None = None) -> Path:
    columns = {(rename or {}).get(name, name): [row[name] for row in rows] for name in rows[0]}
    pq.write_table(pa.table(columns), path)
    return path


def good(i: int) -> dict:
    return {
        "caption": f"a red circle {i}",
        "jpg_0": png(2 * i),
        "jpg_1": png(2 * i + 1),
        "label_0": 1.0,
        "label_1": 0.0,
    }


FAULTS = {
    "corrupt image": {"jpg_0": png(99)[:60] + b"rubbish"},
    "missing side": {"jpg_1": None},
    "tie": {"label_0": 0.5, "label_1": 0.5},
    "empty prompt": {"caption": "  "},
    "bad label": {"label_0": 2.0},
    "tiny image": {"jpg_0": png(7, side=1)},
}


def test_training_names_faulty_rows_and_goes_on(
    make_config: MakeConfig, tiny_sd: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [good(i) for i in range(4)] + [{**good(10 + i), **fault} for i, fault in enumerate(FAULTS.values())]
    path = write(tmp_path / "pairs.parquet", rows)
    config = make_config(tiny_sd, {"data.path": str(path), "data.verify": "full"})
    with caplog.at_level(logging.INFO):
        run_training(config)
    assert "4 usable pairs of 10 rows" in caplog.text
    named = [record.getMessage() for record in caplog.records if record.getMessage().startswith("row left out")]
    assert len(named) == 5
    assert "… and 1 more rows" in caplog.text
    for message, kind in zip(named, FAULTS, strict=False):
        assert kind in message
        assert "row " in message
    assert len(metrics(config.output_dir)) == 4


def test_an_image_found_corrupt_while_training_is_replaced_and_named(
    make_config: MakeConfig, tiny_sd: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [good(i) for i in range(8)]
    rows[3]["jpg_1"] = png(7)[:200]  # the header is whole, the image is not
    config = make_config(tiny_sd, {"data.path": str(write(tmp_path / "pairs.parquet", rows))})
    with caplog.at_level(logging.WARNING):
        run_training(config)
    replaced = [record.getMessage() for record in caplog.records if "replaced by another" in record.getMessage()]
    assert len(replaced) == 1
    assert "corrupt image" in replaced[0]


@pytest.mark.parametrize(
    ("rename", "words"),
    [({"label_0": "lable_0"}, "lable_0"), ({"caption": "captoin"}, "captoin")],
)
def test_wrong_columns_stop_before_the_model_loads(
    rename: dict[str, str],
    words: str,
    make_config: MakeConfig,
    tiny_sd: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def loaded(*_: object, **__: object) -> None:
        raise AssertionError("the model was loaded before the data were looked at")

    monkeypatch.setattr(setup, "load_base", loaded)
    path = write(tmp_path / "pairs.parquet", [good(i) for i in range(3)], rename)
    with pytest.raises(DataError, match=words):
        run_training(make_config(tiny_sd, {"data.path": str(path)}))


def test_a_batch_above_the_pairs_stops_before_the_model_loads(
    make_config: MakeConfig, tiny_sd: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(setup, "load_base", lambda *_, **__: pytest.fail("the model was loaded"))
    changes = {"training.train_batch_size": 8, "data.max_pairs": 7}
    with pytest.raises(DataError, match=r"batch_size: 8 pairs.* has 7 usable ones \(data.max_pairs: 7\); set it to 7"):
        run_training(make_config(tiny_sd, changes))


def test_no_usable_pair_stops_before_the_model_loads(
    make_config: MakeConfig, tiny_sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(setup, "load_base", lambda *_, **__: pytest.fail("the model was loaded"))
    path = write(tmp_path / "pairs.parquet", [{**good(0), **FAULTS["tie"]}])
    with pytest.raises(DataError, match="none of the 1 rows is usable"):
        run_training(make_config(tiny_sd, {"data.path": str(path)}))
