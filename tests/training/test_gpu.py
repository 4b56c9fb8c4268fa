"""Training on CUDA: SDXL in its real size, 8-bit Adam, bitwise resuming, and a step that never waits for the device.

Each check is a function of a base model, so the CPU runs it too, on a tiny one: what cannot be seen without a GPU is
the size, the precision and the kernels, not whether the test works. The `meta` device stands in for a GPU where only
the traffic matters: it refuses to be read, and every copy to it can be counted.
"""

from __future__ import annotations

import copy
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from diffalign.config.schema import Config, parse_config
from diffalign.engine.measure import measure_and_backward
from diffalign.engine.random import pair_key
from diffalign.models.adapters.lora import add_lora
from diffalign.models.loading.base import Base, load_base
from diffalign.models.policy.networks import Networks
from diffalign.models.policy.reference import FrozenCopy, LoraOff
from diffalign.objectives import OBJECTIVES, DiffusionDPO
from diffalign.objectives.base import ask, shared_noise
from diffalign.training import build as setup
from diffalign.training.build import Run
from diffalign.training.metrics import Meter, observe
from diffalign.training.processes import make_accelerator
from diffalign.training.run import run_training
from diffalign.training.step import optimizer_step
from diffalign.types import Conditioning, Evidence, PairBatch, Score, Transitions
from tests.gpu_models import SDXL_UNET, sdxl_base
from tests.training.test_run import metrics, same, weights

GiB = 2**30
BuildRun = Callable[[Base, dict[str, object]], Run]


class NoPairs(list[object]):
    """A table that nothing is read of."""

    ids: tuple[str, ...] = ()
    prompts: tuple[str, ...] = ()
    heldout: None = None


def random_batch(base: Base, pairs: int, side: int, seed: int = 0) -> PairBatch:
    """Random latents and conditioning in the shapes that the base's UNet takes."""
    config, g = base.unet.config, torch.Generator().manual_seed(seed)
    pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(1, pairs, *shape, generator=g).expand(2, *(-1,) * (len(shape) + 1))

    pixels = 8 * side
    batch = PairBatch(
        latents=torch.randn(2, pairs, 4, side, side, generator=g),
        cond=Conditioning(
            prompt_embeds=normal(77, config.cross_attention_dim),
            pooled=normal(pooled),
            time_ids=torch.tensor([pixels, pixels, 0, 0, pixels, pixels], dtype=torch.float32).expand(2, pairs, 6),
        ),
        keys=torch.tensor([pair_key(seed, f"pair-{i}", 0) for i in range(pairs)]),
        scores=torch.rand(2, pairs, generator=g),
        transitions=Transitions(
            noisy=torch.randn(1, pairs, 4, side, side, generator=g).expand(2, -1, -1, -1, -1),
            clean=torch.randn(2, pairs, 4, side, side, generator=g),
            t=torch.full((pairs,), 501),
            t_prev=torch.full((pairs,), 451),
        ),
    )
    return replace(batch, uncond=batch.cond.map(torch.zeros_like))


@pytest.fixture(scope="module")
def loaded_base(tiny_sdxl: Path) -> Base:
    """One that nobody changes."""
    return load_base(str(tiny_sdxl), vae_and_text=False)


@pytest.fixture
def tiny_base(loaded_base: Base) -> Base:
    return replace(loaded_base, unet=copy.deepcopy(loaded_base.unet))


@pytest.fixture
def smallest_base(loaded_base: Base) -> Base:
    """All that SDXL's UNet is given, and one block each way; a step on `meta` costs by the operation."""
    small = {
        "block_out_channels": (8,),
        "norm_num_groups": 4,
        "attention_head_dim": 4,
        "cross_attention_dim": 80,
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + 48,
        "down_block_types": ("CrossAttnDownBlock2D",),
        "mid_block_type": None,
        "up_block_types": ("UpBlock2D",),
        "layers_per_block": 1,
        "transformer_layers_per_block": 1,
    }
    with torch.device("meta"):
        unet = type(loaded_base.unet)(**SDXL_UNET | small)
    return replace(loaded_base, unet=unet.requires_grad_(False).eval())


@pytest.fixture
def build_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> BuildRun:
    """The package's own `build` on a base that is in memory, for batches that are made here."""

    def make(base: Base, overrides: dict[str, object]) -> Run:
        monkeypatch.setattr(setup, "load_run_base", lambda config: base)
        monkeypatch.setattr(setup, "Encoder", lambda base, device: None)
        monkeypatch.setattr(setup, "source_builder", lambda *args: lambda networks, unet, former: None)
        tree: dict[str, Any] = {
            "output_dir": str(tmp_path),
            "model": {"pretrained_model_name_or_path": "in memory"},
            "tuning": {},
            "objective": {"name": "dpo"},
            "data": {"path": "in memory", "resolution": 64},
            "training": {"max_train_steps": 10, "report_to": "none"},
        }
        for name, value in overrides.items():
            section, key = name.split(".")
            tree[section][key] = value
        config = parse_config(tree)
        return setup.build(config, make_accelerator(config), table=NoPairs())  # type: ignore[arg-type]

    return make


