"""The commands as a user types them, on the embedded world."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from diffalign.cli import main, parse_seeds
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
    assert "steps/s" in done.stderr
    assert (out / "unet/diffusion_pytorch_model.safetensors").is_file()
    assert Image.open(out / "validation/step-000003.png").size[0] > 100
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert {"loss", "rewards/chosen", "rewards/margins", "implicit_acc", "lr", "grad_norm"} <= lines[0].keys()
    assert list((out / "logs").rglob("events.out.tfevents*"))


def test_train_generate_evaluate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A LoRA run through the cache, pictures of it, and its comparison with the base."""
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
    cache = [f"data.cache_dir={tmp_path / 'cache'}", f"output_dir={tmp_path / 'out'}", "training.report_to=none"]
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
        "trial step",
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


def test_list_names_everything(capsys: pytest.CaptureFixture[str]) -> None:
    main(["list"])
    printed = capsys.readouterr().out
    for part in ("arXiv 2311.12908", "world/dpo.yaml", "pickscore", "mapo", "beta=5000.0", "selfplay"):
        assert part in printed


def test_data_world_and_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for out in (tmp_path / "pairs.parquet", tmp_path / "pairs"):
        main(["data", "world", str(out), "--pairs", "12"])
        files = ["--sample", str(tmp_path / "s.png"), "--json", str(tmp_path / "r.json")]
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
        (["generate", "b", "--prompts", "p", "--seeds", "a", "--out", "o"], "--seeds a"),
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
    assert parse_seeds("7") == [7]
    assert parse_seeds("0-3") == [0, 1, 2, 3]
    assert parse_seeds("0,3, 5-6") == [0, 3, 5, 6]
    for bad in ("", "3-1", "-1", "1.5"):
        with pytest.raises(ValueError, match="--seeds"):
            parse_seeds(bad)


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
    assert "already holds a run" in fails(capsys, "check", str(WORLD), f"output_dir={tmp_path / 'out'}")


def test_a_long_prompt_is_a_prompt(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompt = "a red circle on a black background " * 40
    main(["generate", str(BASE), "--prompts", prompt, "--steps", "1", "--out", str(tmp_path / "out")])
    assert len(list((tmp_path / "out").glob("*.png"))) == 1
