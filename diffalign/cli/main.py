"""The entry point of the command line: parses the command, runs it, and turns errors into messages and exit status.

diffalign train CONFIG [key.sub=value ...]       also: accelerate launch -m diffalign train CONFIG ...
                                                 also: torchrun --nproc-per-node 2 -m diffalign train CONFIG ...
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
import traceback
from collections.abc import Sequence
from contextlib import suppress

from diffalign.cli.commands import make_parser
from diffalign.cli.terminal import guarded, quiet_libraries, write_styled
from diffalign.errors import BUG, Interrupted, explain, printable
from diffalign.training.processes import one_process

SEVERAL_PROCESSES = ("train", "check", "encode")  # commands that share their work among launched processes
TERMINATING = (signal.SIGTERM, *([signal.SIGUSR1] if hasattr(signal, "SIGUSR1") else []))  # SLURM's warning


def main(argv: Sequence[str] | None = None) -> None:
    """Runs one command. Exit status 2: an error that the user can correct, in one message. 1: a bug, with its
    traceback. 128 + n: ended by signal n (130: SIGINT, 138: SIGUSR1, 143: SIGTERM)."""
    with guarded():
        _run(sys.argv[1:] if argv is None else list(argv))


def parse(words: Sequence[str]) -> argparse.Namespace:
    """The arguments of a command line; ends the process with the command's usage where they are wrong."""
    name = next((word for word in words if not word.startswith("-")), "")
    args, unknown = make_parser(only=name).parse_known_args(words)
    if unknown:  # argparse's own message shows the usage of no command
        args.error(f"unrecognized arguments: {' '.join(unknown)}")
    return args


def _run(words: Sequence[str]) -> None:
    args = parse(words)
    quiet_libraries()
    main_thread = threading.current_thread() is threading.main_thread()  # only this thread may set signal handlers
    before = {signum: signal.signal(signum, _terminated) for signum in TERMINATING} if main_thread else {}
    try:
        if args.command not in SEVERAL_PROCESSES:
            one_process(args.command)
        args.run(args)
    except KeyboardInterrupt as stop:
        reason, signum = printable(str(stop)) or "interrupted", getattr(stop, "signum", signal.SIGINT)
        if os.environ.get("RANK", "0") == "0":  # the others stop for the same reason
            print(f"diffalign {args.command}: {reason}", file=sys.stderr)
        sys.exit(128 + signum)
    except BrokenPipeError:  # the reader of our output has ended, as `head` does
        # nothing more can be written, and Python's own flush at exit would raise again
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except Exception as error:
        message = explain(error)
        if message is None or os.environ.get("DIFFALIGN_TRACEBACK"):
            traceback.print_exc()
        if message is None:
            write_styled(f"\ndiffalign {args.command}:", "error", sys.stderr)
            print(f" {BUG}", file=sys.stderr)
            sys.exit(1)
        write_styled(f"diffalign {args.command}:", "error", sys.stderr)
        print(f" {message}", file=sys.stderr)
        sys.exit(2)
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _terminated(signum: int, _: object) -> None:
    """These signals end a command as SIGINT does: partial files are removed and locks released."""
    raise Interrupted(signum, "terminated")
