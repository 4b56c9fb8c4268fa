"""All commands: name, module, what it is for, an example. A command's module is imported when the command is given.

Such a module has `add_arguments(parser)` and `run(args)`, and imports nothing heavy outside `run`.
"""

from __future__ import annotations

import argparse
from importlib import import_module

from diffalign import __version__
from diffalign.cli.common import Parser
from diffalign.cli.next_steps import typed

WIDTH = 68  # of an example, which is indented by up to six

# name: (module below diffalign.cli, what it is for, an example without the leading `diffalign`)
GROUPS: dict[str, dict[str, tuple[str, str, str]]] = {
    "start": {
        "init": (
            "training.init",
            "write a commented config for your base, pairs, card and goal",
            "init my.yaml --base BASE --pairs my/pairs --card 24 --goal lora",
        ),
        "demo": ("demo", "tune the embedded world's model and measure the gain", "demo"),
        "list": ("list", "list objectives, sources, configs, scorers and prompt sets", "list objectives"),
    },
    "data": {
        "data": (
            "data",
            "check, score, relabel or make pairs; doubtful labels; prompts",
            "data check my/pairs --sample pairs.png",
        ),
        "label": (
            "labels.label",
            "make pairs from images, by a scorer or by eye",
            "label images --scorer pickscore --out pairs.parquet",
        ),
        "encode": (
            "training.encode",
            "fill the latent cache of a config (data.cache_dir)",
            "encode my.yaml data.cache_dir=cache/pairs",
        ),
    },
    "train": {
        "train": ("training.train", "tune a model with a config", "train my.yaml training.learning_rate=1e-5"),
        "check": ("training.check", "dry run: build a run, take one small step, print the plan", "check my.yaml"),
        "calibrate": (
            "training.calibrate",
            "measure which beta and learning rate fit the model and pairs",
            "calibrate my.yaml --json calibration.json",
        ),
        "report": (
            "training.report",
            "write the page of a run, or of several runs side by side",
            "report runs/dpo runs/ipo --out report.html",
        ),
        "diagnose": (
            "training.diagnose",
            "compare an objective's gradient with Diffusion-DPO's",
            "diagnose my.yaml objective.name=ipo",
        ),
    },
    "evaluate": {
        "generate": (
            "images.generate",
            "generate images with a base or a tuned model",
            "generate BASE --tuned runs/dpo --prompts prompts.txt --seeds 0-3 --out images",
        ),
        "evaluate": (
            "images.evaluate",
            "compare tuned models with their base on the same seeds",
            "evaluate BASE --tuned dpo=runs/dpo --prompts prompts.txt --seeds 0-3 --scorer pickscore --out evaluation",
        ),
        "compare": (
            "images.compare",
            "compare existing image folders",
            "compare images/base dpo=images/dpo --scorer pickscore",
        ),
        "votes": (
            "labels.votes",
            "report votes by eye: progress, agreement, win rates",
            "votes votes --reveal",
        ),
        "gallery": (
            "images.gallery",
            "write a page whose slider moves tuned models through strengths",
            "gallery BASE --tuned dpo=runs/dpo --prompts prompts.txt --strengths 0,0.5,1,1.5 --out gallery",
        ),
        "score": ("images.score", "score existing images", "score images --scorer pickscore"),
        "published": (
            "images.published",
            "evaluate released checkpoints beside their papers' figures",
            "published sdxl --only DPO SPO --dry-run",
        ),
        "serve-scorer": (
            "images.serve_scorer",
            "serve a scorer to other processes and machines",
            "serve-scorer pickscore --port 8765",
        ),
        "arena": ("arena", "run every objective on the embedded world, write the leaderboard", "arena --quick"),
    },
    "take away": {
        "export": (
            "weights.export",
            "write tuned weights as files for ComfyUI, A1111 and kohya",
            "export runs/dpo --to kohya --out dpo.safetensors",
        ),
        "card": (
            "weights.card",
            "write the model card of a run, with its evaluation and licence",
            "card runs/dpo --evaluation evaluation --license openrail++",
        ),
        "push": (
            "weights.push",
            "push weights, card and settings of a run to the Hugging Face Hub",
            "push runs/dpo OWNER/NAME",
        ),
        "merge": (
            "weights.merge",
            "merge tuned weights: average, extrapolate, mix",
            "merge BASE merged runs/a=0.5 runs/b=0.5",
        ),
        "convert": (
            "weights.convert",
            "convert pickled weights to safetensors, without running them",
            "convert unet.pth --base BASE --out runs/theirs",
        ),
    },
}
COMMANDS = {name: command for group in GROUPS.values() for name, command in group.items()}


def make_parser(only: str | None = None) -> Parser:
    """The parser of the command line; `only`: of one command alone, so that no other module is imported."""
    parser = Parser(
        prog="diffalign",
        description="Preference tuning of text-to-image diffusion models.",
        epilog=f"{_overview()}\n\ndiffalign COMMAND --help explains a command.\n"
        "DIFFALIGN_TRACEBACK=1 shows the traceback of an error.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"diffalign {__version__}")
    parsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", help="one of the commands below")
    for name, (place, purpose, example) in COMMANDS.items():
        sub = parsers.add_parser(
            name,
            description=purpose,
            epilog=f"example:\n  {typed(example.split(), WIDTH)}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if only in (None, name):
            module = import_module(f"diffalign.cli.{place}")
            module.add_arguments(sub)
            sub.set_defaults(run=module.run, error=sub.error)
    return parser


def _overview() -> str:
    """The commands by group, each group with the example of its first."""
    lines = []
    for title, group in GROUPS.items():
        lines += ["", f"{title}:", *(f"  {name:<12} {purpose}" for name, (_, purpose, _) in group.items())]
        lines.append(f"    $ {typed(next(iter(group.values()))[2].split(), WIDTH)}")
    return "\n".join(lines).lstrip()
