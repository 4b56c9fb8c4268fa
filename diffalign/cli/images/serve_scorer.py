"""`diffalign serve-scorer`: a scorer for other processes and machines, behind a port of this one."""

from __future__ import annotations

import argparse
from functools import partial

from diffalign.cli.common import device, device_of, scorer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The scorer, its port and device."""
    parser.add_argument(
        "scorer", type=scorer, metavar="SCORER", help="`diffalign list scorers`, NAME=PATH, or module:Class"
    )
    parser.add_argument(
        "--port", type=_port, default=8765, help="on 127.0.0.1; 0 takes a free one (default: %(default)s)"
    )
    parser.add_argument("--device", type=device, help="default: cuda where there is one, else cpu")


def run(args: argparse.Namespace) -> None:
    """Takes the port, loads the scorer and serves it until Ctrl-C."""
    from diffalign.rewards import load_scorer
    from diffalign.rewards.remote.server import ScorerServer
    from diffalign.rewards.table import SCORERS

    entry = SCORERS.get(args.scorer.partition("=")[0])
    load = partial(load_scorer, args.scorer, device_of(args.device))
    with ScorerServer(load, args.port, entry.score if entry else "") as server:
        port = server.server_address[1]
        print(f"{server.scorer.name} at http://127.0.0.1:{port}; Ctrl-C ends it", flush=True)
        print(f"on this machine       --scorer remote=http://127.0.0.1:{port}")
        print(f"from another machine  ssh -L {port}:127.0.0.1:{port} THIS_MACHINE, and the same", flush=True)
        server.serve_forever()


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is no port; give a number from 0 to 65535")
    return int(text)
