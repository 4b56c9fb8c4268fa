"""Command lines of every command, through `cli.main`; training and sampling are replaced."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

from PIL import Image

from diffalign.cli import main as cli
from diffalign.config.schema import packaged_config
from diffalign.errors import DiffalignError
from diffalign.evaluation.by_eye.plan import ImagePair, VotePlan, store_plan
from diffalign.world import base_path
from tests.data.helpers import png
from tests.evaluation.by_eye.helpers import event
from tests.fuzz.harness import Run
from tests.fuzz.odd import TEXTS, json_text

PROMPTS = "a red circle on a grey background\na blue square on a white background\n"
NUMBERS = ("nan", "inf", "-inf", "0", "-1", "-0.0", "1e400", "1e3", "0.5", "9999999999", str(10**30), "7.0", "010")
SMALL = ("nan", "0", "-1", "1.5", "1", "3", "010", "true")  # where a large one is a large world and no mistake
WORDS = (
    "2-1", "2-1,3", "0-", ",", "8", "true", "tpu", "cuda", "cuda:9", "float8", "euler_a", "base", "a/b=c", "=", "a=",
    "=b", "../x=y", "u0", "u0=nan", "u2", "auto", "sum", "none", "--help", "--version", "",
)  # fmt: skip
TEXTS_INSIDE = tuple(text for text in TEXTS if not text.startswith("/"))  # a command must not write elsewhere


class _EnoughError(Exception):
    """Everything was read and checked; what follows takes compute."""


def command(rng: Random, folder: Path) -> Run:
    """A good command line: values that have the right form and odd content, words changed, added, doubled or gone."""
    words = [str(word) for word in _good(rng, folder)]
    for _ in range(rng.randrange(1, 3)):
        at = rng.choice([i for i in range(1, len(words)) if not words[i].startswith("--")])
        name, given, text = words[at].partition("=")
        if rng.random() < 0.7:  # a value like it
            odd = _like(rng, text if given else name, folder, SMALL if words[:2] == ["data", "world"] else NUMBERS)
            words[at] = f"{name}={odd}" if given else odd
        else:
            odd = rng.choice((rng.choice(WORDS), rng.choice(TEXTS_INSIDE)))
            how = rng.randrange(4)
            words[at : at + 1] = ([], [words[at]] * 2, [odd, words[at]], [odd])[how]
        if len(words) < 2:
            break
    return lambda: _main(words, folder)


def _like(rng: Random, text: str, folder: Path, numbers: tuple[str, ...]) -> str:
    """Another number for a number, another path for a path, another word for a word."""
    if text.replace(".", "").isdigit():
        return rng.choice(numbers)
    if "/" in text:
        there = (
            folder,
            folder / "gone",
            folder / "prompts.txt",
            folder / "one" / "0.png",
            folder / "users.json",
            folder / "base",
        )
        return rng.choice((*map(str, there), f"{text}/x", rng.choice(TEXTS_INSIDE)))
    return rng.choice((rng.choice(WORDS), rng.choice(TEXTS_INSIDE)))


def _good(rng: Random, folder: Path) -> list[Any]:
    """A command line that would succeed, its files written."""
    base, out = folder / "base", folder / "out"
    shutil.copytree(base_path(), base)  # a command whose words are changed may write to it
    (folder / "a/b/c").mkdir(parents=True)  # where the command runs: ../.. is still inside
    (folder / "prompts.txt").write_text(PROMPTS, encoding="utf-8")
    for name in ("one", "two"):
        rows = []
        for i, prompt in enumerate(PROMPTS.splitlines()):
            (folder / name).mkdir(exist_ok=True)
            (folder / name / f"{i}.png").write_bytes(png(i + len(rows) + 9 * (name == "two"), (16, 16)))
            rows.append({"file": f"{i}.png", "prompt": prompt, "seed": 0})
        (folder / name / "manifest.jsonl").write_text("".join(json_text(row) + "\n" for row in rows))
    for side in ("chosen", "rejected"):
        shutil.copytree(folder / ("one" if side == "chosen" else "two"), folder / "pairs" / side)
        (folder / "pairs" / side / "manifest.jsonl").unlink()
    (folder / "pairs" / "captions.json").write_text(json_text(dict(zip("01", PROMPTS.splitlines()))))
    (folder / "users.json").write_text('{"u0": [1.0, 0.5], "u1": [0.0, 1.0]}')
    sampling: list[Any] = ["--prompts", folder / "prompts.txt", "--out", out]
    flags = "--seeds 0-1 --steps 2 --guidance 3.5 --scheduler ddim --resolution 16 --batch 4 --limit 2 --dtype float32"
    sampling += [*flags.split(), "--device", "cpu"]
    judge = ["--scorer", "world", "--device", "cpu"]
    by_eye: list[Any] = ["--by-eye", "--annotator", "me", "--seed", 0, "--limit", 2, "--no-browser", "--no-serve"]
    (folder / "run").mkdir()
    shutil.copy(packaged_config("world/dpo.yaml"), folder / "run" / "config.yaml")
    (folder / "run" / "metrics.jsonl").write_text('{"step": 1, "loss": 0.69}\n')
    (folder / "votes").mkdir()
    store_plan(folder / "votes", VotePlan("blind", 0, [ImagePair("id0", "a fox", ("base", "two"))]))
    (folder / "votes" / "me.jsonl").write_text(json_text(asdict(event("id0", "second"))) + "\n")
    config = [packaged_config("world/dpo.yaml"), f"output_dir={out}", "seed=3", "training.max_train_steps=2"]
    return rng.choice(
        (
            ["train", *config],
            ["check", *config],
            ["encode", *config, f"data.cache_dir={out}"],
            ["diagnose", *config, "--batches", 1, "--json", folder / "d.json"],
            ["calibrate", *config, "--steps", 2, "--pairs", 4],
            ["generate", base, *sampling],
            ["generate", base, *sampling, "--users", folder / "users.json", "--user", "u0=0.5"],
            ["evaluate", base, "--tuned", f"a={base / 'unet'}", "--scorer", "world", "--tie", 0.1, *sampling],
            ["compare", folder / "one", f"two={folder / 'two'}", *judge, "--tie", 0.1, "--out", out],
            ["score", folder / "one", folder / "two", *judge],
            ["label", folder / "one", folder / "two", *judge, "--tie", 0.0, "--out", folder / "pairs.parquet"],
            ["label", folder / "one", folder / "two", *by_eye, "--out", folder / "pairs.parquet", "--per-prompt", 1],
            ["label", "--pairs", folder / "pairs", *by_eye, "--out", folder / "pairs2", "--keep-unjudged"],
            ["compare", folder / "one", f"two={folder / 'two'}", "--blind", *by_eye[1:-1], "--out", out],
            ["votes", folder / "votes", "--reveal", "--json", folder / "v.json"],
            ["arena", "--quick", "--only", "dpo", "flipped", "--seeds", 0, "--workers", 1, "--out", out],
            ["merge", base, out, f"{base / 'unet'}=0.5", f"{base / 'unet'}=0.5"],
            ["export", base / "unet", "--to", "single-file", "--out", folder / "x.safetensors", "--base", base],
            ["data", "check", folder / "pairs", "--resolution", 16, "--max-pairs", 2, "--json", folder / "r.json"],
            ["data", "score", folder / "pairs", "--scorer", "world", "--out", folder / "s.jsonl", "--device", "cpu"],
            ["data", "world", folder / "w.parquet", "--pairs", 2, "--seed", 1, "--users", 0],
            ["data", "prompts", "world-heldout", "--out", folder / "set.jsonl"],
            ["published", "sd15", "--dry-run", *sampling[:4], "--tuned", f"mine={base / 'unet'}", "--scorer", "world"],
            ["gallery", base, "--tuned", f"a={base / 'unet'}", "--strengths", "0,0.5", *judge[:2], *sampling],
            ["card", base / "unet", "--base", base, "--license", "mit"],
            ["push", base / "unet", "alice/fox", "--base", base],
            ["report", folder / "run", "--out", folder / "r.html"],
            ["list", rng.choice(("objectives", "sources", "configs", "scorers"))],
            ["demo", "--out", out, "--steps", 1],
        )
    )


def _main(words: list[str], folder: Path) -> None:
    """Raises DiffalignError with what was printed where the command was refused as a user's error."""
    out, err = io.StringIO(), io.StringIO()
    with (
        _stand_ins(folder),
        contextlib.chdir(folder / "a/b/c"),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            cli.main(words)
            return
        except SystemExit as error:
            code = error.code
    if code in (0, None):
        return
    said = err.getvalue()
    enough = "_EnoughError" in said.splitlines()[-3] if len(said.splitlines()) > 2 else False
    if code == 1 and enough:
        return
    assert code == 2, f"exit status {code} of {words}: {said[-700:]}"
    last = [line for line in said.splitlines() if line.startswith("diffalign")]
    assert "Traceback" not in said, f"a traceback of {words}: {said[-700:]}"
    assert last, f"no message of {words}: {said[-300:]}"
    assert not any(c in said for c in TEXTS if c in ("\x00", "\x1b[31m", "\u202e")), f"control characters: {said!r}"
    raise DiffalignError(said)


@contextlib.contextmanager
def _stand_ins(folder: Path) -> Iterator[None]:
    """What takes compute or other processes, replaced where the commands take it from."""

    def enough(*args: Any, **settings: Any) -> Any:
        raise _EnoughError

    def blank(pipe: Any, prompts: list[str], seeds: list[int], sampling: Any, **settings: Any) -> list[Image.Image]:
        side = sampling.resolution or 16
        return [Image.new("RGB", (side, side)) for _ in prompts]

    def nothing(*args: Any, **settings: Any) -> None:
        return None

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch("logging.raiseExceptions", False))  # of handlers whose stream pytest has closed
        stack.enter_context(mock.patch.dict(os.environ, {"HOME": str(folder)}))
        for name, stand_in in (
            ("training.run.run_training", nothing),
            ("training.run.build_run", enough),
            ("training.build.build", enough),
            ("training.build_source.encode_run", enough),
            ("evaluation.generate.sample_images", blank),
            ("arena.arena.run_arena", enough),
            ("cli.demo.run_demo", nothing),
            ("cli.labels.by_eye._serve", nothing),
        ):
            stack.enter_context(mock.patch(f"diffalign.{name}", stand_in))
        yield
