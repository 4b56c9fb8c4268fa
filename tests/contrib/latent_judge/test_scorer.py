"""The latent judge: its arithmetic against the whole UNet's, its folder and the released one, what is refused."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from diffalign.contrib.latent_judge.files import load_judge, save_judge
from diffalign.contrib.latent_judge.network import feature_width
from diffalign.contrib.latent_judge.scorer import LatentScorer
from diffalign.engine.schedule import NoiseSchedule
from diffalign.models.loading.base import Base, load_base
from diffalign.rewards import ScorerError, load_scorer
from diffalign.rewards import load_judge as load_any
from diffalign.sources import BranchingRollout, Context
from diffalign.sources.chains import Chains

PROMPTS = ["a red circle", "a blue square", "a photo"]
Folder = Callable[[str], Path]


def latents() -> tuple[Tensor, Tensor]:
    return torch.randn(3, 4, 16, 16, generator=torch.Generator().manual_seed(5)), torch.tensor([901, 301, 1])


def by_hand(base: Base, judge: Any, x: Tensor, t: Tensor, guidance: float) -> np.ndarray:
    """The scores from the whole UNet of diffusers, one image at a time, with hooks on its layers, in float64."""
    seen: list[np.ndarray] = []
    unet: Any = base.unet

    def keep(_: object, __: object, out: Any) -> None:
        seen.append((out[0] if isinstance(out, tuple) else out.sample if hasattr(out, "sample") else out).numpy())

    for block in unet.down_blocks:
        layers = getattr(block, "attentions", None) or block.resnets
        layers[-1].register_forward_hook(keep)
    unet.mid_block.register_forward_hook(keep)
    scores = []
    for i, prompt in enumerate(PROMPTS):
        features = []
        for words in (prompt, ""):
            seen.clear()
            states, added, vector = text(base, words)
            if words == prompt:
                compared = vector
            unet(x[i : i + 1].double(), t[i : i + 1], states, added_cond_kwargs=added)
            features.append([s.mean((0, 2, 3)) for s in seen])
        *stages, middle = features[0]
        null = features[1][-1]
        vision = judge["visual_projection.weight"] @ np.concatenate([*stages, null + guidance * (middle - null)])
        if "text_projection.weight" in judge:
            compared = judge["text_projection.weight"] @ compared
        cosine = vision @ compared / np.linalg.norm(vision) / np.linalg.norm(compared)
        scores.append(math.exp(judge["logit_scale"]) * cosine)
    return np.array(scores)


def text(base: Base, prompt: str) -> tuple[Tensor, dict[str, Tensor] | None, np.ndarray]:
    """States, SDXL's other conditions, and the pooled vector of one prompt."""
    assert base.text is not None
    outs = []
    for tokenizer, model in zip(base.text.tokenizers, base.text.models, strict=True):
        ids = tokenizer(prompt, padding="max_length", max_length=tokenizer.model_max_length, return_tensors="pt")
        outs.append(model(ids.input_ids, output_hidden_states=True))
    if len(outs) == 1:
        return outs[0].last_hidden_state, None, outs[0].pooler_output[0].numpy()
    sizes = torch.tensor([[32.0, 32, 0, 0, 32, 32]])  # 16 latents of 2 pixels
    added = {"text_embeds": outs[1].text_embeds, "time_ids": sizes}
    return torch.cat([o.hidden_states[-2] for o in outs], -1), added, outs[1].text_embeds[0].numpy()


@pytest.mark.parametrize(("family", "guidance"), [("sd", 7.5), ("sdxl", 7.5), ("sdxl", 1.0)])
@torch.no_grad()
def test_the_score_is_that_of_the_whole_unets_features(
    family: str, guidance: float, judge_folder: Folder, request: pytest.FixtureRequest
) -> None:
    base = load_base(str(request.getfixturevalue(f"tiny_{family}")))
    assert base.text is not None
    for module in (base.unet, *base.text.models):
        module.double()
    scorer = LatentScorer(str(judge_folder(family)))
    scorer.judge.guidance = guidance
    head = {k: v.double().numpy() for k, v in scorer.judge.state_dict().items() if "projection" in k or "scale" in k}
    x, t = latents()
    expected = by_hand(base, head, x, t, guidance)
    single = scorer.score_latents(x, PROMPTS, t)
    np.testing.assert_allclose(single.numpy(), expected, rtol=2e-5, atol=2e-5)
    scorer.judge.double()
    scorer._read = ((), None)  # the text of the float32 network
    double = scorer.score_latents(x, PROMPTS, t)
    assert double.dtype == torch.float64
    np.testing.assert_allclose(double.numpy(), expected, rtol=1e-9)


def test_the_batch_changes_no_score_and_prompt_t_and_latent_do(judge_folder: Folder) -> None:
    scorer, (x, t) = LatentScorer(str(judge_folder("sdxl"))), latents()
    whole = scorer.score_latents(x, PROMPTS, t)
    alone = [scorer.score_latents(x[i : i + 1], PROMPTS[i : i + 1], t[i : i + 1]) for i in range(3)]
    torch.testing.assert_close(torch.cat(alone), whole, rtol=1e-5, atol=1e-6)
    turned = scorer.score_latents(x.flip(0), PROMPTS[::-1], t.flip(0))
    torch.testing.assert_close(turned.flip(0), whole, rtol=1e-5, atol=1e-6)
    for other in (
        scorer.score_latents(x.roll(1, 0), PROMPTS, t),
        scorer.score_latents(x, [*PROMPTS[1:], PROMPTS[0]], t),
        scorer.score_latents(x, PROMPTS, t.roll(1)),
    ):
        assert (other - whole).abs().min() > 1e-5


