"""`diffalign init`: write a commented config from four answers: base, pairs, card, goal.

Answers that are not given as options are asked for on a terminal. Batch sizes for SDXL are those of the packaged
configs in `training_configs/sdxl/memory`, whose memory is counted; those for SD are estimates.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import textwrap
from dataclasses import dataclass, replace
from pathlib import Path

from diffalign.cli.common import overwrite_argument, path, path_text, writable
from diffalign.cli.next_steps import print_next
from diffalign.cli.training.length import Length, count_pairs, enough, length_for
from diffalign.errors import DiffalignError, MissingFileError, printable
from diffalign.io.files import written_whole
from diffalign.io.hub import is_hub_id
from diffalign.io.paths import expanded

GOALS = {
    "lora": "a LoRA by Diffusion-DPO: the least memory, a small file for ComfyUI and A1111",
    "full": "all weights by Diffusion-DPO: SDXL needs a card of 24 GB",
    "noisy-labels": "a LoRA by conservative DPO, for pairs whose labels are often wrong",
    "winners": "a LoRA by fine-tuning on the chosen images alone (SFT)",
}
CARDS = {
    "cpu": "no GPU: for the embedded world and other tiny models",
    **{size: f"{size} GB" for size in ("6", "8", "12", "16", "24", "40", "80")},
}
FAMILIES = ("sd", "sdxl")
QUESTIONS = {
    "base": "Base model (Hub id, diffusers folder or .safetensors file)",
    "pairs": "Preference pairs (file, folder or Hub id)",
    "card": "Memory of the GPU",
    "goal": "What do you want?",
}


@dataclass(frozen=True)
class Fit:
    """How a step fits a card."""

    batch: int  # pairs in a micro-batch
    accumulation: int
    checkpointing: str
    optimizer: str = "adamw"
    precomputed_reference: bool = False
    quantize_base: str | None = None  # of a LoRA

    @property
    def per_step(self) -> int:
        """Pairs of an optimiser step, on one device."""
        return self.batch * self.accumulation

    def within(self, pairs: int | None) -> Fit:
        """With a micro-batch that is no larger than the number of pairs, which a run would refuse."""
        return self if pairs is None else replace(self, batch=min(self.batch, pairs))


# family, all weights, least GB: the largest that the card has is taken
_FITS = {
    ("sdxl", False): {
        6: Fit(1, 16, "full", quantize_base="nf4"),
        8: Fit(1, 16, "full"),
        12: Fit(2, 8, "full"),
        16: Fit(4, 4, "full"),
    },
    ("sdxl", True): {
        24: Fit(2, 32, "full", "adamw_8bit_bf16", precomputed_reference=True),
        40: Fit(1, 64, "selective", "adamw_8bit_bf16"),
        80: Fit(2, 32, "selective"),
    },
    ("sd", False): {6: Fit(1, 16, "full"), 8: Fit(2, 8, "full"), 16: Fit(4, 4, "full"), 24: Fit(8, 2, "full")},
    ("sd", True): {16: Fit(2, 32, "full", "adamw_8bit_bf16"), 40: Fit(4, 16, "full")},
}
_ON_CPU = Fit(4, 1, "none")
_ENCODED_ELSEWHERE = [
    "  # Filling it needs 6.3 GB (VAE and text encoders in float32): fill it on the CPU with",
    "  #     CUDA_VISIBLE_DEVICES= diffalign encode THIS_FILE",
]

# Words that tell the family in the last part of a name; XL is a word of its own, or ends one (juggernautXL).
_NAMES = {
    "sdxl": re.compile(r"(?i:(?<![a-z])(sd)?xl(?![a-z])|pony|illustrious|noobai)|(?<=[a-z])XL(?![A-Za-z])"),
    "sd": re.compile(r"(?i:v1-[45](?!\d)|sd15|sd-1|sd1\.|stable-diffusion-2|v2-1(?!\d))"),
}
# Class of a pipeline's model_index.json; StableDiffusion3Pipeline and later ones are other models.
_PIPELINES = {
    "sdxl": re.compile(r"StableDiffusionXL\w*Pipeline"),
    "sd": re.compile(r"StableDiffusion(?!XL|\d)\w*Pipeline"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The file to write, and the four answers."""
    parser.add_argument(
        "config", type=path, nargs="?", default=Path("my.yaml"), help="file to write (default: %(default)s)"
    )
    parser.add_argument("--base", type=path_text, help="base model: Hub id, diffusers folder or .safetensors file")
    parser.add_argument("--pairs", type=path_text, help="preference pairs: file, folder or Hub id")
    parser.add_argument("--card", choices=CARDS, help="memory of the GPU in GB, or cpu")
    parser.add_argument("--goal", choices=GOALS, help="; ".join(f"{name}: {what}" for name, what in GOALS.items()))
    parser.add_argument("--family", choices=FAMILIES, help="of the base, where its name does not tell")
    overwrite_argument(parser)


