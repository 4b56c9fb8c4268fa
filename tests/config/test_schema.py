"""Configs: round trip, overrides, and faults that are all named at once."""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import yaml

from diffalign.config.schema import Config, ConfigError, load_config, parse_config, save_config
from diffalign.config.strict_yaml import dump_yaml, parse_yaml
from diffalign.models.adapters.methods import known_methods
from diffalign.objectives import OBJECTIVES, DiffusionDPO, MaPO
from diffalign.sources import SOURCES

MINIMAL = {
    "output_dir": "runs/x",
    "model": {"pretrained_model_name_or_path": "base"},
    "objective": {"name": "dpo", "beta": 2000},
    "data": {"path": "pairs.parquet"},
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(MINIMAL))
    return path


def test_objective_node_is_the_dataclass(file: Path) -> None:
    assert load_config(file).objective == DiffusionDPO(beta=2000.0)


def test_overrides_reach_every_level(file: Path) -> None:
    config = load_config(
        file,
        ["training.learning_rate=1e-5", "objective.timesteps=[249, 999]", "seed=7", "model.attention=math"],
    )
    assert config.training.learning_rate == 1e-5
    assert config.objective.timesteps == (249, 999)
    assert (config.seed, config.model.attention) == (7, "math")


def test_a_bare_no_is_no_precision(file: Path) -> None:
    assert load_config(file, ["training.mixed_precision=no"]).training.mixed_precision == "no"


def test_another_objective_starts_from_its_own_defaults(file: Path) -> None:
    """MaPO's beta is 0.1: the 2000 that the file has for DPO is not meant for it."""
    assert load_config(file, ["objective.name=mapo"]).objective == MaPO()
    assert load_config(file, ["objective.beta=0.2", "objective.name=mapo"]).objective == MaPO(beta=0.2)
    assert load_config(file, ["objective.name=dpo"]).objective == DiffusionDPO(beta=2000.0)
    lora = load_config(file, ["tuning.rank=4"])
    assert load_config(file, ["tuning.method=full"]).tuning.method == "full"
    assert lora.tuning.rank == 4


