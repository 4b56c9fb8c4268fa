"""Times contenders in one process, turn by turn, and measures what the machine can reach in the same run.

Other processes share a CPU, and clocks drift. So turns of a few steps alternate (A B A B …), each turn gives a median,
and two contenders are compared by the median over rounds of the ratio of their turns.
"""

from __future__ import annotations

import itertools
import statistics
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch


@dataclass
class Timed:
    """Seconds of the timed steps of one contender, by turn; this process's CPU seconds; its peak memory in bytes."""

    turns: list[list[float]] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)  # of a step, the mean of each turn
    peak: int = 0

    @property
    def seconds(self) -> list[float]:
        """All timed steps."""
        return [s for turn in self.turns for s in turn]

    def summary(self) -> dict[str, float]:
        """Median and quartiles in milliseconds, and the number of steps."""
        low, mid, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        cpu = 1e3 * statistics.median(self.processor)
        times = {"median_ms": 1e3 * mid, "q1_ms": 1e3 * low, "q3_ms": 1e3 * high, "cpu_ms": cpu}
        return {**times, "steps": len(self.seconds)}


def take_turns(
    steps_of: Mapping[str, Callable[[], None]], *, warmup: int, steps: int, rounds: int, device: torch.device
) -> dict[str, Timed]:
    """`warmup` untimed steps of each contender, then `rounds` rounds of `steps` timed steps of each in turn."""
    for step in steps_of.values():
        for _ in range(warmup):
            step()
    timed = {name: Timed() for name in steps_of}
    for _ in range(rounds):
        for name, step in steps_of.items():
            with PeakMemory(device) as peak:
                begun = time.process_time()
                timed[name].turns.append(_seconds(step, steps, device))
                timed[name].processor.append((time.process_time() - begun) / steps)
            timed[name].peak = max(timed[name].peak, peak.bytes)
    return timed


def ratio(slow: Timed, fast: Timed) -> dict[str, float]:
    """How many times faster `fast` is: median over rounds of the turns' medians, with the smallest and the largest."""
    return _spread([statistics.median(a) / statistics.median(b) for a, b in zip(slow.turns, fast.turns, strict=True)])


def processor_ratio(slow: Timed, fast: Timed) -> dict[str, float]:
    """The same in CPU time, which other processes on the machine hardly change."""
    return _spread([a / b for a, b in zip(slow.processor, fast.processor, strict=True)])


def _spread(ratios: list[float]) -> dict[str, float]:
    return {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios), "rounds": len(ratios)}


def _seconds(step: Callable[[], None], steps: int, device: torch.device) -> list[float]:
    if device.type != "cuda":
        found = []
        for _ in range(steps):
            begun = time.perf_counter()
            step()
            found.append(time.perf_counter() - begun)
        return found
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    torch.cuda.synchronize()
    marks[0].record()
    for mark in marks[1:]:
        step()
        mark.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(marks)]


class PeakMemory:
    """Peak bytes within the block: CUDA's allocator, or the resident set of the whole process, sampled."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.bytes = device, 0
        self._stop = threading.Event()

    def __enter__(self) -> PeakMemory:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        else:
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated()
        else:
            self._stop.set()
            self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.02):
            self.bytes = max(self.bytes, resident())


def resident() -> int:
    """Resident bytes of this process; 0 where the system does not say."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * 4096 if statm.exists() else 0


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large square matmul of random numbers, the best of several."""
    n = 8192 if device.type == "cuda" else 1024
    a, b = torch.randn(n, n, device=device).to(dtype), torch.randn(n, n, device=device).to(dtype)
    return 2 * n**3 / min(_best(lambda: a @ b, device))


def copy_rate(device: torch.device) -> float:
    """Bytes read and written per second by a large copy, the best of several."""
    n = 2**28 if device.type == "cuda" else 2**25
    a, b = torch.randn(n, device=device), torch.empty(n, device=device)
    return 8 * n / min(_best(lambda: b.copy_(a), device))


def _best(call: Callable[[], Any], device: torch.device, times: int = 8) -> Sequence[float]:
    call()
    return _seconds(lambda: (call(), None)[1], times, device)


def kernels(step: Callable[[], None], device: torch.device, words: Sequence[str]) -> list[str]:
    """Names of the kernels of a step that contain one of some words, from the profiler; CUDA only, else nothing."""
    if device.type != "cuda":
        return []
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as found:
        step()
        torch.cuda.synchronize()
    names = {event.key for event in found.key_averages() if event.device_type.name == "CUDA"}
    return sorted(name for name in names if any(word in name.lower() for word in words))


def parts(step: Callable[[], None], device: torch.device) -> list[tuple[str, float]]:
    """A step's time by kind of operator, as shares of all: from the profiler, the largest first."""
    from torch.profiler import ProfilerActivity, profile

    on_cuda = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]) as found:
        step()
        if on_cuda:
            torch.cuda.synchronize()
    times: dict[str, float] = {}
    for event in found.key_averages():
        own = event.self_device_time_total if on_cuda else event.self_cpu_time_total
        kind = next((kind for kind, words in _KINDS if any(word in event.key.lower() for word in words)), "other")
        times[kind] = times.get(kind, 0.0) + own
    total = sum(times.values()) or 1.0
    return sorted(((kind, t / total) for kind, t in times.items()), key=lambda part: -part[1])


_KINDS = (
    ("attention", ("scaled_dot_product", "scaleddotproduct", "flash", "fmha", "sdpa")),
    ("convolution", ("conv", "implicit_gemm", "fprop", "dgrad", "wgrad")),
    ("matmul", ("addmm", "aten::mm", "aten::bmm", "gemm", "mmbackward", "cutlass", "nvjet")),
    ("norms", ("norm",)),
    ("pointwise", ("aten::mul", "aten::add", "silu", "gelu", "elementwise", "vectorized", "aten::div", "aten::sub")),
    ("copies and views", ("copy", "view", "reshape", "transpose", "aten::t", "as_strided", "empty", "clone", "cat")),
    ("optimiser", ("adam", "foreach", "optimizer")),
)
