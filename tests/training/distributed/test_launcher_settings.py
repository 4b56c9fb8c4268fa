"""Launch configs are read by accelerate's own parser; of what `accelerate config` writes, nothing acts unnoticed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.commands.config.config_args import ClusterConfig
from accelerate.commands.config.default import write_basic_config
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env, prepare_simple_launcher_cmd_env

from diffalign.errors import DiffalignError
from diffalign.training.distributed.launcher_settings import refuse_launcher_settings, shards

FOLDER = Path(__file__).parents[3] / "training_configs/accelerate"
TRAIN = ["--main_process_port", "0", "-m", "diffalign", "train", "my.yaml"]


def environment(file: Path, *options: str) -> dict[str, str]:
    """The variables that `accelerate launch` gives the processes of a run."""
    args = launch_command_parser().parse_args(["--config_file", str(file), *options, *TRAIN])
    args, defaults, _ = _validate_launch_command(args)
    if args.use_deepspeed:
        args.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
        return prepare_deepspeed_cmd_env(args)[1]
    if args.multi_gpu or args.use_fsdp or args.use_megatron_lm:
        return prepare_multi_gpu_env(args)
    return prepare_simple_launcher_cmd_env(args)[1]


def written(folder: Path, **settings: Any) -> Path:
    """A file as `accelerate config` writes it."""
    answers = {"compute_environment": "LOCAL_MACHINE", "distributed_type": "MULTI_GPU", "num_processes": 2}
    answers |= {"mixed_precision": "no", "use_cpu": False, "debug": False, **settings}
    file = folder / "accelerate.yaml"
    ClusterConfig(**answers).to_yaml_file(file)
    return file


@pytest.mark.parametrize("file", sorted(FOLDER.glob("*.yaml")), ids=lambda file: file.stem)
def test_a_launch_config_is_accelerates_and_asks_for_nothing_that_is_refused(file: Path) -> None:
    found = environment(file)
    refuse_launcher_settings(found)
    assert shards(found) is file.stem.startswith("fsdp2")
    read = ClusterConfig.from_yaml_file(file)  # refuses keys that accelerate does not know
    two = file.stem.endswith("two_nodes")
    assert (read.num_machines, read.num_processes, read.main_process_ip) == (
        (2, 16, "10.0.0.1") if two else (1, 8, None)
    )
    for key, value in read.fsdp_config.items():
        assert key.startswith("fsdp_")
        assert found[key.upper()] == str(value).lower() or found[key.upper()] == value
    assert f"--config_file training_configs/accelerate/{file.name}" in file.read_text()
    assert yaml.safe_load(file.read_text())["mixed_precision"] == "no"


def test_all_four_are_there() -> None:
    names = [file.stem for file in sorted(FOLDER.glob("*.yaml"))]
    assert names == ["ddp", "ddp_two_nodes", "fsdp2", "fsdp2_two_nodes"]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"dynamo_config": {"dynamo_backend": "INDUCTOR"}}, ["dynamo_backend: INDUCTOR", "model.compile"]),
        ({"mixed_precision": "fp8"}, ["mixed_precision: fp8", "training.mixed_precision"]),
        (
            {"distributed_type": "DEEPSPEED", "deepspeed_config": {"zero_stage": 2, "gradient_accumulation_steps": 4}},
            ["DeepSpeed", "ZeRO-2", "FSDP2", "training_configs/accelerate/fsdp2.yaml"],
        ),
        (
            {"distributed_type": "FSDP", "fsdp_config": {"fsdp_version": 1, "fsdp_sharding_strategy": "FULL_SHARD"}},
            ["FSDP version 1", "fsdp_version: 2", "accelerate to-fsdp2"],
        ),
        ({"distributed_type": "MEGATRON_LM", "megatron_lm_config": {"megatron_lm_tp_degree": 1}}, ["Megatron-LM"]),
        (
            {
                "distributed_type": "FSDP",
                "fsdp_config": {"fsdp_version": 2},
                "parallelism_config": {"parallelism_config_tp_size": 2},
            },
            ["parallelism_config", "fsdp2.yaml"],
        ),
    ],
    ids=["dynamo", "fp8", "deepspeed", "fsdp1", "megatron", "parallelism"],
)
def test_what_would_act_behind_the_runs_config_is_refused_by_name(
    settings: dict[str, Any], said: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("accelerate.utils.launch.is_fp8_available", lambda: True)
    monkeypatch.setattr("accelerate.utils.launch.setup_fp8_env", lambda args, env: env)
    found = environment(written(tmp_path, **settings))
    with pytest.raises(DiffalignError) as refused:
        refuse_launcher_settings(found)
    for part in said:
        assert part in str(refused.value)


def test_what_accelerate_config_writes_by_itself_works(tmp_path: Path) -> None:
    for precision in ("no", "bf16", "fp16"):  # another than the run's is reported when the run begins
        file = write_basic_config(precision, str(tmp_path / f"{precision}.json"))
        refuse_launcher_settings(environment(Path(file)))
    affinity = written(tmp_path, enable_cpu_affinity=True, debug=True, downcast_bf16="no", rdzv_backend="c10d")
    refuse_launcher_settings(environment(affinity))


def test_accumulation_belongs_to_the_runs_config() -> None:
    refuse_launcher_settings({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1"})
    with pytest.raises(DiffalignError, match=r"gradient_accumulation_steps 4: unset .*run's config"):
        refuse_launcher_settings({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"})
