"""The step-aware preference model: the authors' numbers, PickScore at the start, files, and what is refused."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from diffalign.contrib.step_aware.clip import StepAwareClip, from_state_dict, step_aware_pixels, timestep_embedding
from diffalign.contrib.step_aware.scorer import StepAware, save_step_aware
from diffalign.rewards import ScorerError, as_step_aware, load_scorer, tie_of
from diffalign.rewards.clip import load_clip
from diffalign.rewards.clip_score import ClipScore
from diffalign.rewards.hpsv21 import HPSv21
from diffalign.rewards.pickscore import PickScore
from tests.golden_spo import spo_parts

# float32 on both sides, other kernels: features of size 1.7 and a rounding of 6e-8 of it in each of some twenty layers
# (1.7e-6 was seen); scores are cosines times e^3 = 20
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
SCORES = {"rtol": 1e-5, "atol": 2e-5}


@pytest.fixture(scope="module")
def released() -> StepAwareClip:
    """The golden tiny model, from a state dict in the release's layout."""
    _, inputs, _ = spo_parts("spm_tiny_float32")
    state = {f"model.{name}": value for name, value in inputs["state_dict"].items()}
    state["model.vision_model.embeddings.position_ids"] = torch.arange(5)[None]  # older checkpoints carry it
    return from_state_dict(state, heads=2).eval()


@pytest.fixture(scope="module")
def step_aware_dir(clip_dir, tmp_path_factory):
    """A saved model that is no longer its CLIP: every adaLN weight has moved."""
    clip = load_clip(str(clip_dir), str(clip_dir), "cpu")
    model = StepAwareClip(clip.model)
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if "adaLN" in name:
            parameter.data += 0.5 * torch.randn_like(parameter)
    folder = tmp_path_factory.mktemp("spm") / "preference_model"
    save_step_aware(model, clip.tokenizer, folder)
    return folder


def test_timestep_embedding() -> None:
    params, inputs, outputs = spo_parts("timestep_embedding")
    embedding = timestep_embedding(inputs["t"], params["dim"], params["max_period"])
    torch.testing.assert_close(embedding, outputs["embedding"], **CLOSE)


@torch.no_grad()
def test_the_authors_network(released: StepAwareClip) -> None:
    _, inputs, outputs = spo_parts("spm_tiny_float32")
    t, ids = inputs["time_cond"], inputs["input_ids"]
    torch.testing.assert_close(released.t_embedder(t), outputs["time_embedding"], **CLOSE)
    torch.testing.assert_close(released.image_features(inputs["pixel_values"], t), outputs["image_features"], **CLOSE)
    torch.testing.assert_close(released.text_features(ids), outputs["text_features"], **CLOSE)
    for shape in ("square", "wide"):
        pixels = step_aware_pixels(inputs[f"images_{shape}"], 16)
        images, texts, scale = released(pixels, t, ids, None)
        torch.testing.assert_close(scale * (images * texts).sum(-1), outputs[f"scores_{shape}"], **SCORES)


@torch.no_grad()
@pytest.mark.parametrize("t", [0, 251, 999])
def test_at_the_start_it_is_the_clip(t: int) -> None:
    from transformers import CLIPConfig, CLIPModel

    params, inputs, _ = spo_parts("spm_tiny_float32")
    _, _, outputs = spo_parts("spm_identity_at_init")
    config = CLIPConfig(text_config=params["text"], vision_config=params["vision"], projection_dim=6)
    clip = CLIPModel(config).eval()
    names = clip.state_dict().keys()
    clip.load_state_dict({name: value for name, value in inputs["state_dict"].items() if name in names})
    pooled = clip.vision_model(pixel_values=inputs["pixel_values"]).pooler_output
    plain = clip.visual_projection(pooled)
    features = StepAwareClip(clip).eval().image_features(inputs["pixel_values"], torch.full((3,), t))
    torch.testing.assert_close(features, outputs["image_features_any_t"], **CLOSE)
    torch.testing.assert_close(features, plain, **CLOSE)


