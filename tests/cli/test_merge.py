"""`diffalign merge` and the negative network as a user types them, on the embedded world."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffalign.cli.main import main
from tests.cli.test_main import BASE, WORLD, fails
from tests.conftest import ROOT


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two steps of LoRA on the pairs as they are, and on inverted ones."""
    folder = tmp_path_factory.mktemp("runs")
    patch = pytest.MonkeyPatch()
    patch.chdir(ROOT)
    settings = ["tuning.method=lora", "data.max_pairs=16", "training.max_train_steps=2", "training.train_batch_size=4"]
    settings += ["training.report_to=none", "training.learning_rate=1e-2", "training.lr_warmup_steps=0"]
    for name, inverted in (("dpo", "false"), ("npo", "true")):
        output = [f"output_dir={folder / name}", f"data.invert_preference={inverted}"]
        main(["train", str(WORLD), *settings, *output])
    patch.undo()
    return [folder / "dpo", folder / "npo"]


def test_merge_then_generate_and_evaluate(runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dpo, npo = runs
    main(["merge", str(BASE), str(tmp_path / "mix"), f"{dpo}=0.5", f"{npo}=1"])
    assert "weights sum to 1.5" in capsys.readouterr().out
    sampling = ["--prompts", "a red circle on a black background", "--seeds", "0-1", "--steps", "2"]
    pictures = {}
    for name, options in {
        "dpo": ["--tuned", str(dpo)],
        "away": ["--tuned", str(dpo), "--negative-tuned", str(tmp_path / "mix")],
        "same": ["--tuned", str(dpo), "--negative-tuned", str(dpo)],
    }.items():
        main(["generate", str(BASE), *options, *sampling, "--out", str(tmp_path / name)])
        pictures[name] = np.asarray(Image.open(tmp_path / name / "00000_0.png"), int)
    assert np.abs(pictures["same"] - pictures["dpo"]).max() <= 1
    assert np.abs(pictures["away"] - pictures["dpo"]).max() > 1
    compared = ["--tuned", f"both={dpo}", "--negative-tuned", f"both={npo}", "--negative-tuned", f"npo={npo}"]
    main(["evaluate", str(BASE), *compared, *sampling, "--scorer", "world", "--out", str(tmp_path / "evaluation")])
    table = (tmp_path / "evaluation" / "table.txt").read_text()
    assert [line.split()[0] for line in table.splitlines()[2:4]] == ["both", "npo"]


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["merge", str(BASE), "OUT", "runs/a"], "runs/a: write PATH=WEIGHT, e.g. runs/a=0.5"),
        (["merge", str(BASE), "OUT", "a=nan"], "a=nan: a weight is a finite number, at most 100"),
        (["merge", str(BASE), "OUT", "a=1e300"], "a=1e+300: a weight is a finite number, at most 100"),
        (["merge", str(BASE), "OUT", "a=0", "b=0"], "the weights of a=0 b=0 sum to 0"),
        (["merge", str(BASE), "OUT", "a=1", "b=-1"], "the weights of a=1 b=-1 sum to 0"),
        (["merge", "nowhere", "OUT", "a=0.5", "a=-0.5"], "sum to 0"),
        (["merge", str(BASE), "OUT", "=1"], "the path is empty"),
        (["merge", str(BASE), "OUT", "nowhere=1"], "no tuned weights at nowhere"),
        (["evaluate", str(BASE), "--scorer", "world", "--prompts", "p", "--out", "OUT"], "nothing to compare"),
        (
            ["evaluate", "b", "--negative-tuned", "x", "--scorer", "world", "--prompts", "p", "--out", "OUT"],
            "--negative-tuned x: write NAME=PATH",
        ),
        (
            ["evaluate", "b", "--tuned=x=1", "--tuned=x=2"]
            + [f"--negative-tuned=x={number}" for number in range(3)]
            + ["--scorer", "world", "--prompts", "p", "--out", "OUT"],
            "'x' has 2 tuned weights and 3 negative ones",
        ),
        (
            ["generate", str(BASE), "--negative-tuned", "x", "--guidance", "1", "--prompts", "p", "--out", "OUT"],
            "guidance_scale 1.0 has none",
        ),
    ],
)
def test_errors_are_one_message(
    command: list[str], words: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    message = fails(capsys, *(str(tmp_path / "out") if word == "OUT" else word for word in command))
    assert words in message
    assert "Traceback" not in message
    assert not (tmp_path / "out").exists()
