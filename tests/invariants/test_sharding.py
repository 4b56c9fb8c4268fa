"""FSDP2: a run in bf16, with all that is beside its steps, and its checkpoints for any number of processes.

That steps of all kinds equal those of one process is in `test_processes.py` and `test_rollout_processes.py`.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from torch.testing._internal.distributed.fake_pg import FakeStore

from diffalign import Trainer
from diffalign.config.schema import Config
from diffalign.errors import DiffalignError
from diffalign.models.loading.base import load_base
from diffalign.models.policy.sharding import is_shard, joined, parts, shard
from diffalign.training.checkpoints.checkpoint import CheckpointError, damage, load_training_state
from diffalign.training.distributed.sharded_state import SHARDS, put_back
from diffalign.training.distributed.sharding import check_sharding, mesh_of
from diffalign.training.run import run_training
from tests.invariants.pool import Pool
from tests.invariants.test_processes import in_two
from tests.training.test_run import metrics, same, weights

BESIDE = {
    "tuning.method": "full",
    "objective": {"name": "dpo", "beta": 5.0},
    "training.mixed_precision": "bf16",
    "training.max_train_steps": 3,
    "training.learning_rate": 1e-4,
    "training.adam_epsilon": 1e-4,
    "training.ema_decay": 0.5,
    "training.checkpointing_steps": 1,
    "training.checkpoints_total_limit": 2,
    "training.async_checkpoints": True,
    "validation.prompts": ["a red circle"],  # drawn by the main process alone
    "validation.every": 1,
    "validation.num_inference_steps": 1,
    "validation.pairs": 0.5,  # six pairs in three forwards: two in one process, one in the other
    "validation.pairs_every": 1,
    "validation.pairs_batch_size": 2,
}


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of finished runs, by name."""
    return {}