@pytest.fixture
def exact_cuda() -> Iterator[None]:
    """fp32 without TF32, and kernels that give the same bits every time."""
    before = (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.deterministic = True
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
    torch.backends.cudnn.deterministic = False


def take_step(run: Run, batch: PairBatch) -> dict[str, float]:
    """One optimiser step of the package's loop; its metrics."""
    meter = Meter()
    optimizer_step(run, iter([batch]), meter)
    return meter.means()


# ------------------------------------------------------------------------------------------------- a first step


def check_first_step(run: Run, batch: PairBatch) -> None:
    """Equal weights: the loss is log σ(0) to the last bit, the gradient is not zero, and the step moves the loss."""
    first, second = take_step(run, batch), take_step(run, batch)
    nothing = torch.zeros((), device=run.accelerator.device)
    assert first["loss"] == float(-torch.nn.functional.logsigmoid(nothing))
    assert first["rewards/margins"] == first["displacement"] == 0.0
    assert first["grad_norm"] > 0
    assert second["loss"] != first["loss"]
    assert torch.isfinite(torch.tensor(list(second.values()))).all()


@pytest.mark.parametrize("method", ["lora", "full"])
def test_first_step_tiny(method: str, tiny_base: Base, build_run: BuildRun) -> None:
    run = build_run(tiny_base, {"tuning.method": method, "training.mixed_precision": "bf16"})
    check_first_step(run, random_batch(tiny_base, 2, 8))


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("method", "optimizer", "checkpointing"),
    [
        ("lora", "adamw", False),
        ("full", "adamw", True),
        ("full", "adamw_8bit", True),
        ("full", "adamw_8bit_bf16", True),
        ("full", "adafactor", True),
    ],
)
def test_first_step_sdxl_1024(
    method: str, optimizer: str, checkpointing: bool, build_run: BuildRun, capsys: pytest.CaptureFixture[str]
) -> None:
    if optimizer == "adamw_8bit":
        pytest.importorskip("torchao", reason="needs the extra 8bit")
    base = sdxl_base()
    run = build_run(
        base,
        {
            "tuning.method": method,
            "model.gradient_checkpointing": checkpointing,
            "training.optimizer": optimizer,
            "training.mixed_precision": "bf16",
        },
    )
    torch.cuda.reset_peak_memory_stats()
    check_first_step(run, random_batch(base, 1, 128))
    peak = torch.cuda.max_memory_allocated() / GiB
    with capsys.disabled():
        print(f"\nSDXL 1024 px, {method}, {optimizer}, checkpointing {checkpointing}: peak {peak:.1f} GiB")
    assert peak < 80, "one pair must fit the card that most people mean by a large one"


# ------------------------------------------------------------------------------------------------- 8-bit Adam


@pytest.mark.gpu
def test_eight_bit_adam_follows_adam(tiny_sdxl: Path, build_run: BuildRun) -> None:
    pytest.importorskip("torchao", reason="needs the extra 8bit")
    moved = {}
    for optimizer in ("adamw", "adamw_8bit"):
        base = load_base(str(tiny_sdxl), vae_and_text=False)
        run = build_run(base, {"tuning.method": "full", "training.optimizer": optimizer})
        before = torch.cat([p.detach().flatten().clone() for p in run.parameters])
        for i in range(5):
            take_step(run, random_batch(base, 2, 8, seed=i))
        moved[optimizer] = torch.cat([p.detach().flatten() for p in run.parameters]) - before
    assert float(torch.cosine_similarity(moved["adamw"], moved["adamw_8bit"], dim=0)) > 0.9


# ------------------------------------------------------------------------------------------------- resuming


@pytest.mark.gpu
@pytest.mark.usefixtures("exact_cuda")
@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_two_and_two_steps_are_four_bitwise_on_cuda(
    method: str, precision: str, make_config: Callable[..., Config], tiny_sdxl: Path, tmp_path: Path
) -> None:
    shared = {
        "output_dir": str(tmp_path / "run"),
        "tuning.method": method,
        "model.attention": "math",  # fused backward kernels add up in any order
        "training.mixed_precision": precision,
        "training.ema_decay": 0.9,
        "training.checkpointing_steps": 2,
        "training.checkpoints_total_limit": 1,
    }
    run_training(make_config(tiny_sdxl, shared))
    whole, lines = weights(tmp_path / "run"), metrics(tmp_path / "run")
    run_training(make_config(tiny_sdxl, {**shared, "training.max_train_steps": 2, "overwrite_output_dir": True}))
    run_training(make_config(tiny_sdxl, {**shared, "training.resume_from_checkpoint": "latest"}))
    assert same(weights(tmp_path / "run"), whole)
    assert metrics(tmp_path / "run") == lines


# ------------------------------------------------------------------------------------------------- two passes


