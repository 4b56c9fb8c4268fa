"""What the commands with images share: arguments of sampling and of scorers, and what they stand for."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffalign.cli.common import (
    count,
    device,
    device_of,
    guidance,
    path,
    path_text,
    pixels,
    scorer,
    seeds,
    steps,
    tie,
    weighted_paths,
    whole,
)
from diffalign.errors import DiffalignError

if TYPE_CHECKING:
    from diffalign.evaluation.sampling import Sampling
    from diffalign.rewards import Scorer

log = logging.getLogger(__name__)

FOLDER_HELP = "folder of images with a manifest.jsonl, as written by `diffalign generate`"
SCHEDULERS = ("ddim", "euler", "dpmsolver")  # a test compares these with what the package knows
DTYPES = ("float32", "bfloat16", "float16")
PREDICTIONS = ("epsilon", "v_prediction", "sample")


def sampling_arguments(parser: argparse.ArgumentParser, defaults: Mapping[str, Any] | None = None) -> None:
    """Prompts, seeds, how images are sampled, for whom, and the output folder.

    defaults: by name of the option, of a command with a protocol of its own; prompts and out are otherwise required.
    """
    defaults = defaults or {}
    parser.add_argument(
        "--prompts",
        required="prompts" not in defaults,
        help="a set by name (`diffalign list prompts`), a .txt (one per line), .jsonl, .csv, .parquet, or one prompt",
    )
    parser.add_argument("--limit", type=count, help="use only this many prompts, from the start")
    parser.add_argument("--seeds", type=seeds, default="0", help="e.g. 7, 0-11 or 0,3,5 (default: %(default)s)")
    parser.add_argument("--steps", type=steps, default=30, help="sampling steps (default: %(default)s)")
    parser.add_argument(
        "--guidance", type=guidance, default=5.0, help="classifier-free guidance scale (default: %(default)s)"
    )
    parser.add_argument("--scheduler", choices=SCHEDULERS, default="ddim", help="sampler (default: %(default)s)")
    parser.add_argument("--resolution", type=pixels, help="pixels (default: the model's own)")
    parser.add_argument("--negative-prompt", default="", help="in place of the empty prompt in guidance")
    parser.add_argument("--batch", type=count, help="images per batch (default: by resolution)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the weights (default: %(default)s)")
    parser.add_argument("--device", type=device, help="default: cuda where there is one, else cpu")
    parser.add_argument("--vae", type=path_text, help="another VAE, e.g. an fp16-safe one")
    parser.add_argument(
        "--prediction-type", choices=PREDICTIONS, help=("override the prediction type of the scheduler config")
    )
    parser.add_argument(
        "--merge-lora",
        action="append",
        default=[],
        metavar="PATH=WEIGHT",
        help="a LoRA that is part of the base, as model.merge_lora in training; may be repeated",
    )
    parser.add_argument(
        "--scheduler-config",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override another setting of the scheduler config, e.g. timestep_spacing=trailing; may be repeated",
    )
    parser.add_argument(
        "--max-token-length",
        type=count,
        metavar="N",
        help="tokens of a prompt that count: 75, 150, 225, … (default: one chunk of 75)",
    )
    parser.add_argument(
        "--chunk-layout",
        choices=("kohya", "webui"),
        default="kohya",
        help="how the chunks of a long prompt are joined (default: %(default)s)",
    )
    parser.add_argument(
        "--clip-skip",
        type=whole(0, 100),
        default=0,
        metavar="N",
        help="last layers of the text encoders left out, as in diffusers: one less than A1111's number",
    )
    parser.add_argument(
        "--prompt-weights",
        choices=("literal", "refuse"),
        help="(word:1.2) in a prompt is plain text, or an error (default: plain text, with a warning)",
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
    parser.add_argument("--out", type=path, required="out" not in defaults, help="output folder")
    parser.set_defaults(**defaults)


def given_sampling(args: argparse.Namespace) -> Sampling:
    """How images are sampled; the log names runs that were trained in another way. Raises DiffalignError for a device
    that does not exist."""
    from diffalign.evaluation.sampling import Sampling

    sampling = Sampling(
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
        merge_lora=_merge_lora(args.merge_lora),
        scheduler_config=_scheduler_config(args.scheduler_config, args.prediction_type),
        max_token_length=args.max_token_length,
        chunk_layout=args.chunk_layout,
        clip_skip=args.clip_skip,
        prompt_weights=args.prompt_weights,
    )
    tuned = getattr(args, "tuned", None) or []
    for run in [tuned] if isinstance(tuned, str) else [text.partition("=")[2] for text in tuned]:
        _name_differences(run, sampling)
    return sampling


def _name_differences(run: str, sampling: Sampling) -> None:
    """Logs which settings of a run's model its images would not have."""
    from diffalign.cli.training.train import sampled_as
    from diffalign.config.schema import Config, load_config

    file = Path(run) / "config.yaml"
    config = load_config(file) if file.is_file() else None
    if not isinstance(config, Config):
        return
    model = config.model
    trained = {
        "prediction_type": model.prediction_type,
        "scheduler": None if model.scheduler is None else model.scheduler.given,
        "merge_lora": model.merge_lora or None,
        **dict.fromkeys(sampling.text.recorded),
        **model.text.recorded,
    }
    here = {
        "prediction_type": sampling.prediction_type,
        "scheduler": sampling.scheduler_config,
        "merge_lora": sampling.merge_lora,
        **dict.fromkeys(model.text.recorded),
        **sampling.text.recorded,
    }
    if different := [name for name, value in trained.items() if here[name] != value]:
        log.warning(
            "%s was trained with another %s than these images have; its own options are: %s",
            *(run, ", ".join(different), " ".join(sampled_as(config)) or "none"),
        )


