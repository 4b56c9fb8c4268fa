"""Compiles the Triton kernels for a GPU that is not present and prints the resources they use; run as a script.

    python -m tests.models.aot                  # all of them: two minutes on one core
    python -m tests.models.aot 90:bf16 80:fp32

One JSON line for each kernel, dtype and architecture, at the tiles that SDXL's shapes give: registers and bytes of
local memory (spills) of a thread, and for kernels over tiles of the image the widest loads and stores of global memory
in bits. Needs triton, and TRITON_INTERPRET unset.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ARCHITECTURES = (80, 90)
DTYPES = ("bf16", "fp16", "fp32")
TILE_ROWS = (32, 64, 128)  # of images of up to 32² places, 64², and above
WIDTHS = (16, 32, 64, 128)  # the powers of two around 10 to 80 channels of a group
FLOATS = {"mean", "rstd", "partial", "sums", "terms", "weight", "bias"}  # float32 whatever the activations are
EVEN = {"places", "channels", "inner", "rows"}  # multiples of 16 in SDXL, which Triton's launcher sees and uses


def variants(dtype: str) -> Iterator[tuple[Any, dict[str, str], dict[str, Any], int]]:
    """(kernel, types of its arguments, constants, warps) as the launchers call them."""
    from diffalign.experimental import triton_geglu, triton_norm

    def types(kernel: Any, constants: dict[str, Any]) -> dict[str, str]:
        def kind(name: str) -> str:
            if name in constants:
                return "constexpr"
            if name in FLOATS:
                return "*fp32"
            if name in ("x", "out", "grad", "projected"):
                return f"*{dtype}"
            return "fp32" if name == "eps" else "i32"

        return {name: kind(name) for name in kernel.arg_names}

    for kernel in (triton_norm.moments, triton_norm.apply, triton_norm.slopes, triton_norm.input_slope):
        two = "grad" in kernel.arg_names
        values = triton_norm.BACKWARD_VALUES if two else triton_norm.FORWARD_VALUES
        for rows in TILE_ROWS:
            constants = {"ROWS": rows, "BLOCK": triton_norm.CHANNELS}
            if "SILU" in kernel.arg_names:
                constants["SILU"] = True
            yield kernel, types(kernel, constants), constants, triton_norm.warps_of(rows, triton_norm.CHANNELS, values)
    for kernel in (triton_norm.statistics, triton_norm.group_slopes):
        for width in WIDTHS:
            constants = {"COUNT": 128, "TILES": triton_norm.tiles_of(width), "WIDTH": width}
            if "ROWS" in kernel.arg_names:
                constants["ROWS"] = 128
            yield kernel, types(kernel, constants), constants, triton_norm.GROUP_WARPS
    for kernel in (triton_geglu.geglu, triton_geglu.geglu_slope):
        constants = {"ROWS": triton_geglu.ROWS, "BLOCK": triton_geglu.BLOCK}
        yield kernel, types(kernel, constants), constants, triton_geglu.WARPS


def resources(cubin: bytes, accesses: bool) -> dict[str, int]:
    """Registers and local bytes (which every spill takes) of a compiled kernel, by the tools that come with triton.

    With `accesses`, also its spilling instructions and widest global accesses, which need half a second of disassembly.
    """
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    disassembler = tool.with_name("nvdisasm")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        used = subprocess.run([tool, "-res-usage", path], capture_output=True, text=True, check=True).stdout
        found = {key: int(re.findall(rf"\b{key}:(\d+)", used)[-1]) for key in ("REG", "STACK", "LOCAL")}
        taken = {"registers": found["REG"], "local_bytes": found["STACK"] + found["LOCAL"]}
        if not accesses:
            return taken
        code = subprocess.run([disassembler, "-c", path], capture_output=True, text=True, check=True).stdout

    def widest(name: str) -> int:
        return max(
            (int(bits or 32) for bits in re.findall(rf"\b{name}\.E(?:\.[A-Z_]+)*?(?:\.(64|128))?\b", code)), default=0
        )

    spills = len(re.findall(r"\b(?:LDL|STL)\b", code))
    return {**taken, "spills": spills, "load_bits": widest("LDG"), "store_bits": widest("STG")}


def main() -> None:
    """Compiles all."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    wanted = [argument.split(":") for argument in sys.argv[1:]]
    for architecture in ARCHITECTURES:
        for dtype in DTYPES:
            if wanted and [str(architecture), dtype] not in wanted:
                continue
            for kernel, signature, constants, warps in variants(dtype):
                attrs = {
                    (i,): [["tt.divisibility", 16]]
                    for i, (name, kind) in enumerate(signature.items())
                    if kind.startswith("*") or name in EVEN
                }
                source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attrs)
                target = GPUTarget("cuda", architecture, 32)
                compiled = triton.compile(source, target=target, options={"num_warps": warps})
                found = {"kernel": kernel.__name__, "dtype": dtype, "sm": architecture, "warps": warps, **constants}
                print(json.dumps({**found, **resources(compiled.asm["cubin"], "WIDTH" not in constants)}), flush=True)


if __name__ == "__main__":
    main()
