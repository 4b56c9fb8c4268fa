"""The commands as a user types them, on the embedded world."""

from __future__ import annotations

import argparse
import io
import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from diffalign.cli.commands import COMMANDS, make_parser
from diffalign.cli.common import device_of, seeds
from diffalign.cli.images.options import DTYPES, SCHEDULERS
from diffalign.cli.main import main
from diffalign.cli.terminal import PrintableFormatter, Terminal, guarded
from diffalign.errors import DiffalignError, printable
from diffalign.evaluation.evaluate import evaluate
from tests.conftest import ROOT

WORLD = ROOT / "training_configs/world/dpo.yaml"
BASE = ROOT / "assets/world/base"


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """The world's configs name their files from the root of the checkout, as the README runs them."""
    monkeypatch.chdir(ROOT)


def fails(capsys: pytest.CaptureFixture[str], *command: str) -> str:
    """The message of a command that ends with status 2."""
    with pytest.raises(SystemExit) as e:
        main(command)
    assert e.value.code == 2
    return capsys.readouterr().err


def test_accelerate_launch_trains_the_world(tmp_path: Path) -> None:
    """The documented way, in a process of its own."""
    out = tmp_path / "out"
    overrides = ["training.max_train_steps=3", "training.logging_steps=1", "training.train_batch_size=4"]
    overrides += ["training.lr_warmup_steps=0", "validation.every=3"]
    overrides += ["validation.prompts=[a red circle on a black background]", f"output_dir={out}"]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "-m", "diffalign", "train", str(WORLD)]
    done = subprocess.run(
        [*launch, *overrides],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "1024 usable of 1024 rows" in done.stdout
    assert "4 pairs = 4 x 1 x 1" in done.stdout
    assert "dpo: 3/3 [" in done.stderr  # a line, and no bar
    assert (out / "unet/diffusion_pytorch_model.safetensors").is_file()
    assert Image.open(out / "validation/step-000003.png").size[0] > 100
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert {"loss", "rewards/chosen", "rewards/margins", "implicit_acc", "lr", "grad_norm"} <= lines[0].keys()
    assert list((out / "logs").rglob("events.out.tfevents*"))


def test_train_generate_evaluate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A LoRA run through the cache, images of it, and its comparison with the base."""
    out, cache = tmp_path / "run", tmp_path / "cache"
    tree = [
        f"output_dir={out}",
        "tuning.method=lora",
        "tuning.alpha=32",
        f"data.cache_dir={cache}",
        "data.max_pairs=16",
    ]
    tree += ["training.max_train_steps=2", "training.train_batch_size=4", "training.report_to=none"]
    tree += ["training.learning_rate=1e-3", "training.lr_warmup_steps=0"]
    main(["encode", str(WORLD), *tree])
    assert "holds 16 pairs at 16 pixels" in capsys.readouterr().out
    before = {p.name: p.stat().st_mtime_ns for p in cache.iterdir()}
    main(["train", str(WORLD), *tree])
    assert {p.name: p.stat().st_mtime_ns for p in cache.iterdir()} == before  # used, not made again
    assert (out / "pytorch_lora_weights.safetensors").is_file()

    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle on a black background\na cyan square on a grey background\n")
    sampling = ["--prompts", str(prompts), "--seeds", "0-2", "--steps", "2"]
    main(["generate", str(BASE), "--tuned", str(out), *sampling, "--out", str(tmp_path / "pictures")])
    assert len(list((tmp_path / "pictures").glob("*.png"))) == 6
    result = tmp_path / "evaluation"
    scorers = ["--scorer", "world", "--faithfulness", "world-accuracy"]
    main(["evaluate", str(BASE), "--tuned", f"lora={out}", *sampling, *scorers, "--out", str(result)])
    printed = capsys.readouterr().out
    assert "dR" in printed
    assert "clustered by prompt" in printed
    found = json.loads((result / "result.json").read_text())
    assert found["seeds"] == [0, 1, 2]
    assert (result / "grid.png").is_file()


def test_stale_cache_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache = [
        f"data.cache_dir={tmp_path / 'cache'}",
        f"output_dir={tmp_path / 'out'}",
        "training.report_to=none",
        "training.train_batch_size=8",
    ]
    main(["encode", str(WORLD), *cache, "data.max_pairs=8"])
    message = fails(capsys, "train", str(WORLD), *cache, "data.max_pairs=9")
    assert "dataset: the cache has" in message


def test_check_prints_the_plan(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    main(["check", str(WORLD), "training.scale_lr=true", f"output_dir={tmp_path / 'out'}"])
    printed = capsys.readouterr().out
    for part in (
        "1.25 M parameters",
        "0.00032 = 1e-05 x 32 (scale_lr)",
        "9.38 epochs of 1024",
        "dry run",
        "loss 0.693147",
    ):
        assert part in printed
    assert "optimizer 9.55 MiB" in printed
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["online_dpo", "seppo"])
def test_check_makes_one_pair_of_a_run_that_makes_its_own(
    name: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    config = WORLD.with_name(f"{name}.yaml")
    fast = ["source.sampling_steps=2", "training.scale_lr=true"]
    main(["check", str(config), *fast, f"output_dir={tmp_path / 'out'}"])
    printed = capsys.readouterr().out
    made_by = {"online_dpo": "online_pairs (scorer='world', prompts_per_round=128", "seppo": "selfplay (reference="}
    for part in (made_by[name], "0.00032 = 1e-05 x 32 (scale_lr)", "32 pairs = 32 x 1 x 1", "loss 0.693147"):
        assert part in printed
    assert not (tmp_path / "out").exists()


def test_a_round_of_more_prompts_than_there_are_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """By `train` before a model is loaded, and by `check` although it makes a smaller round."""
    words = [
        str(WORLD.with_name("online_dpo.yaml")),
        "data.path=assets/world/train.txt",
        f"output_dir={tmp_path / 'o'}",
    ]
    said = r"source.prompts_per_round: 128, and .*train.txt has 72 different prompts"
    for command in ("train", "check"):
        assert re.search(said, fails(capsys, command, *words, "source.sampling_steps=2", "training.report_to=none"))


def test_list_names_everything(capsys: pytest.CaptureFixture[str]) -> None:
    main(["list"])
    printed = capsys.readouterr().out
    for part in ("arXiv 2311.12908", "world/dpo.yaml", "pickscore", "mapo", "beta=5000.0", "selfplay"):
        assert part in printed


def test_data_world_and_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for out in (tmp_path / "pairs.parquet", tmp_path / "pairs"):
        main(["data", "world", str(out), "--pairs", "12"])
        files = ["--sample", str(tmp_path / "s.png"), "--json", str(tmp_path / "r.json"), "--overwrite"]
        main(["data", "check", str(out), "--full", *files])
        assert "usable pairs  12" in capsys.readouterr().out
        assert json.loads((tmp_path / "r.json").read_text())["usable_pairs"] == 12
        assert Image.open(tmp_path / "s.png").size[0] > 100


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["train", "nowhere.yaml"], "no such config file"),
        (["train", str(WORLD), "training.lerning_rate=1"], "did you mean 'learning_rate'"),
        (["train", str(WORLD), "data.path=nowhere.parquet"], "nowhere.parquet"),
        (["train", str(WORLD), "model.pretrained_model_name_or_path=no/such/model"], "no/such/model"),
        (["encode", str(WORLD)], "data.cache_dir is not set"),
        (["data", "check", "nowhere"], "nowhere"),
        (["data", "check", "nowhere", "--columns", "prompt:text"], "--columns prompt:text: write PART=COLUMN"),
        (["evaluate", "b", "--tuned", "x", "--scorer", "world", "--prompts", "p", "--out", "o"], "write NAME=PATH"),
        (["evaluate", "b", "--tuned", "a=x", "--scorer", "wrld", "--prompts", "p", "--out", "o"], "did you mean"),
    ],
)
def test_errors_are_one_message(
    command: list[str], words: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    if command[0] == "train":
        command = [*command, f"output_dir={tmp_path / 'out'}", "training.report_to=none"]
    message = fails(capsys, *command)
    assert words in message
    assert "Traceback" not in message


def test_seeds() -> None:
    assert seeds("7") == [7]
    assert seeds("0-3") == [0, 1, 2, 3]
    assert seeds("0,3, 5-6,3") == [0, 3, 5, 6]


GENERATE = ["generate", "b", "--prompts", "p", "--out", "o"]
EVALUATE = ["evaluate", "b", "--tuned", "a=x", "--scorer", "world", "--prompts", "p", "--out", "o"]
COMPARE = ["compare", "b", "a=x", "--scorer", "world"]


@pytest.mark.parametrize(
    ("command", "option", "bad", "allowed"),
    [
        (GENERATE, "--guidance", ["nan", "inf", "-1", "1e300", "much"], "a number from 0 to 1000"),
        (GENERATE, "--resolution", ["0", "-1", "7", "12", "1e3", "20000"], "from 8 to 16384, a multiple of 8"),
        (GENERATE, "--batch", ["0", "-1", "1.5", "9" * 30], "an integer from 1 to"),
        (GENERATE, "--limit", ["0", "-1"], "an integer from 1 to"),
        (GENERATE, "--steps", ["0", "-3", "true"], "an integer from 1 to 10000"),
        (GENERATE, "--seeds", ["", "a", "1.5", "-1", "2-1,3", "0,,1"], r"write 7, 0-11|write 1-2"),
        (GENERATE, "--seeds", [str(2**63), "0-1000000000000"], r"largest seed is 9223|more than 1000000 seeds"),
        (["data", "check", "o"], "--json", ["--"], "is not a value"),
        (GENERATE, "--device", ["tpu", "cuda:x", ""], "give cpu, cuda, cuda:N or mps"),
        (GENERATE, "--scheduler", ["dpm"], "'ddim', 'euler', 'dpmsolver'"),
        (GENERATE, "--dtype", ["fp16"], "'float32', 'bfloat16', 'float16'"),
        (GENERATE, "--out", ["", " ", "a\0b", "a\x1b[2Jb"], "path is empty|rename the file or folder"),
        (EVALUATE, "--tie", ["nan", "-1", "inf"], r"a number from 0 to 1e\+06"),
        (COMPARE, "--tie", ["nan", "-0.1"], r"a number from 0 to 1e\+06"),
        (["arena"], "--seeds", ["-1", str(2**64)], "an integer from 0 to"),
        (["arena"], "--workers", ["0"], "an integer from 1 to 1024"),
        (["calibrate", "c"], "--steps", ["1", "0"], "an integer from 2"),
        (["diagnose", "c"], "--batches", ["0"], "an integer from 1"),
        (["data", "world", "o"], "--pairs", ["0", "-1"], "an integer from 1"),
        (["data", "world", "o"], "--seed", ["-1"], "an integer from 0"),
        (["data", "check", "o"], "--max-pairs", ["0"], "an integer from 1"),
        (["demo"], "--steps", ["0"], "an integer from 1"),
    ],
)
def test_options_have_bounds(
    command: list[str], option: str, bad: list[str], allowed: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The message has the option, the value and what is allowed; nothing is read before."""
    for value in bad:
        message = fails(capsys, *command, f"{option}={value}")
        assert f"argument {option}: " in message
        assert re.search(allowed, message), message
        assert value[:20].encode("unicode_escape").decode().strip() in message, message
        assert "\x1b" not in message


def test_every_number_of_the_command_line_has_bounds() -> None:
    """No option is read by int or float alone, which take -1, nan and 1e300."""
    found, parsers = 0, [make_parser()]
    for parser in parsers:
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                parsers += action.choices.values()
            assert action.type not in (int, float, Path), action.option_strings
            found += action.type is not None
    assert found > 40


def test_choices_are_those_of_the_package() -> None:
    from diffalign.evaluation import sampling

    assert (tuple(sampling.SCHEDULERS), tuple(sampling.DTYPES)) == (SCHEDULERS, DTYPES)


def test_a_device_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    torch = pytest.importorskip("torch")
    message = fails(capsys, *GENERATE, f"--device=cuda:{torch.cuda.device_count()}")
    assert "--device cuda:" in message
    assert "use --device cpu" in message
    assert device_of("cpu") == "cpu"


NO_NAMES = ["../../x", "a/b", "", ".", "..", ".x", "a\x1b[2J", "a\nb", "x" * 101, "a:b", " a", "C\\x"]


@pytest.mark.parametrize("name", NO_NAMES)
def test_names_of_models_stay_inside_the_folder(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Refused before a scorer is loaded (there is none of this name) or anything is written."""
    out = tmp_path / "in" / "out"
    common = ["--scorer", "none", "--prompts", "a cat", "--out", str(out)]
    message = fails(capsys, "evaluate", str(BASE), f"--tuned={name}={BASE}", *common)
    assert "is no name for a model: give letters, digits" in message
    assert f"--tuned {printable(name[:20])}" in message
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(DiffalignError, match="is no name for a model"):
        evaluate(str(BASE), {name: str(BASE)}, ["a cat"], [0], scorers=["none"], out_dir=out)


def test_escape_codes_of_others_stay_off_the_terminal(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """In tables, logs, bars and messages alike, because the streams are the border."""
    evil = "\x1b]0;title\x07\x9b2J\u202e"
    with guarded():
        print(f"table {evil}", end="\n\ttab\n")
        sys.stdout.writelines([evil])
        print(f"\rbar {evil}\x1b[A", file=sys.stderr)
        record = logging.LogRecord("x", logging.INFO, "f", 1, "log %s\r", (evil,), None)
        print(PrintableFormatter("%(message)s").format(record))
    out, err = capsys.readouterr()
    for text in (out, err.replace("\r", "").replace("\x1b[A", "")):
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", text), text
        assert r"\x1b]0;title\x07\x9b2J\u202e" in text
    assert err.startswith("\rbar ")
    assert "\n\ttab\n" in out
    assert r"log \x1b]0;title" in out
    assert sys.stdout is not None
    assert not isinstance(sys.stdout, Terminal)
    message = fails(capsys, "train", f"x{evil}.yaml")
    assert "\x1b" not in message


def test_colours_are_for_terminals_and_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    class Screen(io.StringIO):
        def isatty(self) -> bool:
            return True

    for name in ("NO_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    screen, file = Screen(), io.StringIO()
    for stream in (screen, file):
        Terminal(stream, moves=False).write_styled("a\x1b[2Jb", "error")
    assert screen.getvalue() == "\x1b[31ma\\x1b[2Jb\x1b[0m"
    assert file.getvalue() == "a\\x1b[2Jb"
    monkeypatch.setenv("NO_COLOR", "1")
    Terminal(quiet := Screen(), moves=False).write_styled("a", "error")
    assert quiet.getvalue() == "a"


def test_commands_do_not_overwrite(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Refused before any work; --overwrite replaces."""
    out = tmp_path / "pairs.parquet"
    out.write_bytes(b"mine")
    world = ["data", "world", str(out), "--pairs", "2"]
    message = fails(capsys, *world)
    assert f"{out} exists; name another file" in message
    assert "--overwrite" in message
    assert out.read_bytes() == b"mine"
    main([*world, "--overwrite"])
    assert out.read_bytes()[:4] == b"PAR1"
    report = tmp_path / "report.json"
    report.write_text("mine")
    for command in (
        ["data", "check", str(out), "--json", str(report)],
        ["data", "check", str(out), "--sample", str(report)],
        ["diagnose", str(WORLD), "--json", str(report)],
        ["calibrate", str(WORLD), "--json", str(report)],
    ):
        assert f"{command[-2]} {report} exists; name another file" in fails(capsys, *command)
    assert report.read_text() == "mine"
    main(["data", "check", str(out), "--json", str(report), "--overwrite"])
    assert json.loads(report.read_text())
    capsys.readouterr()
    assert "is a folder; name a file" in fails(capsys, "data", "check", str(out), "--json", str(tmp_path))


def test_check_leaves_the_cache_alone_and_sees_an_occupied_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = tmp_path / "cache"
    main(["check", str(WORLD), f"data.cache_dir={cache}", f"output_dir={tmp_path / 'out'}"])
    assert f"cache {cache}" in capsys.readouterr().out
    assert not cache.exists()
    (tmp_path / "out").mkdir()
    (tmp_path / "out/config.yaml").write_text("{}")
    (tmp_path / "out/run.json").write_text("{}")
    assert "already contains a run" in fails(capsys, "check", str(WORLD), f"output_dir={tmp_path / 'out'}")


def test_a_long_prompt_is_a_prompt(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompt = "a red circle on a black background " * 40
    main(["generate", str(BASE), "--prompts", prompt, "--steps", "1", "--out", str(tmp_path / "out")])
    assert len(list((tmp_path / "out").glob("*.png"))) == 1


def test_help_fits_80_columns(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    for words in (["--help"], *([name, "--help"] for name in COMMANDS)):
        with pytest.raises(SystemExit):
            main(words)
        assert [line for line in capsys.readouterr().out.splitlines() if len(line) > 80] == []


def test_an_unknown_option_shows_its_commands_usage(capsys: pytest.CaptureFixture[str]) -> None:
    message = fails(capsys, "push", "runs/mine", "OWNER/NAME", "--dry-run")
    assert "usage: diffalign push" in message
    assert "unrecognized arguments: --dry-run" in message