def test_at_the_start_it_scores_as_pickscore(clip_dir, tmp_path, pictures, prompts) -> None:
    """On images of CLIP's own size, where nothing is resized."""
    clip = load_clip(str(clip_dir), str(clip_dir), "cpu")
    save_step_aware(StepAwareClip(clip.model), clip.tokenizer, tmp_path)
    scorer = load_scorer(f"step-aware={tmp_path}")
    fitted = [picture.resize((32, 32)) for picture in pictures]
    expected = PickScore(str(clip_dir)).score(fitted, prompts)
    for t in (None, torch.zeros(5, dtype=torch.int64), torch.tensor([1, 200, 500, 900, 999])):
        torch.testing.assert_close(scorer.score(fitted, prompts, t), expected, rtol=0, atol=1e-4)


def test_the_timestep_matters_once_trained_and_the_batch_does_not(step_aware_dir, pictures, prompts) -> None:
    scorer = StepAware(str(step_aware_dir))
    t = torch.tensor([1, 200, 500, 900, 999])
    scores = scorer.score(pictures * 8, prompts * 8, t.repeat(8))  # 40 images: more than one batch
    alone = [scorer.score([p], [text], t[i : i + 1]) for i, (p, text) in enumerate(zip(pictures, prompts, strict=True))]
    torch.testing.assert_close(scores, torch.cat(alone).repeat(8), rtol=0, atol=1e-4)
    assert ((scores - scorer.score(pictures * 8, prompts * 8)).abs() > 1e-2).all()
    assert scorer.score([], [], torch.zeros(0, dtype=torch.int64)).shape == (0,)


def test_a_released_file_is_the_folder(clip_dir, tmp_path, pictures, prompts) -> None:
    """A pickled state dict with the release's prefix, and no config beside it: sixteen heads, as in ViT-H/14."""
    from transformers import CLIPConfig, CLIPModel

    tower = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 16, "hidden_act": "gelu"}
    clip = load_clip(str(clip_dir), str(clip_dir), "cpu")
    words = clip.model.config.text_config
    torch.manual_seed(0)
    model = StepAwareClip(
        CLIPModel(
            CLIPConfig(
                text_config={
                    **tower,
                    "num_hidden_layers": 1,
                    "vocab_size": words.vocab_size,
                    "max_position_embeddings": words.max_position_embeddings,
                    "eos_token_id": words.eos_token_id,
                },
                vision_config={**tower, "num_hidden_layers": 3, "image_size": 32, "patch_size": 8},
                projection_dim=16,
            )
        )
    )
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    save_step_aware(model, clip.tokenizer, tmp_path / "folder")
    torch.save({f"model.{name}": value for name, value in model.state_dict().items()}, tmp_path / "released.bin")
    t = torch.tensor([0, 10, 100, 500, 999])
    from_file = StepAware(str(tmp_path / "released.bin"), tokenizer=str(clip_dir)).score(pictures, prompts, t)
    torch.testing.assert_close(
        from_file, StepAware(str(tmp_path / "folder")).score(pictures, prompts, t), rtol=0, atol=1e-5
    )


def test_a_run_is_named_by_its_output_folder(step_aware_dir, pictures, prompts) -> None:
    outer, inner = StepAware(str(step_aware_dir.parent)), StepAware(str(step_aware_dir))
    torch.testing.assert_close(outer.score(pictures, prompts), inner.score(pictures, prompts), **SCORES)


def test_half_precision_weights_are_used_in_float32(step_aware_dir, tmp_path, pictures, prompts) -> None:
    whole = StepAware(str(step_aware_dir))
    save_step_aware(whole.clip.model, whole.clip.tokenizer, tmp_path, torch.float16)
    half = StepAware(str(tmp_path))
    assert {p.dtype for p in half.clip.model.parameters()} == {torch.float32}
    # weights rounded to 11 bits move scores of about 14 by far less than that
    torch.testing.assert_close(half.score(pictures, prompts), whole.score(pictures, prompts), rtol=0, atol=0.05)


