from __future__ import annotations

from pathlib import Path

import pytest

from diffalign.data.formats import parquet


@pytest.fixture
def arrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parquet goes through Arrow copies, which are made in a folder of the test's own."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    monkeypatch.setattr(parquet, "SURPLUS", 10)
