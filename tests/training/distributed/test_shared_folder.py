"""A folder that is not the same for all processes is refused in all of them, before any work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from diffalign.data.cache.latents import CacheKey, Plan, manifest_text
from diffalign.data.cache.shards import MANIFEST
from diffalign.errors import DiffalignError
from diffalign.training.distributed import shared_folder
from diffalign.training.distributed.shared_folder import require_shared
from tests.training.distributed.group import in_two


def complete_cache(folder: Path) -> None:
    """As far as the check reads one."""
    folder.mkdir()
    key = CacheKey(**dict.fromkeys(CacheKey.__dataclass_fields__, 0))
    (folder / MANIFEST).write_text(manifest_text(key, Plan(0, 1, 0, 1)))


def work(accelerator: Any, folder: Path) -> None:
    shared_folder.PATIENCE = 0.5
    own = folder / f"of-{accelerator.process_index}"  # as two machines have it
    require_shared(folder / "one", accelerator, "output_dir")
    for key, copies in (("output_dir", False), ("data.cache_dir", True)):
        with pytest.raises(DiffalignError, match=rf"{key}: .*/of-\d is not one folder .* all machines share"):
            require_shared(own, accelerator, key, copies=copies)
    complete_cache(own)
    require_shared(own, accelerator, "data.cache_dir", copies=True)
    with pytest.raises(DiffalignError, match=r"data\.cache_dir"):  # trajectories would be written there
        require_shared(own, accelerator, "data.cache_dir")


def test_processes_find_out_whether_they_see_one_folder(tmp_path: Path) -> None:
    for status, said in in_two(work, tmp_path):
        assert status == 0, said
    assert not (tmp_path / "one").exists()  # nothing is left
    assert {path.name for path in tmp_path.rglob("*")} == {"of-0", "of-1", MANIFEST, "0.err", "1.err"}
