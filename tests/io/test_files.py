"""Files that are written whole."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from diffalign.io.files import NoSpaceError, save_text, written_whole


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


def test_a_text_that_does_not_fit_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "folder" / "metrics.jsonl"
    save_text(file, "before\n")

    def full(self: Path, text: str, **_: object) -> int:
        with self.open("w") as opened:
            opened.write(text[:3])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(NoSpaceError, match=r"no space for metrics\.jsonl at"):
        save_text(file, "after\n")
    assert file.read_text() == "before\n"
    assert list(file.parent.iterdir()) == [file]
