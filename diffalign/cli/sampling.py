"""`diffalign generate | evaluate`: images from a model, and a comparison with its base on the same seeds."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import TYPE_CHECKING

from diffalign.cli.common import (
    count,
    device,
    device_of,
    guidance,
    named,
    path,
    path_text,
    pixels,
    scorer,
    seeds,
    steps,
    tie,
)
from diffalign.errors import DiffalignError

if TYPE_CHECKING:
    from diffalign.evaluation.recipe import Tuned
    from diffalign.evaluation.sampling import Sampling

SCHEDULERS = ("ddim", "euler", "dpmsolver")  # a test compares these with what the rooms know
DTYPES = ("float32", "bfloat16", "float16")
PREDICTIONS = ("epsilon", "v_prediction", "sample")


def _sampling_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--prompts", required=True, help=(".txt (one per line), .jsonl, .csv, .parquet, or one prompt itself")
    )
    parser.add_argument("--limit", type=count, help="use only this many prompts, from the start")
    parser.add_argument("--seeds", type=seeds, default="0", help="e.g. 7, 0-11 or 0,3,5 (default: %(default)s)")
    parser.add_argument("--steps", type=steps, default=30)
    parser.add_argument("--guidance", type=guidance, default=5.0, help="classifier-free guidance scale")
    parser.add_argument("--scheduler", choices=SCHEDULERS, default="ddim")
    parser.add_argument("--resolution", type=pixels, help="pixels (default: the model's own)")
    parser.add_argument("--negative-prompt", default="")
    parser.add_argument("--batch", type=count, help="images per batch (default: by resolution)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--device", type=device, help="default: cuda where there is one, else cpu")
    parser.add_argument("--vae", type=path_text, help="another VAE, e.g. an fp16-safe one")
    parser.add_argument(
        "--prediction-type", choices=PREDICTIONS, help=("override the prediction type of the scheduler config")
    )
    parser.add_argument(
        "--users", type=path_text, help=("file of user embeddings (.json, .parquet, .safetensors), for --user")
    )
    parser.add_argument(
        "--user",
        action="append",
        metavar="ID[=WEIGHT]",
        help="the user to generate for, with weights that were tuned for users; several users are averaged",
    )
    parser.add_argument("--out", type=path, required=True, help="output folder")


def _sampling(args: argparse.Namespace) -> Sampling:
    from diffalign.evaluation.sampling import Sampling

    return Sampling(
        num_inference_steps=args.steps,
        guidance_scale=args.guidance,
        scheduler=args.scheduler,
        resolution=args.resolution,
        negative_prompt=args.negative_prompt,
        batch_size=args.batch,
        dtype=args.dtype,
        device=device_of(args.device),
        vae=args.vae,
        prediction_type=args.prediction_type,
    )


def _user(args: argparse.Namespace) -> list[float] | None:
    """The embedding of whom pictures are for: a user of the file, or some of them averaged."""
    from diffalign.data.table.users import open_users, parse_mixture

    if bool(args.users) != bool(args.user):
        raise DiffalignError("--users FILE and --user ID belong together: a file of embeddings, and an id in it")
    return open_users(args.users).mixed(parse_mixture(args.user)).tolist() if args.users else None


def generate_arguments(parser: argparse.ArgumentParser) -> None:
    """Model, weights on it, and sampling."""
    parser.add_argument("model", type=path_text, help="diffusers folder, Hub id or single-file checkpoint")
    parser.add_argument("--tuned", type=path_text, help="LoRA file, full unet folder, or output_dir of a run")
    parser.add_argument(
        "--negative-tuned",
        type=path_text,
        metavar="PATH",
        help=("weights of guidance's unconditional branch, e.g. of a run with data.invert_preference (Diffusion-NPO)"),
    )
    _sampling_arguments(parser)


def generate(args: argparse.Namespace) -> None:
    """Makes the pictures."""
    from diffalign.data.table.prompts import read_prompts
    from diffalign.evaluation.generate import generate as generate_images
    from diffalign.evaluation.recipe import Tuned

    prompts = read_prompts(args.prompts, limit=args.limit)
    tuned = Tuned(args.tuned, args.negative_tuned, _user(args))
    images = generate_images(args.model, prompts, args.seeds, out_dir=args.out, tuned=tuned, sampling=_sampling(args))
    print(f"{len(images)} images in {args.out}")


def evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    """Base, tuned models by name, scorers, and sampling."""
    parser.add_argument(
        "base", type=path_text, help=("the base that the tuned models were tuned from: folder, Hub id or single file")
    )
    parser.add_argument(
        "--tuned",
        action="append",
        default=[],
        metavar="NAME=PATH",
        help="a tuned model; give the same NAME again for runs that differ in their seed",
    )
    parser.add_argument(
        "--negative-tuned",
        action="append",
        default=[],
        metavar="NAME=PATH",
        help=("weights of the unconditional branch for NAME; without --tuned NAME=… the other branch uses the base"),
    )
    parser.add_argument(
        "--scorer", type=scorer, action="append", required=True, help="`diffalign list scorers`; may be repeated"
    )
    parser.add_argument("--faithfulness", type=scorer, help=("scorer that measures faithfulness to the prompt"))
    parser.add_argument("--tie", type=tie, help="|dR| below this is a tie (default: the scorer's own)")
    _sampling_arguments(parser)


def evaluate(args: argparse.Namespace) -> None:
    """Generates the images, scores them and prints the table."""
    from diffalign.data.table.prompts import read_prompts
    from diffalign.evaluation.evaluate import evaluate as compare_models
    from diffalign.evaluation.scoring import Scoring

    if not args.tuned and not args.negative_tuned:
        raise DiffalignError("nothing to compare with the base: give --tuned NAME=PATH, e.g. --tuned dpo=runs/dpo")
    models = _models(named(args.tuned, "--tuned"), named(args.negative_tuned, "--negative-tuned"), _user(args))
    result = compare_models(
        args.base,
        models,
        read_prompts(args.prompts, limit=args.limit),
        args.seeds,
        scorers=Scoring(args.scorer, args.faithfulness, args.tie),
        out_dir=args.out,
        sampling=_sampling(args),
    )
    print(result.table())
    print(f"{args.out}: result.json, table.txt, scores.jsonl, grid.png, images/")


def _models(
    tuned: Mapping[str, list[str]], negative: Mapping[str, list[str]], user: list[float] | None
) -> dict[str, list[Tuned]]:
    """The weights of every run by the model's name; a name without --tuned is the base with a negative branch.

    Raises DiffalignError where a name has several of both and their numbers differ.
    """
    from diffalign.evaluation.recipe import Tuned

    models = {}
    for name in dict.fromkeys((*tuned, *negative)):
        paths: list[str | None] = [*tuned.get(name, [])] or [None]
        away: list[str | None] = [*negative.get(name, [])] or [None]
        if len(paths) != len(away) and len(paths) > 1 < len(away):
            raise DiffalignError(
                f"'{name}' has {len(paths)} tuned weights and {len(away)} negative ones; give one negative for all "
                "runs, or one for each"
            )
        count = max(len(paths), len(away))
        runs = zip(paths * (count // len(paths)), away * (count // len(away)), strict=True)
        models[name] = [Tuned(path, other, user if path else None) for path, other in runs]
    return models
