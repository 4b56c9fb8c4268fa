"""`diffalign init` writes a config that is right for its answers; commands print the next ones."""

from __future__ import annotations

import itertools
import json
import os
import shlex
from pathlib import Path

import pytest

from diffalign.cli.commands import make_parser
from diffalign.cli.main import main
from diffalign.cli.next_steps import print_next
from diffalign.cli.training.init import CARDS, GOALS, config_text, family_by_name, fit_for
from diffalign.cli.training.length import enough, length_for
from diffalign.config.schema import Config, load_config
from diffalign.errors import DiffalignError
from diffalign.world import base_path, pairs_path

ANSWERS = ["--base", str(base_path()), "--pairs", str(pairs_path()), "--card", "cpu"]


def fails(capsys: pytest.CaptureFixture[str], *command: str) -> str:
    with pytest.raises(SystemExit) as end:
        main(command)
    assert end.value.code == 2
    return capsys.readouterr().err


def text_of(answers: dict[str, str], family: str) -> str:
    fit = fit_for(family, answers["card"], answers["goal"])
    return config_text(answers, fit, length_for(None, fit.per_step), "x")


def next_commands(printed: str) -> list[list[str]]:
    lines = printed.replace("\\\n", " ").splitlines()
    return [shlex.split(line)[1:] for line in lines if line.startswith("  diffalign ")]


@pytest.mark.parametrize("goal", GOALS)
def test_check_accepts_what_init_writes(goal: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "my.yaml"
    main(["init", str(file), *ANSWERS, "--goal", goal])
    commands = next_commands(capsys.readouterr().out)
    scaled = ["calibrate"] * (goal != "winners")  # which refuses SFT: it has no scale
    assert [words[0] for words in commands] == ["data", "check", *scaled, "train"]
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
        assert make_parser("evaluate").parse_args(ends[1]).scorer == ["world"]  # what this base is judged by, offline


@pytest.mark.parametrize(("family", "card", "goal"), [*itertools.product(("sd", "sdxl"), CARDS, GOALS)])
def test_every_answer_gives_a_config_or_says_which_card_is_needed(
    family: str, card: str, goal: str, tmp_path: Path
) -> None:
    answers = {"base": "some/base", "pairs": "some/pairs", "card": card, "goal": goal}
    least = {"sd": 16, "sdxl": 24}[family] if goal == "full" else 6
    if card != "cpu" and int(card) < least:
        with pytest.raises(DiffalignError, match=f"needs a card of {least} GB"):
            text_of(answers, family)
        return
    text = text_of(answers, family)
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
        (tmp_path / "x.yaml").write_text(text_of(answers, "sdxl"))
        ours, theirs = load_config(tmp_path / "x.yaml"), load_config(file)
        assert isinstance(ours, Config)
        assert isinstance(theirs, Config)
        for name in ("train_batch_size", "gradient_accumulation_steps", "optimizer", "mixed_precision"):
            assert getattr(ours.training, name) == getattr(theirs.training, name), (file.name, name)
        assert getattr(ours.tuning, "quantize_base", None) == getattr(theirs.tuning, "quantize_base", None), file.name
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


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("me/sdxl-tuned", "sdxl"),
        ("me/model_XL", "sdxl"),
        ("juggernautXL_v9.safetensors", "sdxl"),
        ("ponyDiffusionV6.safetensors", "sdxl"),
        ("me/flexlora-v1-5", "sd"),
        ("xl-lab/stable-diffusion-2-1", "sd"),
        ("me/flexlora", None),
        ("me/xl-v1-5", None),
    ],
)
def test_words_of_a_name_tell_the_family_unless_they_disagree(name: str, family: str | None) -> None:
    if family is None:
        with pytest.raises(DiffalignError, match="give --family"):
            family_by_name(name)
    else:
        assert family_by_name(name) == family


