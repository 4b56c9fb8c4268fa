"""The kernels compiled for Ampere and Hopper without a GPU: no spilled registers, 16-byte accesses.

In a process of its own: this one may have Triton's interpreter in the compiler's place.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the kernels need triton (a Linux package; it comes with torch for CUDA)")

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.slow
def test_no_spills_and_wide_accesses_at_sdxls_tiles(tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-m", "tests.models.aot", "90:bf16", "80:fp32"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    kernels = [json.loads(line) for line in done.stdout.splitlines()]
    assert {(k["sm"], k["dtype"]) for k in kernels} == {(90, "bf16"), (80, "fp32")}
    assert len({k["kernel"] for k in kernels}) == 8
    for kernel in kernels:
        assert kernel["local_bytes"] == 0, kernel
        assert kernel["registers"] <= 128, kernel  # two programs of 8 warps fit a multiprocessor
        if "WIDTH" not in kernel:  # those over tiles of the image
            assert (kernel["spills"], kernel["load_bits"]) == (0, 128), kernel
        if kernel["kernel"] in ("apply", "input_slope", "geglu", "geglu_slope"):
            assert kernel["store_bits"] == 128, kernel