def _merge_lora(texts: Sequence[str]) -> dict[str, float] | None:
    """The LoRAs of `--merge-lora` with their weights. Raises DiffalignError for one that is given twice."""
    pairs = weighted_paths(texts)
    if twice := [path for path, _ in pairs if [other for other, _ in pairs].count(path) > 1]:
        raise DiffalignError(f"--merge-lora {twice[0]} is given twice; give it once, with the sum of its weights")
    return dict(pairs) or None


def _scheduler_config(texts: Sequence[str], prediction_type: str | None) -> dict[str, Any] | None:
    """The settings of `--scheduler-config`. Raises DiffalignError for keys and values that do not exist."""
    from diffalign.config.overrides import override
    from diffalign.config.scheduler_section import SchedulerSection
    from diffalign.config.schema import settings_of

    tree: dict[str, Any] = {}
    override(tree, texts)
    given = settings_of(SchedulerSection, tree, "--scheduler-config").given
    if prediction_type is not None and "prediction_type" in given:
        raise DiffalignError("--prediction-type and --scheduler-config prediction_type=… are both given; give one")
    return given or None


def given_user(args: argparse.Namespace) -> list[float] | None:
    """The embedding of the user for whom images are generated: one of the file, or some of them averaged."""
    from diffalign.data.table.users import open_users, parse_mixture

    if bool(args.users) != bool(args.user):
        raise DiffalignError("--users FILE and --user ID belong together: a file of embeddings, and an id in it")
    return open_users(args.users).mixed(parse_mixture(args.user)).tolist() if args.users else None


def scorer_arguments(parser: argparse.ArgumentParser, how_many: str, unless: str = "") -> None:
    """The scorers and their device. unless: the flag without which a scorer is needed; the command checks that."""
    more = f"; not with {unless}" if unless else ""
    parser.add_argument(
        "--scorer",
        type=scorer,
        action="append",
        required=not unless,
        help=f"`diffalign list scorers`; {how_many}{more}",
    )
    parser.add_argument("--device", type=device, help="default: cuda where there is one, else cpu")


def load_scorers(names: Sequence[str], device: str | None) -> list[Scorer]:
    """The named scorers on the given device. Raises ScorerError, and DiffalignError for the device."""
    from diffalign.rewards import load_scorer

    return [load_scorer(name, device_of(device)) for name in names]


def judging_arguments(parser: argparse.ArgumentParser) -> None:
    """What `evaluate` and `compare` measure beside the scorers."""
    parser.add_argument("--faithfulness", type=scorer, help="scorer that measures faithfulness to the prompt")
    parser.add_argument("--tie", type=tie, help="|dR| below this is a tie (default: the scorer's own)")