def check_two_passes(base: Base, device: str) -> None:
    """The chunked gradient is the direct one; float32 sums in another order, so not to the bit."""
    base.unet.requires_grad_(True).to(device)
    networks = Networks(
        base.unet,
        family=base.family,
        schedule=base.schedule,
        reference=FrozenCopy(base.unet),
        device=device,
    )
    batches = [random_batch(base, 2, 8, seed=s).to(device) for s in range(3)]
    probes = [shared_noise(b, base.schedule) for b in batches]
    probe = replace(
        probes[0],
        xt=torch.stack([p.xt for p in probes], 2),
        t=torch.stack([p.t for p in probes], 1),
        target=torch.stack([p.target for p in probes], 2),
    )

    def score(evidence: Evidence) -> Score:
        mean = evidence.margin.mean(-1)
        return DiffusionDPO(beta=50.0).score(Evidence(mean, torch.zeros_like(mean)))

    gradients = []
    for chunk in (None, 1, 2):
        base.unet.zero_grad(set_to_none=True)
        measure_and_backward(networks, replace(probe, points_per_forward=chunk), score)
        gradients.append(torch.cat([p.grad.flatten() for p in base.unet.parameters() if p.grad is not None]))
    direct = gradients[0]
    assert float(direct.norm()) > 0
    for chunked in gradients[1:]:
        assert float((chunked - direct).norm()) <= 1e-5 * float(direct.norm())


def test_two_passes_tiny(tiny_base: Base) -> None:
    check_two_passes(tiny_base, "cpu")


@pytest.mark.gpu
@pytest.mark.usefixtures("exact_cuda")
def test_two_passes_on_cuda(tiny_base: Base) -> None:
    check_two_passes(tiny_base, "cuda")


# ------------------------------------------------------------------------------------------------- no waiting


def micro_step(networks: Networks, objective: Any, batch: PairBatch, device: str) -> None:
    """What a step does for one micro-batch: to the device, probe, measure, backward, metrics."""
    batch = batch.to(device)
    with torch.no_grad():
        probe = ask(objective, batch, networks)
    evidence, score = measure_and_backward(networks, probe, objective.score)
    Meter().add(observe(evidence, score, networks.schedule.num_train_timesteps))


# what is looked at is the same for every step
FEWER = {"inversion_dpo": {"steps": 2, "substeps": 2}, "inpo": {"steps": 4}, "smpo": {"steps": 4}}


def trained_networks(base: Base, method: str, device: str) -> Networks:
    if method == "lora":
        add_lora(base.unet, rank=4)
    else:
        base.unet.requires_grad_(True)
    base.unet.to(device)
    reference = (LoraOff if method == "lora" else FrozenCopy)(base.unet)
    return Networks(base.unet, family=base.family, schedule=base.schedule, reference=reference, device=device)


class BlockingCopies(TorchDispatchMode):
    """Notes, by the line of the package that asked for it, every copy between devices that waits."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._to_copy.default:
            there = torch.device(kwargs.get("device") or args[0].device)
            blocking = there.type != args[0].device.type and not kwargs.get("non_blocking")
        elif func is torch.ops.aten.copy_.default:
            waits = not (args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
            blocking = args[0].device.type != args[1].device.type and waits
        else:
            blocking = False
        if blocking:
            frames = [f for f in traceback.extract_stack() if "/diffalign/" in f.filename]
            last = frames[-1] if frames else traceback.extract_stack()[-2]
            self.lines.append(f"{Path(last.filename).name}:{last.lineno} {last.line}")
        return func(*args, **kwargs)


def check_waits_for_no_device(base: Base, name: str, method: str) -> None:
    networks = trained_networks(base, method, "meta")
    with BlockingCopies() as copies:
        micro_step(networks, OBJECTIVES[name](**FEWER.get(name, {})), random_batch(base, 2, 8), "meta")
    assert copies.lines == []


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_micro_step_waits_for_no_device(name: str, method: str, smallest_base: Base) -> None:
    """An objective gives the UNet the same tensors whatever its depth, and the one of all layers is below."""
    check_waits_for_no_device(smallest_base, name, method)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_no_layer_waits_for_a_device(method: str, tiny_base: Base) -> None:
    check_waits_for_no_device(tiny_base, "dpo", method)


def test_a_blocking_copy_is_seen() -> None:
    with BlockingCopies() as copies:
        torch.zeros(3).to("meta", non_blocking=True)
        assert copies.lines == []
        torch.zeros(3).to("meta")
        torch.zeros(3, device="meta").copy_(torch.zeros(3))
    assert len(copies.lines) == 2


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_micro_step_waits_for_no_cuda_device(name: str, method: str, tiny_base: Base) -> None:
    networks = trained_networks(tiny_base, method, "cuda")
    objective, batch = OBJECTIVES[name](), random_batch(tiny_base, 2, 8)
    micro_step(networks, objective, batch, "cuda")  # libraries wait when they start
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        micro_step(networks, objective, batch, "cuda")
    finally:
        torch.cuda.set_sync_debug_mode("default")
