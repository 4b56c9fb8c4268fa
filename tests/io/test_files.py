"""Files that are written whole."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from diffalign.io.files import written_whole


@pytest.mark.skipif(os.name == "nt", reason="permissions are POSIX's")
def test_a_file_of_safetensors_can_be_read_by_whoever_reads_other_files(tmp_path: Path) -> None:
    (tmp_path / "other").touch()
    with written_whole(tmp_path / "file") as partial:
        save_file({"a": torch.zeros(1)}, partial)
    with written_whole(tmp_path / "folder") as partial:
        (partial / "inner").mkdir(parents=True)
        save_file({"a": torch.zeros(1)}, partial / "inner" / "file")
    modes = [(tmp_path / name).stat().st_mode for name in ("other", "file", "folder/inner/file")]
    assert len(set(modes)) == 1
