"""Self-play against an independent statement of SPIN, and runs that are stopped and resumed."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from diffusers import DDIMScheduler, StableDiffusionPipeline

from diffalign.config.schema import Config, ConfigError
from diffalign.engine.random import initial_noise, integers, normal
from diffalign.models.loading.family import ModelError
from diffalign.sources.rounds import NO_SEED, About, Round
from diffalign.sources.selfplay import SelfPlay
from diffalign.training.build import build
from diffalign.training.metrics import Meter
from diffalign.training.run import run_training
from diffalign.training.step import optimizer_step
from tests.training.test_run import metrics, same, weights

MakeConfig = Callable[..., Config]
SOURCE = {
    "name": "selfplay",
    "updates_per_iteration": 2,
    "images_per_iteration": 4,
    "sampling_steps": 2,
    "generation_batch_size": 4,
}


def test_which_policy_is_the_reference() -> None:
    assert [SelfPlay(reference="initial").entry(0, k) for k in range(4)] == [0, 0, 0, 0]
    assert [SelfPlay(reference="latest").entry(0, k) for k in range(4)] == [0, 1, 2, 3]
    drawn = [[SelfPlay().entry(seed, k) for k in range(5)] for seed in range(200)]
    assert drawn == [[SelfPlay().entry(seed, k) for k in range(5)] for seed in range(200)]
    for k in range(5):
        shares = torch.bincount(torch.tensor([row[k] for row in drawn])) / 200
        assert len(shares) == k + 1
        assert float((shares - 1 / (k + 1)).abs().max()) < 0.15  # sd at most .035


def test_spin_equals_an_independent_statement(make_config: MakeConfig, tiny_sd: Path) -> None:
    """Two iterations of two updates, retold with diffusers' pipeline and scheduler and torch's AdamW."""
    beta, lr = 500.0, 1e-4
    config = make_config(
        tiny_sd,
        {
            "tuning.method": "full",
            "objective": {"name": "seppo", "beta": beta, "flip": "none"},
            "source": {**SOURCE, "reference": "latest", "keep_rounds": True},
            "training.learning_rate": lr,
            "training.adam_epsilon": 1e-4,  # Adam's first steps are lr·sign(g): without this, rounding decides signs
            "training.max_grad_norm": None,
        },
    )
    run = build(config, Accelerator(cpu=True))
    pipe = StableDiffusionPipeline.from_pretrained(tiny_sd, safety_checker=None)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    pipe.set_progress_bar_config(disable=True)
    theta, start = pipe.unet, copy.deepcopy(pipe.unet)
    theta.requires_grad_(True)
    adam = torch.optim.AdamW(theta.parameters(), lr=lr, weight_decay=1e-2, eps=1e-4)
    batches, rejected = run.source.batches(), {}
    for step in range(4):
        batch = next(batches)
        if step % 2 == 0:  # the reference of this iteration: the latest policy, through its bfloat16 difference
            reference = copy.deepcopy(start)
            for r, p in zip(reference.parameters(), theta.parameters(), strict=True):
                r.data += (p.data - r.data).to(torch.bfloat16).float()
            number = step // 2
            pairs = Round(run.output_dir / "source/rounds", About(number, step, run.source.spec.key))
            assert len(pairs) == 4
            made = [pairs[i] for i in range(4)]
            prompts = [run.table.prompts[int(pair.prompt)] for pair in made]
            seeds = [int(pair.seeds[1]) for pair in made]
            assert all(int(pair.seeds[0]) == NO_SEED for pair in made)
            pipe.unet = reference
            noise = initial_noise(prompts, seeds, (4, 8, 8))
            settings = {"num_inference_steps": 2, "guidance_scale": 5.0, "width": 32, "height": 32}
            rejected = pipe(prompts, latents=noise, output_type="latent", **settings).images
            ours = torch.cat([pair.latents[1] for pair in made])
            torch.testing.assert_close(ours, rejected, rtol=1e-4, atol=1e-4)
        t = integers(batch.keys, "t", 0, 1000)
        eps = normal(batch.keys, "noise", (4, 8, 8))
        text = batch.cond.prompt_embeds[0]

        def error(unet, x0, t=t, eps=eps, text=text):
            xt = pipe.scheduler.add_noise(x0, eps, t)
            return ((unet(xt, t, encoder_hidden_states=text).sample - eps) ** 2).mean((1, 2, 3))

        margin = []
        for x0 in batch.latents:
            with torch.no_grad():
                frozen = error(reference, x0)
            margin.append(error(theta, x0) - frozen)
        loss = -torch.nn.functional.logsigmoid(-beta / 2 * (margin[0] - margin[1])).mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
        meter = Meter()
        optimizer_step(run, iter([batch]), meter)
        assert meter.means()["loss"] == pytest.approx(loss.item(), rel=1e-3)
    ours, theirs, before = (
        torch.cat([p.detach().flatten() for p in unet.parameters()]) for unet in (run.unet, theta, start)
    )
    # rounding grows where Adam divides by a small gradient: 1e-3 of the way the weights have gone
    assert float((ours - theirs).norm()) < 1e-3 * float((theirs - before).norm())


@pytest.mark.parametrize(("method", "flip"), [("lora", "anchor"), ("full", "indicator")])
def test_a_stop_inside_an_iteration_changes_nothing(
    method: str, flip: str, make_config: MakeConfig, tiny_sdxl: Path, tmp_path: Path
) -> None:
    shared: dict[str, Any] = {
        "seed": 1,  # with which the second iteration's reference is not the start
        "tuning.method": method,
        "objective": {"name": "seppo", "beta": 500.0, "flip": flip},
        "source": SOURCE,
        "training.checkpointing_steps": 3,
        "training.learning_rate": 1e-4,
        "data.proportion_empty_prompts": 0.3,
        "data.random_flip": True,
    }
    assert [SelfPlay().entry(1, k) for k in range(2)] == [0, 1]
    whole = make_config(tiny_sdxl, {**shared, "output_dir": str(tmp_path / "whole")})
    run_training(whole)
    cut = {**shared, "output_dir": str(tmp_path / "cut")}
    run_training(make_config(tiny_sdxl, {**cut, "training.max_train_steps": 3}))
    for part in ("unet", "pytorch_lora_weights.safetensors"):
        if (tmp_path / "cut" / part).exists():
            (tmp_path / "cut" / part).rename(tmp_path / part)
    resumed = make_config(tiny_sdxl, {**cut, "training.resume_from_checkpoint": "latest"})
    run_training(resumed)
    assert same(weights(tmp_path / "cut"), weights(tmp_path / "whole"))
    lines = metrics(tmp_path / "whole")
    assert lines[0]["loss"] == float(torch.tensor(2.0).log())
    assert lines[0]["flip_rate"] == 1.0
    assert lines[0]["rollout/pairs"] == lines[2]["rollout/pairs"] == 4.0
    assert "rollout/pairs" not in lines[1]
    state = json.loads((tmp_path / "cut/checkpoint-3/source.json").read_text())
    assert (state["round"], state["used"]) == (1, 1)

    # and once more, with the snapshot gone
    for file in (tmp_path / "cut/source/history/policy-00001").iterdir():
        file.unlink()
    (tmp_path / "cut/source/history/policy-00001").rmdir()
    with pytest.raises(ModelError, match=r"snapshot .*policy-00001.* is missing"):
        run_training(make_config(tiny_sdxl, {**cut, "training.resume_from_checkpoint": "checkpoint-3"}))


def test_winners_alone_and_what_cannot_be_read(make_config: MakeConfig, tiny_sd: Path, tmp_path: Path) -> None:
    import shutil

    import numpy as np
    from PIL import Image

    folder = tmp_path / "winners"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(4):
        Image.fromarray(rng.integers(0, 255, (50, 40, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    rows = [{"prompt": f"a red circle {i}", "image": f"{i}.png"} for i in range(4)]
    (folder / "w.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = make_config(
        tiny_sd,
        {"objective": {"name": "seppo"}, "source": SOURCE, "data.path": str(folder / "w.jsonl")},
    )
    run = build(config, Accelerator(cpu=True))
    assert run.reference_kind == "former"
    (folder / "2.png").unlink()
    batches = list(islice(run.source.batches(), 2))
    assert len({name for batch in batches for name in batch.ids}) == 3
    assert sorted(run.source.take_metrics()["rollout/valid"].tolist()) == [0, 1, 1, 1]
    assert batches[0].latents.shape == (2, 2, 4, 8, 8)
    shutil.rmtree(folder)


def test_settings_are_checked(make_config: MakeConfig, tiny_sd: Path) -> None:
    with pytest.raises(ConfigError, match="Input should be 'initial', 'latest' or 'random'"):
        make_config(tiny_sd, {"source": {"name": "selfplay", "reference": "newest"}})
    with pytest.raises(ValueError, match="updates_per_iteration = 0"):
        SelfPlay(updates_per_iteration=0)
    with pytest.raises(ConfigError, match=r"data\.invert_preference: source selfplay"):
        make_config(tiny_sd, {"source": {"name": "selfplay"}, "data.invert_preference": True})
