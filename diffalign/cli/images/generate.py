"""`diffalign generate`: images from a base or a tuned model."""

from __future__ import annotations

import argparse

from diffalign.cli.common import path_text, strength
from diffalign.cli.images.options import given_sampling, given_user, sampling_arguments
from diffalign.cli.next_steps import print_next, scorer_for


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Model, weights on it, and sampling."""
    parser.add_argument("model", type=path_text, help="diffusers folder, Hub id or single-file checkpoint")
    parser.add_argument("--tuned", type=path_text, help="LoRA file, full unet folder, or output_dir of a run")
    parser.add_argument(
        "--tuned-strength",
        type=strength,
        default=1.0,
        metavar="S",
        help="base + S · (tuned − base); for a LoRA the factor of its update (default: %(default)s)",
    )
    parser.add_argument(
        "--negative-tuned",
        type=path_text,
        metavar="PATH",
        help=("weights of guidance's unconditional branch, e.g. of a run with data.invert_preference (Diffusion-NPO)"),
    )
    sampling_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """Generates the images that are missing in the folder."""
    from diffalign.data.table.prompts import read_prompts
    from diffalign.evaluation.generate import generate
    from diffalign.evaluation.recipe import Tuned

    prompts = read_prompts(args.prompts, limit=args.limit)
    tuned = Tuned(args.tuned, args.negative_tuned, given_user(args), args.tuned_strength)
    images = generate(args.model, prompts, args.seeds, out_dir=args.out, tuned=tuned, sampling=given_sampling(args))
    print(f"{len(images)} image{'s' * (len(images) != 1)} in {args.out}")
    print_next(["score", str(args.out), "--scorer", scorer_for(args.model)])
