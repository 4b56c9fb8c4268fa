"""Every command in README, docs/ and CONTRIBUTING is one that exists: its arguments are parsed, its config is read, and
the commands of the first tutorial run.

Commands of diffalign are given to its own parser, after accelerate's or torchrun's. Of other Python programs the file
and its options must exist, of make the target, of pip the extra.
"""

from __future__ import annotations

import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from diffalign.cli.main import main, parse
from diffalign.config.schema import Config, PreferenceModelConfig, load_config
from diffalign.models.adapters.methods import known_methods
from diffalign.objectives import OBJECTIVES
from diffalign.objectives.modified import MODIFIERS
from diffalign.sources import SOURCES

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```(?:bash|sh|)\n(.*?)^```$|((?:^ {4}[^\n]*\n)+)", re.MULTILINE | re.DOTALL)
LAUNCHERS = ("accelerate", "torchrun")
OTHERS = {"make", "pip", "python", ".venv/bin/python"}
NO_CHECK = {"git", "cd", "source", "pre-commit", ".venv/bin/pytest"}  # what a shell has anyway
KEY = re.compile(
    r"`((?:model|tuning|objective|source|data|training|validation|health)\.(?!json|diffusion_model)\w+)(?:[:=][^`]*)?`"
)
A_CONFIG = "training_configs/sdxl/dpo_lora.yaml"  # where a page says CONFIG or my.yaml


def commands(page: Path) -> Iterator[str]:
    """The command lines of a page, without comments; continued lines are joined."""
    for fenced, indented in BLOCK.findall(page.read_text(encoding="utf-8")):
        text = re.sub(r"\\\n\s*", "", fenced or indented)
        for line in text.splitlines():
            words = re.sub(r"\s#.*", "", line).strip()
            words = re.sub(r"^(?:[A-Z_]+=\S+ )+", "", words)
            if words.split(" ")[0] in {"diffalign", *LAUNCHERS, *OTHERS, *NO_CHECK}:
                yield words


ALL = [(page, line) for page in PAGES for line in commands(page)]


def filled(line: str) -> list[str]:
    """The words of a command with its placeholders filled and its optional parts there."""
    if line.startswith("pip"):
        return shlex.split(line)
    words = shlex.split(re.sub(r"[\[\]](?!\d)", "", line))
    words = [word for word in words if word not in ("...", "key.sub=value")]
    words = ["prompts.txt" if word == "…" else word for word in words]
    words = ["2" if word == "N" else word for word in words]
    return [A_CONFIG if word in ("CONFIG", "my.yaml") else word for word in words]


def launched(words: list[str]) -> list[str]:
    """The arguments of diffalign that a launcher would start."""
    if words[0] == "accelerate":
        from accelerate.commands.launch import launch_command_parser

        assert words[1] == "launch"
        args = launch_command_parser().parse_args(words[2:])
        assert args.module
        assert args.training_script == "diffalign"
        return list(args.training_script_args)
    from torch.distributed.run import get_args_parser

    args = get_args_parser().parse_args(words[1:])
    assert args.module
    assert args.training_script == "diffalign"
    return list(args.training_script_args)


def check_python(words: list[str]) -> None:
    """The program is there, and its source has the options."""
    module = words[1] == "-m"
    name = words[2] if module else words[1]
    path = ROOT / (name.replace(".", "/") if module else name)
    files = [path.with_suffix(".py")] if not path.is_dir() else [path / "__main__.py"]
    assert files[0].is_file(), name
    source = "".join(file.read_text(encoding="utf-8") for file in [*files, *path.parent.glob("*.py")])
    options = [word.partition("=")[0] for word in words if word.startswith("--")]
    assert [option for option in options if f'"{option}"' not in source] == []


def check_other(words: list[str]) -> None:
    if words[0] == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert [word for word in words[1:] if "=" not in word and word not in targets] == []
    elif words[0] == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        named = [
            x for word in words for group in re.findall(r"(?:diffalign|\.)\[([\w,]+)\]", word) for x in group.split(",")
        ]
        assert [extra for extra in named if extra not in extras] == []
    elif words[0] in OTHERS:
        check_python(words)


