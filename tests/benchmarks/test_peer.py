"""Our cached LoRA step against the arithmetic of diffusers' `train_diffusion_dpo_sdxl.py`, on the same draws."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from benchmarks.peer import PeerBatch, PeerSettings, add_adapter, peer_loss
from diffalign.config.schema import Config
from diffalign.data.cache.latents import CacheSpec, open_cache
from diffalign.data.table.open import open_pairs
from diffalign.engine.measure import measure_and_backward
from diffalign.models.adapters.lora import lora_parameters
from diffalign.models.loading.base import load_base
from diffalign.models.loading.encoder import Encoder
from diffalign.objectives.base import ask
from diffalign.training.build import Run, build
from diffalign.training.processes import make_accelerator
from diffalign.types import PairBatch, Probe

BETA = 500.0


def peer_on(folder: Path, rank: int) -> tuple[nn.Module, object, list[nn.Parameter]]:
    """The peer's UNet with its adapter, its scheduler, and what it trains."""
    from diffusers import DDPMScheduler, UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
    return unet, DDPMScheduler.from_pretrained(folder, subfolder="scheduler"), add_adapter(unet, rank)


def as_the_peer_has_it(batch: PairBatch, probe: Probe) -> PeerBatch:
    """Latents, t, ε and conditioning of our step in the peer's layout: sides along the batch, chosen first."""
    cond = probe.cond.flatten()
    noise = probe.target  # of a network that predicts noise
    return PeerBatch(
        latents=batch.latents.flatten(0, 1),
        noise=noise.flatten(0, 1),
        timesteps=probe.t.repeat(2),
        prompt_embeds=cond.prompt_embeds,
        pooled=cond.pooled,
        time_ids=cond.time_ids,
    )


def cached_run(
    make_config: Callable[..., Config], folder: Path, tmp_path: Path, rank: int = 4, kept: bool = False
) -> Run:
    settings = {
        **({"data.draws_per_pair": 2, "data.cache_reference_errors": True} if kept else {}),
        "tuning.rank": rank,
        "tuning.alpha": rank,
        "objective": {"name": "dpo", "beta": BETA},
        "data.cache_dir": str(tmp_path / "cache"),
        "training.train_batch_size": 3,
    }
    config = make_config(folder, settings)
    return build(config, make_accelerator(config))


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("moved", [0.0, 0.05])
def test_loss_and_lora_gradients_are_the_peers(
    moved: float, kept: bool, make_config: Callable[..., Config], tiny_sdxl: Path, tmp_path: Path
) -> None:
    """At the start, and with adapters that have moved, so that policy and reference differ; with the reference's
    errors read from the cache, too, where the reference is gone and cannot be asked."""
    run = cached_run(make_config, tiny_sdxl, tmp_path, kept=kept)
    assert (run.networks._reference is None) == kept
    ours = lora_parameters(run.unet)
    unet, scheduler, _ = peer_on(tiny_sdxl, rank=4)
    theirs = lora_parameters(unet)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for own, other in zip(ours, theirs, strict=True):
            own.add_(moved * torch.randn(own.shape, generator=generator))
            other.copy_(own)

    batch = next(run.source.batches())
    probe = ask(run.objective, batch, run.networks)
    assert (probe.reference is not None) == kept
    _, score = measure_and_backward(run.networks, probe, run.objective.score)
    loss = peer_loss(unet, scheduler, as_the_peer_has_it(batch, probe), BETA)["loss"]
    loss.backward()

    assert float(score.loss.mean()) == pytest.approx(loss.item(), rel=1e-4)
    if moved:
        assert abs(loss.item() - 0.6931) > 0.01
    whole = [torch.cat([p.grad.flatten() for p in parameters]) for parameters in (ours, theirs)]
    assert float(whole[1].norm()) > 0
    assert relative(*whole) < 1e-4
    for own, other in zip(ours, theirs, strict=True):
        if float(other.grad.norm()) > 1e-6 * float(whole[1].norm()):  # at B = 0 the gradient of A is exactly 0
            assert relative(own.grad, other.grad) < 1e-4


def test_the_same_images_give_the_same_moments_and_embeddings(tiny_sdxl: Path, tmp_path: Path) -> None:
    """What the peer encodes at every step is what our cache holds: VAE mean and std, both text encoders."""
    from accelerate.state import AcceleratorState

    from benchmarks.models import pairs_file
    from benchmarks.peer import Peer
    from diffalign.data.precompute.latents import encode_cache

    AcceleratorState._reset_state(reset_partial_state=False)
    file = pairs_file(tmp_path / "pairs.parquet", 4, 64)
    peer = Peer(tiny_sdxl, file, PeerSettings(resolution=64, rank=4), "cpu")
    table = open_pairs(str(file))
    encoder = Encoder(load_base(str(tiny_sdxl)))
    done = encode_cache(table, encoder, tmp_path / "cache", CacheSpec(64))
    cache = open_cache(tmp_path / "cache", done.key)

    rows = peer.loader.dataset
    for i, row in enumerate(rows):
        chosen, rejected = row["pixels"].split(3)
        moments, geometry = cache.moments(i, 0)
        for side, pixels in enumerate((chosen, rejected)):
            posterior = peer.vae.encode(pixels[None]).latent_dist
            mean, std = moments[side].chunk(2)
            scale = peer.vae.config.scaling_factor
            torch.testing.assert_close(mean, posterior.mean[0] * scale, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(std, posterior.std[0] * scale, rtol=1e-4, atol=1e-5)
        assert geometry[0].tolist() == [64, 64, 0, 0, 64, 64]
        embeds, pooled = peer._encode([row["tokens_one"][None], row["tokens_two"][None]])
        own_embeds, own_pooled = cache.text(i)
        torch.testing.assert_close(own_embeds, embeds, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(own_pooled, pooled, rtol=1e-4, atol=1e-5)
    peer.step()
    assert peer.logged[0]["loss"] == pytest.approx(0.6931472, abs=1e-6)
