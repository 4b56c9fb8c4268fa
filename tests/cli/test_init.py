"""`diffalign init` writes a config that is right for its answers; commands print the next ones."""

from __future__ import annotations

import itertools
import shlex
from pathlib import Path

import pytest

from diffalign.cli.commands import make_parser
from diffalign.cli.main import main
from diffalign.cli.next_steps import print_next
from diffalign.cli.training.init import CARDS, GOALS, config_text, family_by_name
from diffalign.config.schema import Config, load_config
from diffalign.errors import DiffalignError
from diffalign.world import base_path, pairs_path

ANSWERS = ["--base", str(base_path()), "--pairs", str(pairs_path()), "--card", "cpu"]


def fails(capsys: pytest.CaptureFixture[str], *command: str) -> str:
    with pytest.raises(SystemExit) as end:
        main(command)
    assert end.value.code == 2
    return capsys.readouterr().err


def next_commands(printed: str) -> list[list[str]]:
    return [shlex.split(line)[1:] for line in printed.splitlines() if line.startswith("  diffalign ")]


@pytest.mark.parametrize("goal", GOALS)
def test_check_accepts_what_init_writes(goal: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "my.yaml"
    main(["init", str(file), *ANSWERS, "--goal", goal])
    commands = next_commands(capsys.readouterr().out)
    assert [words[0] for words in commands] == ["data", "check", "train"]
    main([*commands[1], f"output_dir={tmp_path / 'run'}"])
    printed = capsys.readouterr().out
    assert ("LoRA" in printed or "lora" in printed) == (goal != "full")
    (train,) = next_commands(printed)
    assert train == ["train", str(file), f"output_dir={tmp_path / 'run'}"]
    if goal == "lora":
        main([*train, "training.max_train_steps=1", "data.max_pairs=8", "training.report_to=none"])
        ends = next_commands(capsys.readouterr().out)
        assert [words[0] for words in ends] == ["generate", "evaluate"]
        assert all(make_parser(words[0]).parse_args(words).tuned for words in ends)


@pytest.mark.parametrize(("family", "card", "goal"), [*itertools.product(("sd", "sdxl"), CARDS, GOALS)])
def test_every_answer_gives_a_config_or_says_which_card_is_needed(
    family: str, card: str, goal: str, tmp_path: Path
) -> None:
    answers = {"base": "some/base", "pairs": "some/pairs", "card": card, "goal": goal}
    least = {"sd": 16, "sdxl": 24}[family] if goal == "full" else 8
    if card != "cpu" and int(card) < least:
        with pytest.raises(DiffalignError, match=f"needs a card of {least} GB"):
            config_text(answers, family, "x")
        return
    text = config_text(answers, family, "x")
    (tmp_path / "x.yaml").write_text(text)
    config = load_config(tmp_path / "x.yaml")
    assert isinstance(config, Config)
    assert config.model.pretrained_model_name_or_path == "some/base"
    assert all("#" in line or ":" in line or not line for line in text.splitlines())


def test_sdxl_fits_are_those_of_the_packaged_configs(tmp_path: Path) -> None:
    root = Path(__file__).parents[2] / "training_configs/sdxl/memory"
    for file in root.glob("dpo_*_*gb.yaml"):
        kind, card = file.stem.split("_")[1:]
        answers = {"base": "b/xl", "pairs": "a/b", "card": card.removesuffix("gb"), "goal": kind}
        if answers["card"] not in CARDS:
            continue
        (tmp_path / "x.yaml").write_text(config_text(answers, "sdxl", "x"))
        ours, theirs = load_config(tmp_path / "x.yaml"), load_config(file)
        assert isinstance(ours, Config)
        assert isinstance(theirs, Config)
        for name in ("train_batch_size", "gradient_accumulation_steps", "optimizer", "mixed_precision"):
            assert getattr(ours.training, name) == getattr(theirs.training, name), (file.name, name)
        for name in ("cache_reference_errors", "draws_per_pair"):
            assert getattr(ours.data, name) == getattr(theirs.data, name), (file.name, name)
        assert ours.model.gradient_checkpointing == theirs.model.gradient_checkpointing, file.name


def test_missing_answers_are_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "--goal is missing, and there is no terminal" in fails(capsys, "init", *ANSWERS)
    assert not (tmp_path / "my.yaml").exists()
    typed = iter(["", "best", "lora"])
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    monkeypatch.setattr("builtins.input", lambda _: next(typed))
    main(["init", *ANSWERS])

    def ended(_: str) -> str:
        raise EOFError

    assert "give one of lora, full" in capsys.readouterr().out
    assert "method: lora" in (tmp_path / "my.yaml").read_text()
    monkeypatch.setattr("builtins.input", ended)
    assert "the input ended before --goal was answered" in fails(capsys, "init", "other.yaml", *ANSWERS)


def test_what_is_wrong_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "x.yaml"
    rest = ["--card", "24", "--goal", "lora"]
    for wrong, said in (
        (["--base", "no/such/folder", "--pairs", str(pairs_path())], "--base no/such/folder does not exist"),
        (["--base", "me/model", "--pairs", str(pairs_path())], "give --family sd|sdxl"),
        (["--base", "me/model-xl", "--pairs", "./nowhere"], "--pairs ./nowhere does not exist"),
    ):
        assert said in fails(capsys, "init", str(file), *wrong, *rest)
    assert not file.exists()
    file.write_text("mine")
    assert "exists" in fails(capsys, "init", str(file), *ANSWERS, "--goal", "lora")


def test_the_family_is_read_from_the_folder_or_the_name() -> None:
    assert family_by_name(str(base_path())) == "sdxl"
    assert family_by_name("stabilityai/stable-diffusion-xl-base-1.0") == "sdxl"
    assert family_by_name("stable-diffusion-v1-5/stable-diffusion-v1-5") == "sd"


def test_next_commands_can_be_typed(capsys: pytest.CaptureFixture[str]) -> None:
    print_next(["generate", "b", "--prompts", "a b.txt", "--out", "o"])
    (words,) = next_commands(capsys.readouterr().out)
    assert make_parser("generate").parse_args(words).prompts == "a b.txt"
    print_next()
    assert capsys.readouterr().out == ""
