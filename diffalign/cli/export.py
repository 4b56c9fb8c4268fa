"""`diffalign export`: tuned weights as files for other programs."""

from __future__ import annotations

import argparse

from diffalign.cli.common import overwrite_argument, path, path_text

# where the programs look for such a file, from their own root
LORA_FOLDERS = {
    "ComfyUI": "models/loras (node: Load LoRA)",
    "A1111, Forge": "models/Lora (prompt: <lora:NAME:1>)",
}
CHECKPOINT_FOLDERS = {
    "ComfyUI": "models/checkpoints (node: Load Checkpoint)",
    "A1111, Forge": "models/Stable-diffusion",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Run, target, file and base."""
    parser.add_argument(
        "tuned",
        type=path_text,
        metavar="RUN",
        help="output_dir of a run, a checkpoint in it, a LoRA file or a unet folder",
    )
    parser.add_argument(
        "--to", required=True, choices=("kohya", "single-file"), help=("a LoRA with kohya's keys, or a full checkpoint")
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
        help=("dtype of the file (default: fp32 for kohya, fp16 for single-file)"),
    )
    overwrite_argument(parser)


def run(args: argparse.Namespace) -> None:
    """Runs the command. Raises ValueError for weights that cannot be exported in this format."""
    from diffalign.export.kohya import export_kohya
    from diffalign.export.single_file import export_single_file

    write, dtype = (export_kohya, "fp32") if args.to == "kohya" else (export_single_file, "fp16")
    dtype = args.dtype or dtype
    written = write(args.tuned, args.out, base=args.base, dtype=dtype, overwrite=args.overwrite)
    what = "a LoRA in kohya's layout" if args.to == "kohya" else "UNet, VAE and text encoders in one file"
    print(f"{written}: {what}, {dtype}, {written.stat().st_size / 2**20:.1f} MiB")
    folders = LORA_FOLDERS if args.to == "kohya" else CHECKPOINT_FOLDERS
    for program, folder in folders.items():
        print(f"  {program}: copy it to {folder}")
