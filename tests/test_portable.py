"""The runner for several processors' kernels, and the shuffled order."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests import conftest, portable


def test_every_setting_is_run_and_a_failure_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[dict[str, str]] = []

    def fake(command: list[str], **options: Any) -> SimpleNamespace:
        if "pytest" not in command:  # the C compiler
            return SimpleNamespace(returncode=1)
        asked.append(options["env"])
        if options["env"].get("ATEN_CPU_CAPABILITY") == "avx2":
            return SimpleNamespace(returncode=1, stdout="FAILED tests/x.py::test_y - E\n1 failed, 7 passed in 3.00s\n")
        if options["env"]["OMP_NUM_THREADS"] == "2":
            return SimpleNamespace(returncode=4, stdout="no such file\n")
        return SimpleNamespace(returncode=0, stdout="8 passed, 2 skipped in 3.00s\n")

    monkeypatch.setattr(portable.subprocess, "run", fake)
    assert portable.main([]) == 1
    printed = capsys.readouterr().out
    rows = {line.split()[0]: line.split()[1:3] for line in printed.splitlines() if line[:1].isalpha()}
    assert rows["default"] == rows["sse4"] == rows["shuffled"] == ["8", "0"]
    assert rows["avx2"] == ["7", "1"]
    assert "avx2: FAILED tests/x.py::test_y" in printed
    assert "threads: pytest ended with exit code 4: no such file" in printed
    assert asked[1]["MKL_ENABLE_INSTRUCTIONS"] == "AVX2"
    assert (asked[2]["ONEDNN_MAX_CPU_ISA"], asked[2]["MKL_CBWR"]) == ("SSE41", "COMPATIBLE")
    assert "DIFFALIGN_TEST_SEED" in asked[4]
    assert portable.main(["--only", "sse4", "tests/x.py"]) == 0
    assert "all passed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("= 3 failed, 300 passed, 50 skipped in 1.2s (0:06:02) =", (300, 3)),
        ("1 passed, 1 error in 2s", (1, 1)),
        ("", (0, 0)),
    ],
)
def test_the_last_line_is_counted(line: str, expected: tuple[int, int]) -> None:
    assert portable.counts(f"FAILED x\n{line}\n") == expected


def test_the_order_is_the_seeds(monkeypatch: pytest.MonkeyPatch) -> None:
    def order(seed: str | None) -> list[int]:
        items: list[Any] = list(range(50))
        if seed is None:
            monkeypatch.delenv("DIFFALIGN_TEST_SEED", raising=False)
        else:
            monkeypatch.setenv("DIFFALIGN_TEST_SEED", seed)
        conftest.shuffle(items)
        return items

    assert order(None) == list(range(50))
    assert order("1") == order("1") != order("2")
    assert sorted(order("1")) == list(range(50))
    assert "DIFFALIGN_TEST_SEED=1" in conftest.pytest_report_header()


def test_folders_of_tests_are_found() -> None:
    """What runs without arguments: every test but those beside the script is below one of these folders."""
    here = Path(portable.__file__).parent
    tested = {p.relative_to(here).parts[0] for p in here.rglob("test_*.py") if p.parent != here}
    assert {folder.name for folder in portable.folders()} == tested
    assert here / "models" in portable.folders()
