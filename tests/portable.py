"""The tests that compare numbers, with the kernels of several processors, on two threads and in a shuffled order.

    python -m tests.portable [--only SETTING ...] [pytest's own arguments]        make test-portable

Without arguments for pytest: every folder of tests, without the single files beside this one (command line, docs,
repository). Prints one row a setting and the names of failed tests; ends with exit code 1 if there are any.

MKL ignores MKL_ENABLE_INSTRUCTIONS and takes kernels of its own on processors that are not Intel's. There a library of
two lines, built with the C compiler if there is one, says to it that the processor is, for `avx2` and for `intel`.
"""

from __future__ import annotations

import argparse
import os
import platform
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).parent
WORKERS = os.environ.get("WORKERS", "2")
VENDOR = "int mkl_serv_intel_cpu_true(void) { return 1; }\nint mkl_serv_intel_cpu(void) { return 1; }\n"
ROW = "{:<10}{:>8}{:>8}{:>9}"


def settings(folder: Path, seed: int) -> dict[str, dict[str, str]]:
    """The environment variables of each setting; WORKERS is this script's own."""
    intel = claim_intel(folder)
    preload = {} if intel is None else {"LD_PRELOAD": str(intel)}
    found = {
        "default": {},
        "avx2": {
            "ATEN_CPU_CAPABILITY": "avx2",
            "ONEDNN_MAX_CPU_ISA": "AVX2",
            "MKL_ENABLE_INSTRUCTIONS": "AVX2",
            **preload,
        },
        "sse4": {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_CBWR": "COMPATIBLE"},
        "threads": {"OMP_NUM_THREADS": "2", "WORKERS": str(max(1, int(WORKERS) // 2))},
        "shuffled": {"DIFFALIGN_TEST_SEED": str(seed)},
    }
    return found | ({"intel": preload} if preload else {})


def claim_intel(folder: Path) -> Path | None:
    """The library for LD_PRELOAD; None on Intel's own processors, on other systems and without a C compiler."""
    info = Path("/proc/cpuinfo")
    compiler = shutil.which("cc")
    if platform.machine() != "x86_64" or compiler is None or not info.is_file() or "GenuineIntel" in info.read_text():
        return None
    source, library = folder / "vendor.c", folder / "vendor.so"
    source.write_text(VENDOR)
    built = subprocess.run([compiler, "-shared", "-fPIC", "-o", str(library), str(source)], check=False)
    return library if built.returncode == 0 else None


def counts(output: str) -> tuple[int, int]:
    """(passed, failed or in error) of pytest's last line."""
    last = output.strip().rpartition("\n")[2]
    found = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|errors?)\b", last)}
    return found.get("passed", 0), found.get("failed", 0) + found.get("error", 0) + found.get("errors", 0)


def folders() -> list[Path]:
    """The folders of tests."""
    return sorted({HERE / file.relative_to(HERE).parts[0] for file in HERE.glob("*/**/test_*.py")})


def run(variables: dict[str, str], arguments: Sequence[str]) -> tuple[int, str]:
    """Exit code and output of pytest under these variables."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **variables}
    workers = environment.get("WORKERS", WORKERS)
    command = [sys.executable, "-m", "pytest", "-q", "-n", workers, *arguments]
    done = subprocess.run(command, cwd=HERE.parent, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    return done.returncode, done.stdout


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs every setting, or those named; 0 if all tests passed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", metavar="SETTING")
    known, given = parser.parse_known_args(arguments)
    seed = int(os.environ.get("DIFFALIGN_TEST_SEED") or random.SystemRandom().randrange(10**6))
    given = given or [str(folder) for folder in folders()]
    failures: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        chosen = settings(Path(folder), seed)
        if unknown := set(known.only or ()) - chosen.keys():
            parser.error(f"--only {' '.join(sorted(unknown))}: here there are {', '.join(chosen)}")
        print(f"shuffled with DIFFALIGN_TEST_SEED={seed}\n{ROW.format('setting', 'passed', 'failed', 'seconds')}")
        for name in known.only or chosen:
            start = time.perf_counter()
            code, output = run(chosen[name], given)
            passed, failed = counts(output)
            print(ROW.format(name, passed, failed, f"{time.perf_counter() - start:.0f}"), flush=True)
            failures += [f"{name}: {line}" for line in output.splitlines() if line.startswith(("FAILED ", "ERROR "))]
            if code and not failed:
                failures.append(f"{name}: pytest ended with exit code {code}: {output.strip()[-500:]}")
    print("\n".join(failures) or "all passed")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