@pytest.fixture
def runs(
    sharded: dict[str, Path],
    make_config: Callable[..., Config],
    tiny_sd: Path,
    tmp_path_factory: pytest.TempPathFactory,
    pool: Pool,
) -> dict[str, Path]:
    """The run in two processes with FSDP2, and in one."""
    if not sharded:
        root = tmp_path_factory.mktemp("sharding")
        for name, job, processes in (("two", "train_sharded", 2), ("one", "train", 1)):
            size = {"training.train_batch_size": 2 // processes, "output_dir": str(root / name)}
            config = make_config(tiny_sd, {**BESIDE, **size})
            if processes == 1:
                run_training(config)
            else:
                in_two(pool, config, root / f"{name}.yaml", job)
            sharded[name] = root / name
    return sharded


def test_a_sharded_run_in_bf16_measures_draws_and_averages_as_one_process(runs: dict[str, Path], tiny_sd: Path) -> None:
    one, two = metrics(runs["one"]), metrics(runs["two"])
    assert one[0]["loss"] == two[0]["loss"]
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        for name in ("loss", "grad_norm", "heldout/loss"):  # gradients in bf16 are summed in another order
            assert b[name] == pytest.approx(a[name], rel=2e-2), name
    start, (own, other) = load_base(tiny_sd).unet.state_dict(), (weights(runs[name]) for name in ("one", "two"))
    moved = sum((own[name] - start[name]).square().sum() for name in own).sqrt()
    assert sum((own[name] - other[name]).square().sum() for name in own).sqrt() < 0.2 * moved  # the average's
    drawn = [sorted(path.name for path in (runs[name] / "validation").iterdir()) for name in runs]
    assert drawn[0] == drawn[1]
    assert len(drawn[0]) == 3


def test_a_flipped_byte_is_refused_and_the_checkpoint_before_it_continues_to_the_same_bits(
    runs: dict[str, Path], make_config: Callable[..., Config], tiny_sd: Path, tmp_path: Path, pool: Pool
) -> None:
    again = tmp_path / "again"
    shutil.copytree(runs["two"], again)
    assert sorted(p.name for p in again.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-3"]  # of three, two stay
    file = again / "checkpoint-3" / SHARDS / "__1_0.distcp"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert "sharded/__1_0.distcp" in str(damage(again / "checkpoint-3"))
    assert damage(again / "checkpoint-2") is None
    size = {"training.train_batch_size": 1, "output_dir": str(again), "training.resume_from_checkpoint": "latest"}
    size["training.async_checkpoints"] = False
    in_two(pool, make_config(tiny_sd, {**BESIDE, **size}), tmp_path / "again.yaml", "train_sharded")
    for path in (again / "checkpoint-3" / SHARDS).iterdir():
        assert path.read_bytes() == (runs["two"] / path.relative_to(again)).read_bytes(), path.name
    assert same(weights(again), weights(runs["two"]))
    assert metrics(again)[-1] == metrics(runs["two"])[-1]


class Loaded(SimpleNamespace):
    """The parts of a run that a training state is loaded into."""

    @property
    def module(self) -> nn.Module:
        return self.unet


def loaded(base: Path, checkpoint: Path, processes: int, rank: int) -> tuple[list, list, list]:
    """This process's part of both moments and of the average; the other processes need not be there."""
    unet = load_base(base).unet.requires_grad_(True)
    if processes > 1:
        torch.distributed.init_process_group("fake", rank=rank, world_size=processes, store=FakeStore())
        shard(unet, init_device_mesh("cpu", (processes,)), None)
    parameters = list(unet.parameters())
    run = Loaded(unet=unet, parameters=parameters, optimizer=torch.optim.AdamW(parameters))
    state = put_back(run, checkpoint, load_training_state(checkpoint))
    moments = [state["optimizer"]["state"][i] for i in range(len(parameters))]
    assert all(is_shard(m["exp_avg"]) == (processes > 1) and m["step"] == 2 for m in moments)
    first, second = parts(m["exp_avg"] for m in moments), parts(m["exp_avg_sq"] for m in moments)
    return first, second, state["ema"]["shadow_params"]


@pytest.fixture
def no_group() -> Iterator[None]:
    """Leaves the fake group of processes, however a test ends."""
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("written_by", ["one", "two"])
def test_states_of_one_and_of_two_processes_load_on_one_and_on_four(
    written_by: str, runs: dict[str, Path], tiny_sd: Path, no_group: None
) -> None:
    checkpoint = runs[written_by] / "checkpoint-2"
    whole, cut = loaded(tiny_sd, checkpoint, 1, 0), []
    for rank in range(4):
        cut.append(loaded(tiny_sd, checkpoint, 4, rank))
        torch.distributed.destroy_process_group()
        _clear_sharding_prop_cache()  # it holds this rank's mesh
    assert whole[1][0].any()
    for kind, tensors in enumerate(whole):
        for place, tensor in enumerate(tensors):
            assert torch.equal(torch.cat([found[kind][place] for found in cut]), tensor)


def test_one_process_continues_a_sharded_run(
    runs: dict[str, Path], make_config: Callable[..., Config], tiny_sd: Path, tmp_path: Path
) -> None:
    again = tmp_path / "again"
    shutil.copytree(runs["two"], again)
    size = {"training.train_batch_size": 2, "output_dir": str(again), "training.resume_from_checkpoint": "checkpoint-2"}
    run_training(make_config(tiny_sd, {**BESIDE, **size}))
    for name, value in weights(runs["two"]).items():
        torch.testing.assert_close(weights(again)[name], value, rtol=0, atol=5e-5)
    assert not (again / "checkpoint-3" / SHARDS).exists()


def test_an_index_that_names_other_classes_is_not_read(runs: dict[str, Path], tiny_sd: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint-2"
    shutil.copytree(runs["two"] / "checkpoint-2", checkpoint)
    (checkpoint / SHARDS / ".metadata").write_bytes(b"cposix\nsystem\n(S'true'\ntR.")
    with pytest.raises(CheckpointError, match=r"posix\.system"):
        loaded(tiny_sd, checkpoint, 1, 0)


LAUNCH = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


@pytest.mark.parametrize(
    ("launch", "changes", "message"),
    [
        ({"FSDP_OFFLOAD_PARAMS": "true"}, {}, "fsdp_offload_params"),
        ({"FSDP_RESHARD_AFTER_FORWARD": "false"}, {}, "fsdp_reshard_after_forward"),
        ({"FSDP_ACTIVATION_CHECKPOINTING": "true"}, {}, "model.gradient_checkpointing"),
        ({"FSDP_AUTO_WRAP_POLICY": "SIZE_BASED_WRAP"}, {}, "fsdp_auto_wrap_policy"),
        ({"FSDP_TRANSFORMER_CLS_TO_WRAP": "Attention"}, {}, "fsdp_transformer_layer_cls_to_wrap"),
        ({"FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"}, {}, "fsdp_state_dict_type"),
        ({}, {"training.mixed_precision": "fp16"}, "use bf16"),
        ({}, {"training.optimizer": "adafactor"}, "use adamw"),
        ({}, {"model.compile": True}, "model.compile"),
        ({}, {"model.channels_last": True}, "contiguous"),
        ({}, {"tuning.use_dora": True}, "tuning.use_dora"),
        ({}, {"training.ref_model_sync_steps": 16}, "ref_model_sync_steps: 16 with FSDP"),
    ],
)
def test_what_sharding_does_not_support_is_refused_by_name(
    launch: dict[str, str],
    changes: dict[str, object],
    message: str,
    make_config: Callable[..., Config],
    tiny_sd: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in (LAUNCH | launch | {"FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}).items():
        monkeypatch.setenv(name, value)
    assert mesh_of(SimpleNamespace(num_processes=1)) is None
    with pytest.raises(DiffalignError, match=message):
        check_sharding(make_config(tiny_sd, changes))


def test_weights_in_parts_cannot_be_joined_once_the_processes_have_ended() -> None:
    trainer = Trainer.__new__(Trainer)
    trainer.config = SimpleNamespace(output_dir="runs/mine")
    trainer.run = SimpleNamespace(module=SimpleNamespace(reset_iter_state=None))
    with pytest.raises(DiffalignError, match="final weights are in runs/mine"):
        trainer.save_model("elsewhere")


def test_whole_weights_pass_through() -> None:
    whole = torch.arange(3.0)
    assert joined(whole) is whole
    assert parts([whole])[0] is whole
