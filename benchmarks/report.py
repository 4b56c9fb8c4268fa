"""Measurements as a JSON file and a Markdown table, each row with its share of what the machine can reach."""

from __future__ import annotations

import json
import platform
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from diffalign.training.run import environment

DATASHEET = {"H100": 989e12, "H200": 989e12}  # dense bf16 FLOP/s by a word of the device's name


@dataclass(frozen=True)
class Machine:
    """What the device did at best in this run."""

    matmul: float  # FLOP/s, in the precision that the steps compute in
    copy: float  # bytes per second, read and written


@dataclass
class Row:
    """One contender or one rung."""

    name: str
    pairs: int  # of a step
    median_ms: float  # a step
    q1_ms: float
    q3_ms: float
    cpu_ms: float  # CPU time of a step
    steps: int
    peak_bytes: int
    useful_flops: int  # of a pair
    floor_bytes: int  # of a step
    before_seconds: float = 0.0  # before the clock starts: loading, encoding, asking the reference
    settings: dict[str, Any] = field(default_factory=dict)
    largest_part: str = ""
    kernels: list[str] = field(default_factory=list)
    predicted_ms: float | None = None  # a pair, SDXL 1024 px on an H100

    @property
    def pairs_per_second(self) -> float:
        """From the median step."""
        return 1e3 * self.pairs / self.median_ms


def roofline(row: Row, machine: Machine) -> tuple[float, str]:
    """The least milliseconds of a step on this machine, and by what."""
    by = {"FLOPs": row.pairs * row.useful_flops / machine.matmul, "bytes": row.floor_bytes / machine.copy}
    what = max(by, key=lambda name: by[name])
    return 1e3 * by[what], what


def table(rows: list[Row], machine: Machine) -> str:
    """The rows as Markdown."""
    head = (
        "row",
        "pairs",
        "ms/pair",
        "quartiles",
        "CPU ms/pair",
        "pairs/s",
        "peak GiB",
        "TFLOP/s",
        "MFU",
        "floor ms/pair",
        "before, s",
        "largest part",
    )
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for row in rows:
        floor, what = roofline(row, machine)
        rate = row.useful_flops * row.pairs_per_second
        cells = (
            row.name,
            str(row.pairs),
            f"{row.median_ms / row.pairs:.1f}"
            + ("" if row.predicted_ms is None else f" (H100: {row.predicted_ms:.0f} predicted)"),
            f"{row.q1_ms / row.pairs:.1f} to {row.q3_ms / row.pairs:.1f}, {row.steps} steps",
            f"{row.cpu_ms / row.pairs:.1f}",
            f"{row.pairs_per_second:.2f}",
            f"{row.peak_bytes / 2**30:.2f}",
            f"{rate / 1e12:.3g}",
            f"{rate / machine.matmul:.0%}",
            f"{floor / row.pairs:.1f} ({what}), gap {row.median_ms / floor:.1f}x",
            f"{row.before_seconds:.1f}",
            row.largest_part,
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def write(
    out: Path, title: str, rows: list[Row], ratios: dict[str, Any], machine: Machine, facts: dict[str, Any]
) -> str:
    """OUT.json and OUT.md; returns the text of the latter."""
    device = facts["device"]
    sheet = next((rate for word, rate in DATASHEET.items() if word in device), None)
    content = {
        "command": " ".join(["python -m benchmarks.step", *sys.argv[1:]]),
        **facts,
        "threads": torch.get_num_threads(),
        "processor": platform.processor() or platform.machine(),
        "environment": environment(),
        "machine": {**asdict(machine), "datasheet": sheet},
        "ratios": ratios,
        "rows": [
            {**asdict(row), "pairs_per_second": row.pairs_per_second, "floor_ms": roofline(row, machine)[0]}
            for row in rows
        ],
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".json").write_text(json.dumps(content, indent=2) + "\n")
    lines = [
        f"# {title}",
        "",
        f"    {content['command']}",
        "",
        f"{device}, {content['threads']} thread(s); matmul {machine.matmul / 1e12:.3g} TFLOP/s, copy "
        f"{machine.copy / 1e9:.3g} GB/s, both measured in the same process. "
        f"Commit {content['environment']['git_commit']}.",
        "",
        table(rows, machine),
        *(
            f"- {name}: **{r['median']:.2f}x** the pairs per second (median of {r['rounds']} rounds, {r['min']:.2f} to "
            f"{r['max']:.2f})"
            for name, r in ratios.items()
        ),
        "",
        "TFLOP/s and MFU count useful work alone (no recomputation, no encoding, no reference where its errors are "
        "kept); MFU is against the matmul above. "
        "The floor is what useful FLOPs or the least bytes would take at these rates, whichever is more; the gap is "
        "the measured step over it. Before: loading, and where a row reads caches, making them; not in any ratio.",
    ]
    kernels = {row.name: row.kernels for row in rows if row.kernels}
    lines += [f"- attention kernels of {name}: {', '.join(found)}" for name, found in kernels.items()]
    text = "\n".join(lines).rstrip() + "\n"
    out.with_suffix(".md").write_text(text)
    return text