@pytest.mark.parametrize(("page", "line"), ALL, ids=[f"{p.relative_to(ROOT)}:{line[:60]}" for p, line in ALL])
def test_a_command_exists(page: Path, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    words = filled(line)
    if words[0] != "diffalign" and words[0] not in LAUNCHERS:
        check_other(words)
        return
    args = parse(launched(words) if words[0] in LAUNCHERS else words[1:])
    if hasattr(args, "overrides"):
        assert load_config(args.config, args.overrides)


def test_the_pages_have_commands() -> None:
    assert len(ALL) > 100
    assert {page.name for page, _ in ALL} >= {"README.md", "first_run.md", "own_pairs.md", "commands.md"}


@pytest.mark.parametrize(
    "line",
    [
        "diffalign trian my.yaml",
        "diffalign train my.yaml training.learning_rat=1",
        "accelerate launch --num_procs 2 -m diffalign train my.yaml",
        "python -m benchmarks.no_such --out x",
        "python -m benchmarks.coverage --no-such-option",
        "make no-such-target",
        "pip install 'diffalign[nothing]'",
    ],
)
def test_a_command_that_does_not_exist_is_seen(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises((SystemExit, Exception, AssertionError, pytest.fail.Exception)):
        test_a_command_exists(ROOT, line, monkeypatch)


def test_every_command_is_in_the_reference(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    known = set(re.findall(r"^ {2}([a-z][a-z-]*) +\S", capsys.readouterr().out, re.MULTILINE))
    assert {"train", "evaluate", "export", "serve-scorer"} <= known
    shown = {
        line.split(" ")[1] for line in commands(ROOT / "docs/reference/commands.md") if line.startswith("diffalign")
    }
    assert sorted(known - shown) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_config_key_that_a_page_names_exists(page: Path) -> None:
    found = sorted(set(KEY.findall(page.read_text(encoding="utf-8"))))
    assert [key for key in found if not exists(*key.split("."))] == []


def exists(section: str, key: str) -> bool:
    if section in ("objective", "source"):
        classes = OBJECTIVES if section == "objective" else SOURCES
        modifier = section == "objective" and key in MODIFIERS
        return modifier or key == "name" or any(key in cls.__dataclass_fields__ for cls in classes.values())
    if section == "tuning":
        return key == "method" or any(key in cls.__dataclass_fields__ for cls in known_methods().values())
    hint = {**PreferenceModelConfig.model_fields, **Config.model_fields}[section].annotation
    return key in hint.model_fields  # type: ignore[union-attr]


def test_the_first_tutorial_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it is printed, but for the folder and the size."""
    monkeypatch.chdir(ROOT)
    smaller = {
        "check": ["training.train_batch_size=2"],
        "train": ["training.train_batch_size=2", "training.max_train_steps=2", "training.report_to=none"],
        "evaluate": ["--seeds", "0", "--steps", "2", "--limit", "2"],
        "generate": ["--seeds", "0", "--steps", "2"],
        "data": [],
    }
    page = ROOT / "docs/tutorials/first_run.md"
    lines = [shlex.split(line)[1:] for line in commands(page) if line.startswith("diffalign") and "demo" not in line]
    assert [words[0] for words in lines] == ["data", "check", "train", "evaluate", "generate"]
    for words in lines:
        main([word.replace("runs/", f"{tmp_path}/") for word in words] + smaller[words[0]])
    assert (tmp_path / "first_evaluation/grid.png").is_file()
    code = page.read_text(encoding="utf-8").partition("```python\n")[2].partition("```")[0]
    for there, here in {
        '"runs/python"': repr(str(tmp_path / "python")),
        "max_train_steps=300, train_batch_size=32": "max_train_steps=2, train_batch_size=2",
        "range(12)": "range(1)",
        "num_inference_steps=20": "num_inference_steps=2",
    }.items():
        assert there in code
        code = code.replace(there, here)
    exec(compile(code, "first_run.md", "exec"), {})
    assert (tmp_path / "python/unet").is_dir()
