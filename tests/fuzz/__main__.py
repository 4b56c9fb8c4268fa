"""The command line of `tests.fuzz`."""

from __future__ import annotations

import argparse
import os
import sys
from tempfile import mkdtemp

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "XDG_CACHE_HOME": mkdtemp(prefix="diffalign-fuzz-")}

import torch

from tests.fuzz.harness import one, run
from tests.fuzz.suite import KINDS, sized


def main() -> int:
    """Runs the kinds, or one case again; exit status 1 where a fault was found."""
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz")
    parser.add_argument("--n", type=int, default=1500, help="cases of all kinds together (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", choices=KINDS, nargs="+", default=list(KINDS), help="these alone")
    parser.add_argument("--again", nargs=3, metavar=("KIND", "SEED", "NUMBER"), help="one case, with its traceback")
    args = parser.parse_args()
    if args.again:
        kind, seed, number = args.again
        print(one(kind, KINDS[kind][0], int(seed), int(number)))
        return 0
    report = run(sized(args.n, args.kind), args.seed)
    print(report.text())
    return int(bool(report.faults))


if __name__ == "__main__":
    sys.exit(main())
