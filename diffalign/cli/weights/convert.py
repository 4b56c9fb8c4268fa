"""`diffalign convert`: pickled weights as safetensors, without running what a pickle names."""

from __future__ import annotations

import argparse
from pathlib import Path

from diffalign.cli.common import overwrite_argument, path, path_text
from diffalign.cli.next_steps import print_next
from diffalign.errors import DiffalignError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Source, output, and what the weights are."""
    parser.add_argument(
        "source",
        type=path_text,
        help="a .bin, .ckpt, .pt or .pth file, a model's folder with such files, or OWNER/NAME::FILE on the Hub",
    )
    parser.add_argument(
        "--out",
        type=path,
        required=True,
        help="the .safetensors file to write; a folder where SOURCE is one, or with --base",
    )
    parser.add_argument(
        "--base", type=path_text, help="SOURCE is a UNet tuned from this model: write OUT/unet, as --tuned takes it"
    )
    parser.add_argument("--key", help="the entry of the file that has the weights, where there are several")
    overwrite_argument(parser)


def run(args: argparse.Namespace) -> None:
    """Writes the weights and says what was left out. Raises ModelError for a file without weights."""
    from diffalign.models.convert import convert_file, convert_folder, convert_unet, refuse_existing

    is_folder = Path(args.source).is_dir()
    if is_folder and (args.base or args.key):
        raise DiffalignError(f"{args.source} is a folder; --base and --key are for one file")
    refuse_existing(args.out / "unet" if args.base else args.out, overwrite=args.overwrite)
    if is_folder:
        done = convert_folder(Path(args.source), args.out)
    elif args.base:
        done = convert_unet(args.source, args.out, args.base, args.key)
    else:
        done = convert_file(args.source, args.out, args.key)
    for each in done.left_out:
        print(f"left out: {each}")
    print(f"{done.path}: {done.tensors} tensor{'s' * (done.tensors != 1)}")
    if args.base:
        print_next(["generate", args.base, "--tuned", str(args.out), "--prompts", "prompts.txt", "--out", "images"])