def test_shipped_assets_are_found_from_any_folder(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = load_config(file, ["data.path=assets/world/pairs/renders.parquet"])
    assert Path(config.data.path).is_file()
    assert load_config(file, ["data.path=assets/mine.parquet"]).data.path == "assets/mine.parquet"


def test_resolved_config_round_trips(file: Path, tmp_path: Path) -> None:
    config = load_config(file, ["tuning.rank=8", "validation.prompts=[a cat, a dog]", "objective.timesteps=[1]"])
    save_config(config, tmp_path / "out.yaml")
    assert load_config(tmp_path / "out.yaml") == config


def test_all_faults_at_once_with_the_nearest_names() -> None:
    tree = {
        **MINIMAL,
        "model": {"pretrained_model_name_or_path": "base", "gradient_checkpoint": True},
        "training": {"learnin_rate": 1e-5, "train_batch_size": 0, "mixed_precision": "bf17"},
        "objective": {"name": "dpo", "betta": 1},
        "data": {},
        "traning": {},
    }
    with pytest.raises(ConfigError) as e:
        parse_config(tree)
    text = str(e.value)
    assert "7 error(s)" in text
    for expected in (
        "model.gradient_checkpoint: unknown key; did you mean 'gradient_checkpointing'?",
        "training.learnin_rate: unknown key; did you mean 'learning_rate'?",
        "training.train_batch_size: Input should be greater than or equal to 1, got 0",
        "training.mixed_precision: Input should be 'auto', 'no', 'bf16' or 'fp16', got 'bf17'",
        "objective: betta: dpo has no such setting; did you mean 'beta'?",
        "data.path: required, but missing",
        "traning: unknown key; did you mean 'training'?",
    ):
        assert expected in text


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["objective.beta=-1"], "beta = -1"),
        (["objective.beta=much"], "beta: a number is required, and this is a string, got 'much'"),
        (["objective.name=dop"], "did you mean 'dpo'"),
        (["objective=dpo"], "mapping with a name"),
        (["data.resolution=100"], "multiple of 8"),
        (["data.cache_variants=2"], "needs data.cache_dir"),
        (["seed"], "key.sub=value"),
        (["seed.x=1", "seed.x.y=1"], "not a section"),
        (["seed=[1"], "not valid YAML.*quotes"),
        (["seed=1", "data.max_pairs=3", "seed=2"], "'seed=1' and 'seed=2' set the same key"),
        (["training.seed=1", "training={}"], "set the same key"),
        (["training..seed=1"], "key.sub=value"),
        (["model.revision=1.10"], r"model.revision: a string is required; put it in quotes if 1.1 is meant"),
        (["output_dir="], "output_dir: a string is required.*null"),
        (["output_dir='  '"], "output_dir: the path is empty"),
        (["data.split=a\0b"], r"data.split: the character U\+0000 is not allowed; delete it"),
        (["model.revision=a\udcff"], r"model.revision: the character U\+DCFF is not allowed"),
        (["data.path=~nobody-of-this-name/x"], "no home folder is known.*in full"),
        (["training=5"], "training: this is a section, got 5"),
        (["tuning.method=full", "tuning.resume_lora=x"], r"tuning: resume_lora: only tuning.method: lora"),
        (["training.lr_scheduler=constant", "training.lr_warmup_steps=5"], "constant has no warm-up"),
        (["training.optimizer=adafactor", "training.adam_beta1=0.8"], r"training\.adam_beta1: adafactor"),
        (["training.lr=1"], "did you mean 'learning_rate'"),
        (["objective.name=[dpo]"], "no objective is called"),
    ],
)
def test_single_faults(file: Path, overrides: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load_config(file, overrides)


BAD_NUMBERS = {
    "true": "a number is required, and true is a boolean|an integer is required, and true is a boolean",
    "010": "write 10, without leading zeros",
    "'5'": "write it without quotes",
    "much": "this is a string, got 'much'",
    ".nan": "nan",
    ".inf": "inf",
    "1e400": "inf",
    "1e300": r"1e\+300",
    "-1e300": r"-1e\+300",
    "9223372036854775808": "9223372036854775808",
}


def numeric_fields() -> list[str]:
    """Every int or float of the schema by its key; those of objectives and sources with a name before it."""
    found = []
    for section, field in Config.model_fields.items():
        parts = getattr(field.annotation, "model_fields", {"": field})
        for name, part in parts.items():
            kinds = {part.annotation, *get_args(part.annotation)}
            found += [".".join(filter(None, (section, name)))] * bool(kinds & {int, float})
    for table, known in (("objective", OBJECTIVES), ("source", SOURCES), ("tuning", known_methods())):
        for name, cls in known.items():
            hints = get_type_hints(cls)
            fields = [
                f.name for f in dataclasses.fields(cls) if {hints[f.name], *get_args(hints[f.name])} & {int, float}
            ]
            found += [f"{table} {name} {field}" for field in fields]
    return found


@pytest.mark.parametrize("field", numeric_fields())
def test_numbers_are_numbers_and_have_bounds(field: str, file: Path) -> None:
    """No switch, text, octal, infinity or NaN is taken for a number; nothing runs past int64 or float32."""
    table, _, rest = field.partition(" ")
    name, _, leaf = rest.partition(" ")
    for given, words in BAD_NUMBERS.items():
        which = "method" if table == "tuning" else "name"
        key = f"{table}={{{which}: {name}, {leaf}: {given}}}" if name else f"{field}={given}"
        with pytest.raises(ConfigError, match=words) as error:
            load_config(file, [key])
        assert (leaf or field) in str(error.value), given


def test_a_whole_number_may_have_an_exponent(file: Path) -> None:
    file.write_text(file.read_text() + "training: {max_train_steps: 1e3, learning_rate: 1e-5}\n")
    training = load_config(file).training
    assert (training.max_train_steps, training.learning_rate) == (1000, 1e-5)
    assert type(training.max_train_steps) is int
    with pytest.raises(ConfigError, match=r"max_train_steps: an integer is required, got 2.5"):
        load_config(file, ["training.max_train_steps=2.5"])


@pytest.mark.parametrize(
    ("written", "line", "words"),
    [
        ("seed: 1\ndata: {path: x}\nseed: 2\n", 3, r"'seed' is given twice \(first on line 1\); merge the two"),
        ("data:\n  path: x\n  # again\n  path: y\n", 4, r"'path' is given twice \(first on line 2\)"),
        ("a: {b: [{c: 1, c: 2}]}\n", 1, "'c' is given twice"),
        ("<<: {a: 1}\n<<: {a: 2}\n", 2, "'<<' is given twice"),
        ("data:\n\tpath: x\n", 2, "spaces, not tabs"),
        ("seed: !!int '1'\n", 1, "tag .*write the value without it"),
        ("seed: 1\na: &x [*x]\n", 2, "alias inside its own anchor"),
        ("seed: 1\n---\nseed: 2\n", 2, "another document"),
        ("seed: 1\n\nname: a\0b\n", 3, r"U\+0000 is not allowed; delete it"),
        ('name: "\\ud800"\n', 1, r"U\+D800 is not allowed"),
        ("? [a]\n: 1\n", 1, "a key is a string"),
    ],
)
def test_a_fault_of_a_file_has_its_line(written: str, line: int, words: str, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(written)
    with pytest.raises(ConfigError, match=rf"run\.yaml, line {line}\b.*{words}"):
        load_config(file)


def test_too_many_values_and_too_deep_ones(tmp_path: Path) -> None:
    ten = "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 10)}]\n" for a, b in pairwise("abcdefgh"))
    with pytest.raises(ConfigError, match="more than 20000 values"):
        parse_yaml("a: &a [1]\n" + ten, "run.yaml")
    with pytest.raises(ConfigError, match=r"run\.yaml: .*too deep"):
        parse_yaml("[" * 5000, "run.yaml")


def test_words_of_yaml_1_1_are_texts() -> None:
    text = "a: [no, yes, on, 1:30, 2024-01-01, 0x1f, 1_000, 010, =, '5', !!str 5]\nb: [1e3, -.5, +5, ~, null, true]\n"
    tree = parse_yaml(text, "x")
    assert tree["a"] == ["no", "yes", "on", "1:30", "2024-01-01", "0x1f", "1_000", "010", "=", "5", "5"]
    assert tree["b"] == [1000.0, -0.5, 5, None, None, True]


def test_a_merged_section_gives_what_is_not_set_itself() -> None:
    tree = parse_yaml("a: &x {p: 1, q: [1]}\nb: &y {p: 2, r: 3}\nc: {<<: [*x, *y], r: 4}\nd: *x\n", "x")
    assert (tree["c"], tree["d"]) == ({"p": 1, "q": [1], "r": 4}, tree["a"])
    assert tree["d"] is not tree["a"]  # an override of one must not change the other
    assert tree["c"]["q"] is not tree["a"]["q"]


@pytest.mark.parametrize(
    "value",
    ["no", "on", "010", "1e3", "1:30", "=", "", "~", "5", "x #y", "a: b", "<<", "0x1f", ".5", "a\nb", " é", "-"],
)
def test_texts_are_written_so_that_every_yaml_reads_them(value: str) -> None:
    written = dump_yaml({"k": [value, 1e-5, 8, True, None]})
    assert parse_yaml(written, "x") == yaml.safe_load(written) == {"k": [value, 1e-5, 8, True, None]}


def test_files_are_utf_8_with_or_without_a_mark(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("\ufeff" + yaml.safe_dump({**MINIMAL, "output_dir": "läufe"}, allow_unicode=True), encoding="utf-8")
    assert load_config(file).output_dir == "läufe"
    file.write_bytes(b"seed: 1\nname: caf\xe9\n")
    with pytest.raises(ConfigError, match=r"run\.yaml, line 2: byte 0xe9 is not UTF-8; save"):
        load_config(file)


def test_overrides_reach_to_their_end(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/h/me")
    assert load_config(file, ["output_dir=out/my run #2"]).output_dir == "out/my run #2"
    assert load_config(file, ["output_dir=a: b"]).output_dir == "a: b"
    assert load_config(file, ["output_dir=2024"]).output_dir == "2024"
    assert load_config(file, ["output_dir='[old] run'"]).output_dir == "[old] run"
    assert load_config(file, ["data.path=x=y.parquet"]).data.path == "x=y.parquet"
    file.write_text(file.read_text() + "source: null\n")
    config = load_config(file, ["source.name=online_pairs", "source.scorer=world"])
    assert isinstance(config.source, SOURCES["online_pairs"])


@pytest.mark.parametrize(
    "key",
    ["output_dir", "data.path", "data.cache_dir", "model.pretrained_model_name_or_path", "tuning.resume_lora"],
)
def test_the_home_folder_is_meant_in_every_path(key: str, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/h/me")
    node = load_config(file, [f"{key}=~/x"])
    for part in key.split("."):
        node = getattr(node, part)
    assert node == "/h/me/x"


def test_missing_and_malformed_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such config"):
        load_config(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_config(tmp_path / "bad.yaml")
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(ConfigError, match="mapping of sections"):
        load_config(tmp_path / "list.yaml")
