"""`diffalign export`: tuned weights as files for other programs."""

from __future__ import annotations

import argparse

from diffalign.cli.common import count, number, overwrite_argument, path, path_text
from diffalign.errors import DiffalignError

# where the programs look for such a file, from their own root
LORA_FOLDERS = {
    "ComfyUI": "models/loras (node: Load LoRA)",
    "A1111, Forge": "models/Lora (prompt: <lora:NAME:1>)",
}
CHECKPOINT_FOLDERS = {
    "ComfyUI": "models/checkpoints (node: Load Checkpoint)",
    "A1111, Forge": "models/Stable-diffusion",
}

WHOLE = "UNet, VAE and text encoders in one file"
DTYPE = {"kohya": "fp32", "diffusers": "fp32", "single-file": "fp16"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Run, target, file and base."""
    parser.add_argument(
        "tuned",
        type=path_text,
        metavar="RUN",
        help="output_dir of a run, a checkpoint in it, a LoRA file or a unet folder",
    )
    parser.add_argument(
        "--to",
        required=True,
        choices=("kohya", "diffusers", "single-file"),
        help="a LoRA with kohya's or (with --extract-…) diffusers' keys, or a full checkpoint",
    )
    parser.add_argument(
        "--extract-rank",
        type=count,
        metavar="N",
        help="approximate a full tune by a LoRA: rank N a layer (64 is usual), or less where a layer changed less",
    )
    parser.add_argument(
        "--extract-energy",
        type=number(0, 1, above=True),
        metavar="SHARE",
        help="approximate a full tune by a LoRA: the ranks that keep this share of each layer's squared change",
    )
    parser.add_argument("--out", type=path, required=True, help="file to write, ending in .safetensors")
    parser.add_argument(
        "--base",
        type=path_text,
        help=("the base it was tuned from: folder, Hub id or single file (default: the base of the run)"),
    )
    parser.add_argument(
        "--dtype",
        choices=("fp16", "bf16", "fp32"),
        help=("dtype of the file (default: fp32 for a LoRA, fp16 for single-file)"),
    )
    overwrite_argument(parser)


def run(args: argparse.Namespace) -> None:
    """Runs the command. Raises ValueError for weights that cannot be exported in this format."""
    report = None
    if args.extract_rank is not None or args.extract_energy is not None:
        report = _extract(args)
    elif args.to == "diffusers":
        raise DiffalignError(
            f"--to diffusers writes a LoRA that is extracted (--extract-rank, --extract-energy); the LoRA of a run has "
            f"diffusers' layout already: load_lora_weights({args.tuned!r})"
        )
    else:
        _export(args)
    what = {"kohya": "a LoRA in kohya's layout", "diffusers": "a LoRA in diffusers' layout"}.get(args.to, WHOLE)
    dtype = args.dtype or DTYPE[args.to]
    card = args.out.with_suffix(".md")
    print(f"{args.out}: {what}, {dtype}, {args.out.stat().st_size / 2**20:.1f} MiB; its card: {card.name}")
    if report is not None:
        print(report)
    if args.to == "diffusers":
        print(f'  diffusers: pipeline.load_lora_weights("{args.out.parent}", weight_name="{args.out.name}")')
    folders = {"kohya": LORA_FOLDERS, "single-file": CHECKPOINT_FOLDERS}.get(args.to, {})
    for program, folder in folders.items():
        print(f"  {program}: copy it to {folder.replace('NAME', args.out.stem)}")
    if "\n\nNot measured" in card.read_text(encoding="utf-8"):
        print(f"  the card has no evaluation: `diffalign card {args.tuned}` says where one is looked for")


def _export(args: argparse.Namespace) -> None:
    from diffalign.export.kohya import export_kohya
    from diffalign.export.single_file import export_single_file

    write = export_kohya if args.to == "kohya" else export_single_file
    dtype = args.dtype or DTYPE[args.to]
    write(args.tuned, args.out, base=args.base, dtype=dtype, overwrite=args.overwrite)


def _extract(args: argparse.Namespace) -> str:
    from diffalign.export.extract import Extraction, extract_lora

    if args.to == "single-file":
        raise DiffalignError("--to single-file holds a full tune whole; --extract-… belongs to --to kohya or diffusers")
    how = Extraction(args.extract_rank, args.extract_energy, args.to, args.dtype or DTYPE[args.to])
    report = extract_lora(args.tuned, args.out, how, base=args.base, overwrite=args.overwrite)
    return f"{report.summary()}\nerrors of every layer: {args.out.with_suffix('.extraction.json')}"
