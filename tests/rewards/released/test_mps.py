"""MPS against its published arithmetic, restated head by head on random weights of the released layout."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from diffalign.errors import ModelError
from diffalign.rewards import ScorerError, load_scorer
from diffalign.rewards.preprocess import clip_pixels, crop
from diffalign.rewards.released import mps
from diffalign.rewards.released.mps_layers import MpsLayers
from tests.rewards.released.mps import TINY, Sizes, read_image, shapes
from tests.rewards.released.weights import on_meta, random_state

HEADS = 2


@pytest.fixture(scope="module")
def state():
    return random_state(shapes(TINY), scale=0.3)


def score_one(state, pixels, prompt, condition, threshold):
    """The score of one image, as the authors' evaluation script computes it, with transformers' CLIP."""
    from transformers import CLIPModel

    names = {k.removeprefix("model."): v for k, v in state.items() if k.startswith("model.") and "_ids" not in k}
    clip = CLIPModel(mps.clip_config(names, HEADS)).eval()
    clip.load_state_dict(names)
    clip.to(pixels.dtype)
    text, wanted = (clip.text_model(input_ids=ids[None]) for ids in (prompt, condition))
    words, wishes = (clip.text_projection(x.last_hidden_state)[0] for x in (text, wanted))
    near = torch.einsum("id,jd->ji", words, wishes).max(0).values
    image = clip.visual_projection(clip.vision_model(pixel_values=pixels[None]).last_hidden_state)[0]
    read = read_image(state, TINY, image, words, near / near.max() > threshold)[0]
    end = clip.text_projection(text.pooler_output)[0]
    return state["model.logit_scale"].exp() * (read / read.norm()) @ (end / end.norm()), near / near.max()


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
def test_the_network_is_the_published_arithmetic(state, dtype, tolerance):
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(3, 3, TINY.image, TINY.image, generator=generator, dtype=dtype)
    prompts = torch.randint(0, TINY.words - 1, (3, TINY.context), generator=generator)
    condition = torch.randint(0, TINY.words - 1, (1, TINY.context), generator=generator)
    for row, end in zip(prompts, (5, 12, 19), strict=True):
        row[end:] = TINY.words - 1
    condition[0, 9:] = TINY.words - 1
    exact = {name: value.to(dtype) if value.is_floating_point() else value for name, value in state.items()}
    for threshold in (0.3, 0.8):
        network = mps.mps_network(state, "weights", threshold, HEADS).to(dtype)
        pairs = [score_one(exact, p, t, condition[0], threshold) for p, t in zip(pixels, prompts, strict=True)]
        near = torch.stack([near for _, near in pairs])
        assert ((near > 0.3) != (near > 0.8)).any()  # words on which the thresholds disagree
        expected = torch.stack([score for score, _ in pairs])
        torch.testing.assert_close(network(pixels, prompts, condition), expected, atol=tolerance, rtol=tolerance)


@torch.no_grad()
@pytest.mark.parametrize("prefix", ["", "mps."])
def test_the_scorer_prepares_and_tokenises_as_published(state, clip_dir, tmp_path, pictures, monkeypatch, prefix):
    from transformers import CLIPTokenizer

    save_file({prefix + k: v.contiguous() for k, v in state.items()}, tmp_path / "model.safetensors")
    monkeypatch.setattr(mps.mps_network, "__defaults__", (HEADS,))
    scorer = mps.MPS(str(tmp_path), tokenizer=str(clip_dir))
    assert scorer.network.threshold == 0.3
    prompts = ["a red fox", "b", "", "a very long prompt that does not fit the context", "b"]
    tokenizer = CLIPTokenizer.from_pretrained(clip_dir)
    options = {"padding": "max_length", "truncation": True, "max_length": TINY.context, "return_tensors": "pt"}
    words = (
        "light, color, clarity, tone, style, ambiance, artistry, shape, face, hair, hands, limbs, structure, instance, "
        "texture, quantity, attributes, position, number, location, word, things."
    )
    condition = tokenizer([words], **options).input_ids[0]
    tokens = tokenizer(prompts, **options).input_ids
    pixels = clip_pixels(pictures, TINY.image, crop)
    expected = torch.stack([score_one(state, p, t, condition, 0.3)[0] for p, t in zip(pixels, tokens, strict=True)])
    scores = scorer.score(pictures, prompts)
    torch.testing.assert_close(scores, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(scorer.score(pictures[:1], prompts[:1]), scores[:1], atol=1e-5, rtol=1e-5)
    assert scorer.score([], []).shape == (0,)


@torch.no_grad()
def test_every_released_tensor_has_its_place_and_shape():
    """CLIP-H and the four layers at their full size, on the meta device, where the layers also run."""
    from transformers import CLIPModel

    clip, layers = mps.split_mps(on_meta(shapes(Sizes())))
    config = mps.clip_config(clip, 16)
    with torch.device("meta"):
        model = CLIPModel(config)
    assert {k: v.shape for k, v in clip.items()} == {k: v.shape for k, v in model.state_dict().items()}
    assert (config.vision_config.image_size, config.text_config.max_position_embeddings) == (224, 77)
    read = MpsLayers(layers)
    assert set(read.state_dict()) == {name.replace(".", "_") for name in layers}
    image, words = torch.empty(2, 257, 1024, device="meta"), torch.empty(2, 77, 1024, device="meta")
    assert read(image, words, torch.empty(2, 77, dtype=torch.bool, device="meta")).shape == image.shape


def test_tensors_without_a_place_and_missing_ones_are_named(state):
    for name in ("head.weight", "cross_model.layers.0.1.fn.gate.weight"):
        with pytest.raises(ScorerError, match=name):
            mps.split_mps({**state, name: torch.zeros(1)})
    for name, error in (("cross_model.layers.1.1.fn.attn_out.weight", ScorerError), ("model.logit_scale", ModelError)):
        without = {k: v for k, v in state.items() if k != name}
        with pytest.raises(error, match=name.split(".", 3)[-1].removeprefix("model.")):
            mps.mps_network(without, "weights", 0.3, HEADS)
    with pytest.raises(ScorerError, match=r"hf download nobody/none model\.safetensors"):
        load_scorer("mps=nobody/none")