def run(args: argparse.Namespace) -> None:
    """Asks for what was not given, writes the config once it is known to be valid, and prints what comes next."""
    from diffalign.config.schema import packaged_asset, parse_config
    from diffalign.config.strict_yaml import parse_yaml

    writable([("config:", args.config)], args.overwrite)
    answers = {name: getattr(args, name) or _ask(name) for name in QUESTIONS}
    base = str(packaged_asset(answers["base"]))
    for name, place in (("base", base), ("pairs", answers["pairs"])):
        if not Path(place).exists() and not is_hub_id(place):
            raise MissingFileError(f"--{name} {place} does not exist, and is no Hub id; check the path")
    family = args.family or family_by_name(base)
    fit = fit_for(family, answers["card"], answers["goal"])
    pairs, why_not = count_pairs(answers["pairs"], enough(fit.per_step))
    fit = fit.within(pairs)
    length = length_for(pairs, fit.per_step, why_not.partition(":")[0])
    text = config_text(answers, fit, length, args.config.stem)
    parse_config(parse_yaml(text, str(args.config)), str(args.config))
    with written_whole(args.config, what="the config") as partial:
        partial.write_text(text, encoding="utf-8")
    print(f"{args.config}: {GOALS[answers['goal']].partition(':')[0]}; docs/training.md explains every setting")
    print(textwrap.fill(length.why, 80))
    if ":" in why_not:
        print(f"the pairs were not counted: {why_not}")
    calibrate = [["calibrate", str(args.config)]] if answers["goal"] != "winners" else []  # SFT has no scale
    print_next(
        ["data", "check", answers["pairs"], "--sample", "pairs.png"],
        ["check", str(args.config)],
        *calibrate,
        ["train", str(args.config)],
    )


def _ask(name: str) -> str:
    if not sys.stdin.isatty():
        options = ", ".join(f"--{each}" for each in QUESTIONS)
        raise DiffalignError(f"--{name} is missing, and there is no terminal to ask on; give {options}")
    known = {"card": CARDS, "goal": GOALS}.get(name)
    for key, what in (known or {}).items():
        print(f"  {key:<12} {what}")
    while True:
        try:
            answer = input(f"{QUESTIONS[name]}: ").strip()
        except EOFError:
            raise DiffalignError(f"the input ended before --{name} was answered; answer it, or give --{name}") from None
        if known is not None and answer in known:
            return answer
        if known is None and answer:
            try:
                return expanded(answer)
            except DiffalignError as error:
                print(f"  {printable(str(error))}")
                continue
        print(f"  give one of {', '.join(known)}" if known else "  give a path or a Hub id")


def family_by_name(base: str) -> str:
    """sd or sdxl: by the model_index.json of a folder, else by the last part of the name.

    Raises DiffalignError for a pipeline of another kind, and where the name tells neither or both.
    """
    index = Path(base) / "model_index.json"
    if index.is_file():
        return _family_of_pipeline(index)
    found = [family for family, words in _NAMES.items() if words.search(Path(base).name)]
    if len(found) != 1:
        fault = (
            "has words of both SD and SDXL models" if found else "does not tell whether it is an SD or an SDXL model"
        )
        raise DiffalignError(f"the name {base} {fault}; give --family sd|sdxl")
    return found[0]


def _family_of_pipeline(file: Path) -> str:
    try:
        index = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise DiffalignError(f"{file} is not valid JSON ({error}); download the model again") from None
    if not isinstance(index, dict):
        raise DiffalignError(
            f"{file}: the index of a pipeline is a JSON object, got {type(index).__name__}; download the model again"
        )
    kind = index.get("_class_name")
    for family, pattern in _PIPELINES.items():
        if pattern.fullmatch(str(kind)):
            return family
    raise DiffalignError(
        f"{file}: _class_name is {kind!r}; the supported pipelines are StableDiffusionPipeline and "
        "StableDiffusionXLPipeline and their variants (not StableDiffusion3). Give another base"
    )