def test_an_overlong_prompt_is_cut(step_aware_dir, pictures) -> None:
    scorer = StepAware(str(step_aware_dir))
    long = "a prompt of far more letters than the context holds"  # twelve tokens, one a letter
    assert torch.equal(scorer.score(pictures[:1], [long]), scorer.score(pictures[:1], [f"{long} and more"]))
    assert not torch.equal(scorer.score(pictures[:1], [long]), scorer.score(pictures[:1], ["another prompt"]))


def test_what_is_missing_is_named(step_aware_dir, tmp_path) -> None:
    with pytest.raises(ScorerError, match=r"no weights are named.*step-aware=PATH"):
        load_scorer("step-aware")
    with pytest.raises(ScorerError, match=r"there is no .*nowhere"):
        load_scorer(f"step-aware={tmp_path / 'nowhere'}")
    (tmp_path / "config.json").write_text((step_aware_dir / "config.json").read_text())
    with pytest.raises(ScorerError, match=r"has no model\.safetensors"):
        load_scorer(f"step-aware={tmp_path}")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("t_embedder.mlp.0.bias"), r"missing \['t_embedder.mlp.0.bias'\]"),
        (lambda s: s.update({"extra.weight": torch.zeros(1)}), r"unexpected \['extra.weight'\]"),
        (
            lambda s: s.update({"t_embedder.mlp.0.bias": torch.zeros(3)}),
            r"another shape \['t_embedder.mlp.0.bias \(3,\)",
        ),
        (lambda s: s.pop("visual_projection.weight"), "visual_projection.weight' is missing"),
        (lambda s: s.clear(), "patch_embedding.weight' is missing"),
    ],
)
def test_another_state_dict_is_refused(change, message: str) -> None:
    _, inputs, _ = spo_parts("spm_tiny_float32")
    state = dict(inputs["state_dict"])
    change(state)
    with pytest.raises(ScorerError, match=message):
        from_state_dict(state, heads=2)


def test_scores_that_are_not_finite_name_the_prompt(step_aware_dir, pictures, prompts) -> None:
    scorer = StepAware(str(step_aware_dir))
    scorer.clip.model.t_embedder.mlp[2].bias.data[0] = float("nan")
    with pytest.raises(ScorerError, match=r"gave nan for 'a red fox' \(5 of 5 scores"):
        scorer.score(pictures, prompts)


class Lightness:
    name, tie = "lightness", 0.25

    def __init__(self, value: float = 1.0) -> None:
        self.value = value

    def score(self, images, prompts):
        return torch.tensor([self.value if text == "dark" else 2.0 for text in prompts])


def test_any_scorer_stands_in(clip_dir, step_aware_dir, pictures, prompts) -> None:
    t = torch.tensor([0, 10, 100, 500, 999])
    plain = ClipScore(str(clip_dir))
    assert torch.equal(as_step_aware(plain).score(pictures, prompts, t), plain.score(pictures, prompts))
    trained = StepAware(str(step_aware_dir))
    assert torch.equal(as_step_aware(trained).score(pictures, prompts, t), trained.score(pictures, prompts, t))
    assert (as_step_aware(Lightness()).name, tie_of(as_step_aware(Lightness()))) == ("lightness", 0.25)
    assert tie_of(as_step_aware(plain)) == tie_of(plain) != HPSv21.tie


def test_a_stand_in_is_checked() -> None:
    images = [Image.new("RGB", (8, 8))] * 2
    t = torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ScorerError, match=r"'lightness' gave nan for 'dark' \(1 of 2"):
        as_step_aware(Lightness(float("nan"))).score(images, ["light", "dark"], t)
    for wrong in (t[:1], t.float(), t[0]):
        with pytest.raises(ScorerError, match="one int64 timestep per image"):
            as_step_aware(Lightness()).score(images, ["light", "dark"], wrong)
    with pytest.raises(ScorerError, match="2 images and 1 prompts"):
        as_step_aware(Lightness()).score(images, ["dark"], t)