@pytest.mark.parametrize(("channels", "width"), [((320, 640, 1280, 1280), 4800), ((320, 640, 1280), 3520)])
def test_the_released_widths(channels: tuple[int, ...], width: int) -> None:
    """Of SD1.5 and SDXL, as the release writes them into its projections."""
    down = ("DownBlock2D",) * len(channels)
    up = ("UpBlock2D",) * len(channels)
    with torch.device("meta"):
        unet = UNet2DConditionModel(block_out_channels=channels, down_block_types=down, up_block_types=up)
    assert feature_width(unet) == width


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_a_released_folder_is_read(
    family: str, judge_folder: Folder, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Whole UNet, text encoders and the head in one pickle of nested dictionaries; the tokenizers are the base's."""
    tiny, (x, t) = request.getfixturevalue(f"tiny_{family}"), latents()
    own = LatentScorer(str(judge_folder(family)))
    released = tmp_path / "lrm"
    for part in ("unet", "text_encoder", "text_encoder_2"):
        if (tiny / part).is_dir():
            shutil.copytree(tiny / part, released / part)
    names = ("visual_projection", "text_projection") if family == "sd" else ("visual_projection",)
    head: dict[str, Any] = {name: getattr(own.judge, name).state_dict() for name in names}
    torch.save({**head, "logit_scale": float(own.judge.logit_scale)}, released / "state_dict.pt")
    with pytest.raises(ValueError, match=r"the tokenizer of .* has no files"):
        LatentScorer(str(released))
    for part in ("tokenizer", "tokenizer_2"):
        if (tiny / part).is_dir():
            shutil.copytree(tiny / part, released / part)
    found = LatentScorer(str(released))
    assert found.facts.guidance_scale == 7.5
    found.facts = own.facts  # the tiny VAE's latents are of two pixels, the released models' of eight
    assert torch.equal(found.score_latents(x, PROMPTS, t), own.score_latents(x, PROMPTS, t))


def test_half_precision_is_stored_and_float32_computes(judge_folder: Folder, tmp_path: Path) -> None:
    judge, tokenizers, facts = load_judge(str(judge_folder("sd")))
    save_judge(judge, tokenizers, facts, tmp_path / "run" / "preference_model", torch.float16)
    half = LatentScorer(str(tmp_path / "run"))
    assert {p.dtype for p in half.judge.parameters()} == {torch.float32}
    x, t = latents()
    whole = LatentScorer(str(judge_folder("sd"))).score_latents(x, PROMPTS, t)
    torch.testing.assert_close(half.score_latents(x, PROMPTS, t), whole, rtol=0, atol=2e-2)


def test_what_does_not_fit_is_named(judge_folder: Folder, tmp_path: Path, make_context: Callable[..., Context]) -> None:
    folder = judge_folder("sd")
    with pytest.raises(ScorerError, match=r"judges noisy latents.*source.scorer of the source rollout"):
        load_scorer(f"latent-judge={folder}")
    with pytest.raises(ScorerError, match=r"(?s)there is no folder .*hf download casiatao/LRM"):
        load_any("latent-judge=nowhere")
    scorer, (x, t) = load_any(f"latent-judge={folder}"), latents()
    with pytest.raises(ScorerError, match="got 3 latents, 2 prompts and 3 timesteps"):
        scorer.score_latents(x, PROMPTS[:2], t)
    with pytest.raises(ScorerError, match=r"gave nan for 'a red circle' \(3 of 3"):
        scorer.score_latents(x * float("nan"), PROMPTS, t)
    context = make_context("sdxl", PROMPTS)
    with pytest.raises(ScorerError, match="latents of 4 channels of sd models, and these are of 4 channels of an sdxl"):
        Chains(BranchingRollout("", sampling_steps=5), context, scorer)
    own, other = ({"prediction_type": "epsilon", "beta_schedule": name} for name in ("scaled_linear", "linear"))
    betas = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012}
    scorer.check_latents("sd", 4, NoiseSchedule.from_config({**betas, **own}))
    with pytest.raises(ScorerError, match=r"trained where ᾱ is .* at t = 124, and this base's schedule has"):
        scorer.check_latents("sd", 4, NoiseSchedule.from_config({**betas, **other}))
    broken = shutil.copytree(folder, tmp_path / "broken")
    config = json.loads((broken / "unet/config.json").read_text())
    (broken / "unet/config.json").write_text(json.dumps({**config, "block_out_channels": [32, 32]}))
    with pytest.raises(ScorerError, match=r"the UNet in .* does not fit a latent judge of its config: .*another shape"):
        load_any(f"latent-judge={broken}")
    for key, value in (
        ("family", "SDXL"),
        ("guidance_scale", None),
        ("pixels_per_latent", 0),
        ("noise_levels", [[0, 2.0]]),
    ):
        facts = json.loads((folder / "judge.json").read_text())
        (broken / "judge.json").write_text(json.dumps({**facts, key: value}))
        with pytest.raises(
            ScorerError, match=rf"judge.json is not a latent judge's \({key} is {re.escape(repr(value))}, and must be"
        ):
            load_any(f"latent-judge={broken}")
    (broken / "head.safetensors").unlink()
    with pytest.raises(ScorerError, match=r"no head.safetensors and no state_dict.pt"):
        load_any(f"latent-judge={broken}")