def fit_for(family: str, card: str, goal: str) -> Fit:
    """How a step fits a card. Raises DiffalignError for a card that is too small for the goal."""
    if card == "cpu":
        return _ON_CPU
    fits = {least: fit for least, fit in _FITS[family, goal == "full"].items() if least <= int(card)}
    if not fits:
        least = min(_FITS[family, goal == "full"])
        raise DiffalignError(
            f"--goal {goal} needs a card of {least} GB for a base of the family {family}, and --card is {card}; "
            "take the goal lora, or a larger card"
        )
    return fits[max(fits)]


def config_text(answers: dict[str, str], fit: Fit, length: Length, name: str) -> str:
    """The config as commented YAML. answers: base, pairs, card, goal; name: of the run's folder and its cache."""
    from diffalign.config.strict_yaml import quoted

    goal, gpu, full = answers["goal"], answers["card"] != "cpu", answers["goal"] == "full"
    objective = {"noisy-labels": ["name: cdpo", "beta: 5000", "label_smoothing: 0.1"], "winners": ["name: sft"]}.get(
        goal, ["name: dpo", "beta: 5000  # a larger one keeps the tuned model nearer to the base"]
    )
    lines = [
        f"# {GOALS[goal]}",
        "#",
        "# Written by `diffalign init`. Every setting can be overridden on the command line: key.sub=value.",
        "# `diffalign check` builds the run, takes one small step and prints the plan.",
        "",
        f"output_dir: {quoted(f'runs/{name}')}",
        "seed: 0",
        "",
        "model:",
        f"  pretrained_model_name_or_path: {quoted(answers['base'])}",
        f"  gradient_checkpointing: {fit.checkpointing}  # full needs the least memory, none the least time",
        "",
        "tuning:",
        *(["  method: full"] if full else ["  method: lora", "  rank: 8", "  alpha: 8"]),
        *([f"  quantize_base: {fit.quantize_base}  # the frozen weights, in 4 bits"] if fit.quantize_base else []),
        "",
        "objective:",
        *(f"  {line}" for line in objective),
        "",
        "data:",
        f"  path: {quoted(answers['pairs'])}",
        "  # resolution: pixels; without it the base's own",
        "  center_crop: true",
        "  proportion_empty_prompts: 0.2  # of the visits train without a prompt, as guidance needs",
        *([f"  cache_dir: {quoted(f'cache/{name}')}  # images and prompts are encoded once"] if gpu else []),
        *(_ENCODED_ELSEWHERE if fit.quantize_base else []),
        *(["  draws_per_pair: 8", "  cache_reference_errors: true"] if fit.precomputed_reference else []),
        f"  dataloader_num_workers: {min(8, os.cpu_count() or 1) if gpu else 0}",
        "",
        "training:",
        *(f"  # {line}" for line in textwrap.wrap(length.why, 110)),
        f"  max_train_steps: {length.steps}",
        f"  train_batch_size: {fit.batch}  # pairs at a time; lower it where memory runs out",
        f"  gradient_accumulation_steps: {fit.accumulation}  # {fit.per_step} pairs a step, on one GPU",
        f"  learning_rate: {'1.0e-8' if full else '1.0e-5'}"
        + ("" if goal == "winners" else "  # usual for SD and SDXL; `diffalign calibrate` measures what fits yours"),
        *(["  scale_lr: true  # learning_rate is multiplied by the pairs of a step"] if full else []),
        "  lr_scheduler: constant_with_warmup",
        f"  lr_warmup_steps: {length.warmup}",
        f"  optimizer: {fit.optimizer}",
        f"  mixed_precision: {'bf16' if gpu else quoted('no')}",
        f"  checkpointing_steps: {length.saving}",
        "  checkpoints_total_limit: 2",
        f"  logging_steps: {length.logging}",
        "  report_to: tensorboard",
        "",
        "# validation:",
        "#   pairs: 0.1  # measured and not trained on: they show when the run memorises its pairs",
        "#   max_pairs: 256",
        f"#   pairs_every: {length.measuring}",
        "#   early_stopping_patience: 4  # measurements without improvement",
        "#   load_best_model_at_end: true",
        *(["#   metric_for_best_model: loss"] if goal == "winners" else []),
        f"#   every: {length.saving}",
        '#   prompts: ["a lighthouse at dusk"]  # images during training, from the same noise each time',
    ]
    return "\n".join(lines) + "\n"
