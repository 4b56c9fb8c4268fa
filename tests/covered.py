"""The share of lines that the tests execute, by package: the test suite under coverage.py, then a table.

    python -m tests.covered [pytest's own arguments]        make coverage [TESTS=tests/objectives]

Lines that run in other processes count as well: workers of pytest and of data loaders, and the commands that tests
start. Measuring makes the suite slower, so neither `make test` nor continuous integration does it. Ends with pytest's
exit status.
"""

from __future__ import annotations

import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import coverage

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "diffalign"
ROW = "{:<16}{:>8}{:>10}{:>8}"


def by_package(measured: coverage.Coverage) -> dict[str, tuple[int, int]]:
    """Package, or module at the top of diffalign/ -> its statements, and how many of them no test executed."""
    counts: dict[str, tuple[int, int]] = defaultdict(lambda: (0, 0))
    for path in sorted(PACKAGE.rglob("*.py")):
        _, statements, _, missing, _ = measured.analysis2(str(path))
        top = path.relative_to(PACKAGE).parts[0]
        counts[top] = (counts[top][0] + len(statements), counts[top][1] + len(missing))
    return dict(counts)


def table(counts: dict[str, tuple[int, int]]) -> str:
    """One row a package and one for all: statements, those not executed, and the share executed in percent."""
    rows = {**counts, "all": (sum(n for n, _ in counts.values()), sum(m for _, m in counts.values()))}
    lines = [ROW.format("package", "lines", "not run", "%")]
    lines += [ROW.format(k, n, m, f"{100 * (n - m) / n:.1f}" if n else "-") for k, (n, m) in rows.items()]
    return "\n".join(lines)


def main() -> int:
    """Runs pytest with the given arguments and prints the table."""
    for old in ROOT.glob(".coverage*"):
        old.unlink()
    run = subprocess.run(
        [sys.executable, "-m", "coverage", "run", "-m", "pytest", *sys.argv[1:]], cwd=ROOT, check=False
    )
    measured = coverage.Coverage(config_file=str(ROOT / "pyproject.toml"), data_file=str(ROOT / ".coverage"))
    measured.combine([str(ROOT)])
    measured.save()
    print(table(by_package(measured)))
    print("line by line: coverage report --show-missing, or coverage html")
    return run.returncode


if __name__ == "__main__":
    sys.exit(main())
