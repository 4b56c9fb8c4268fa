"""The world package: light to import, with an error that names missing files."""

from __future__ import annotations

import subprocess
import sys

import pytest

from diffalign import world


def test_importing_the_world_imports_nothing_heavy() -> None:
    script = (
        "import sys, diffalign.world as w; w.base_path(), w.pairs_path(), w.splits()\n"
        "heavy = {'diffusers', 'transformers', 'PIL', 'pyarrow'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_missing_asset_says_where_it_was_looked_for() -> None:
    with pytest.raises(FileNotFoundError, match=r"neither at .*assets/world/nothing.*nor at .*_assets/world/nothing"):
        world._asset("nothing")