@pytest.mark.parametrize(
    ("index", "said"),
    [
        ("{", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("[1]", "is a JSON object, got list"),
        ("{}", "_class_name is None"),
        ('{"_class_name": "FluxPipeline"}', "_class_name is 'FluxPipeline'; the supported pipelines are Stable"),
        ('{"_class_name": "StableDiffusion3Pipeline"}', "_class_name is 'StableDiffusion3Pipeline'"),
        ('{"_class_name": ["StableDiffusionXLPipeline"]}', "_class_name is "),
    ],
)
def test_a_folder_of_another_kind_is_refused(
    index: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "sdxl/model_index.json"
    file.parent.mkdir()
    file.write_text(index)
    rest = ["--pairs", str(pairs_path()), "--card", "24", "--goal", "lora"]
    error = fails(capsys, "init", str(tmp_path / "x.yaml"), "--base", str(file.parent), *rest)
    assert said in error
    assert str(file) in error


@pytest.mark.parametrize(
    ("kind", "family"),
    [
        ("StableDiffusionPipeline", "sd"),
        ("StableDiffusionImg2ImgPipeline", "sd"),
        ("StableDiffusionXLPipeline", "sdxl"),
        ("StableDiffusionXLImg2ImgPipeline", "sdxl"),
    ],
)
def test_the_class_of_a_pipeline_tells_its_family(kind: str, family: str, tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": kind}))
    assert family_by_name(str(tmp_path)) == family


@pytest.mark.parametrize("name", ["\U0001f600 é", "a\u2028b", 'it\'s "so" #1', "${HOME}: x", "~", "a b " * 30 + "c"])
def test_any_path_comes_back_from_the_config(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).mkdir()
    pairs = f"./{name}"
    main(["init", f"{name}.yaml" if name != "~" else "./~.yaml", *ANSWERS, "--pairs", pairs, "--goal", "lora"])
    config = load_config(tmp_path / f"{name}.yaml")
    assert isinstance(config, Config)
    assert config.data.path == pairs
    assert config.output_dir == f"runs/{name}"


def test_an_invalid_config_is_never_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = text_of({"base": "a/b", "pairs": "a/b", "card": "cpu", "goal": "lora"}, "sd") + "wrong: 1\n"
    monkeypatch.setattr("diffalign.cli.training.init.config_text", lambda *_: broken)
    file = tmp_path / "x.yaml"
    assert f"{file}: 1 error(s)" in fails(capsys, "init", str(file), *ANSWERS, "--goal", "lora")
    assert list(tmp_path.iterdir()) == []
    file.write_text("mine")
    fails(capsys, "init", str(file), *ANSWERS, "--goal", "lora", "--overwrite")
    assert [each.read_text() for each in tmp_path.iterdir()] == ["mine"]


def test_the_home_folder_is_expanded_in_typed_answers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "pairs").mkdir()
    (tmp_path / "my-xl.safetensors").touch()
    typed = iter(["~/my-xl.safetensors", "a\x07b", "~/pairs"])
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    monkeypatch.setattr("builtins.input", lambda _: next(typed))
    main(["init", str(tmp_path / "x.yaml"), "--card", "24", "--goal", "lora"])
    assert "cannot have the character '\\x07'" in capsys.readouterr().out
    config = load_config(tmp_path / "x.yaml")
    assert config.model.pretrained_model_name_or_path == str(tmp_path / "my-xl.safetensors")
    assert config.data.path == str(tmp_path / "pairs")


def test_the_base_must_exist_when_its_family_is_given_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, rest = tmp_path / "x.yaml", ["--pairs", str(pairs_path()), "--card", "cpu", "--goal", "lora"]
    said = fails(capsys, "init", str(file), "--base", "no/such/folder", "--family", "sdxl", *rest)
    assert "--base no/such/folder does not exist" in said
    assert not file.exists()


@pytest.mark.parametrize(("cores", "workers"), [(2, 2), (64, 8), (None, 1)])
def test_no_more_workers_than_cores(cores: int | None, workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    text = text_of({"base": "a/b", "pairs": "a/b", "card": "24", "goal": "lora"}, "sd")
    assert f"dataloader_num_workers: {workers}\n" in text


@pytest.mark.parametrize(
    ("pairs", "per_step", "steps", "cadence", "said"),
    [
        (1, 1, 100, (5, 10, 10, 25), "1 usable pairs: 100 steps of 1 are 100 passes"),
        (120, 16, 100, (5, 10, 10, 25), "120 usable pairs: 100 steps of 16 are 13.3 passes"),
        (120, 4, 300, (10, 30, 30, 80), "120 usable pairs: 300 steps of 4 are 10 passes"),
        (500, 16, 320, (10, 30, 30, 80), "500 usable pairs: 320 steps of 16 are 10.2 passes"),
        (3199, 16, 2000, (10, 100, 200, 500), "3,199 usable pairs: 2,000 steps of 16 are 10 passes"),
        (3200, 16, 2000, (10, 100, 200, 500), "At least 3,200 usable pairs: 2,000 steps of 16 are 10 passes or less"),
        (None, 16, 1000, (10, 100, 100, 250), "10 passes are pairs * 10 / 16 steps"),
    ],
)
def test_the_length_of_a_run_follows_from_its_pairs(
    pairs: int | None, per_step: int, steps: int, cadence: tuple[int, ...], said: str
) -> None:
    found = length_for(pairs, per_step)
    assert (found.steps, (found.logging, found.warmup, found.measuring, found.saving)) == (steps, cadence)
    assert said in found.why
    assert found.measuring % found.logging == 0  # as `validation.pairs_every` must be
    assert enough(16) == 3200


def test_init_counts_pairs_and_says_why_a_run_is_so_long(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    main(["data", "world", "few.parquet", "--pairs", "3"])
    (tmp_path / "none").mkdir()
    goal = ["--card", "cpu", "--goal", "lora"]
    for pairs, steps, batch, said in (
        ("few.parquet", 100, 3, "3 usable pairs: 100 steps of 3 are 100 passes"),
        (str(pairs_path()), 2000, 4, "At least 800 usable pairs: 2,000 steps of 4 are 10 passes or less"),
        ("some/hub-id", 1000, 4, "The pairs were not counted (they are on the Hub): 10 passes are pairs * 10 / 4"),
        ("./none", 1000, 4, "The pairs were not counted (they could not be read): 10 passes"),
    ):
        capsys.readouterr()
        main(["init", "my.yaml", "--base", str(base_path()), "--pairs", pairs, *goal, "--overwrite"])
        printed, text = capsys.readouterr().out, (tmp_path / "my.yaml").read_text()
        assert said in " ".join(printed.split())
        assert said in " ".join(line.strip(" #") for line in text.splitlines())
        assert ("none contains nothing" in printed) == (pairs == "./none")
        training = load_config(tmp_path / "my.yaml").training
        assert (training.max_train_steps, training.train_batch_size) == (steps, batch)
        # the commented part is right too once it is taken
        (tmp_path / "my.yaml").write_text(
            "\n".join(
                line.removeprefix("# ") if line.startswith(("# v", "#  ")) else line for line in text.splitlines()
            )
        )
        assert load_config(tmp_path / "my.yaml").validation.pairs == 0.1


def test_data_check_names_init_only_where_it_loses_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairs = tmp_path / "my pairs.parquet"
    main(["data", "world", str(pairs), "--pairs", "4"])
    capsys.readouterr()
    main(["data", "check", str(pairs), "--max-pairs", "3"])
    assert next_commands(capsys.readouterr().out) == [["init", "my.yaml", "--pairs", str(pairs)]]
    main(["data", "check", str(pairs), "--columns", "prompt=caption", "--format", "pickapic"])
    printed = capsys.readouterr().out
    assert next_commands(printed) == []
    (keys,) = [line for line in printed.splitlines() if line.startswith("in a config: ")]
    main(["init", str(tmp_path / "x.yaml"), *ANSWERS, "--goal", "lora"])
    data = load_config(tmp_path / "x.yaml", shlex.split(keys.removeprefix("in a config: "))).data
    assert (data.path, data.columns, data.format) == (str(pairs), {"prompt": "caption"}, "pickapic")


def test_next_commands_can_be_typed(capsys: pytest.CaptureFixture[str]) -> None:
    print_next(["generate", "b", "--prompts", "a b.txt", "--out", "o"])
    (words,) = next_commands(capsys.readouterr().out)
    assert make_parser("generate").parse_args(words).prompts == "a b.txt"
    print_next(["evaluate", "b" * 50, "--tuned", "a=runs/a", "--scorer", "pickscore", "--out", "evaluation"])
    lines = capsys.readouterr().out.splitlines()[1:]
    assert "pickscore loads yuvalkirstain/PickScore_v1 from the Hub" in lines[-2]
    assert all(len(line) <= 80 for line in lines)
    assert not any(line.endswith(("--scorer \\", "--out \\", "--tuned \\")) for line in lines)
    print_next()
    assert capsys.readouterr().out == ""
