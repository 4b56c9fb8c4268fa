"""ImageReward against its published arithmetic, restated in plain torch on random weights of the released layout."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from diffalign.errors import ModelError
from diffalign.rewards import ScorerError, load_scorer
from diffalign.rewards.preprocess import CLIP_MEAN, CLIP_STD, centre_crop, clip_pixels
from diffalign.rewards.released import imagereward
from diffalign.rewards.released.blip import Heads, split_blip, text_config, vision_config
from tests.rewards.released.blip import TINY, Sizes, reward, shapes
from tests.rewards.released.weights import on_meta, random_state

HEADS = Heads(TINY.vision_heads, TINY.text_heads)


@pytest.fixture(scope="module")
def state():
    return random_state(shapes(TINY))


@pytest.fixture(scope="module")
def bert_dir(tmp_path_factory):
    """A tokenizer with the special tokens at BERT's places and one token a letter."""
    folder = tmp_path_factory.mktemp("bert")
    letters = [sign + letter for letter in "abcdefghijklmnopqrstuvwxy" for sign in ("", "##")]
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters]))
    return folder


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 1e-4)])
def test_the_network_is_the_published_arithmetic(state, dtype, tolerance):
    network = imagereward.blip_reward(state, "weights", HEADS).to(dtype)
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(4, 3, TINY.image, TINY.image, generator=generator, dtype=dtype)
    tokens = torch.randint(5, TINY.words, (4, 9), generator=generator)
    mask = (torch.arange(9) < torch.tensor([9, 4, 1, 7])[:, None]).long()
    exact = {name: value.to(dtype) if value.is_floating_point() else value for name, value in state.items()}
    expected = reward(exact, TINY, pixels, tokens, mask)
    assert expected.std() > 0.1  # weights of which the reward depends on the input
    torch.testing.assert_close(network(pixels, tokens, mask), expected, atol=tolerance, rtol=tolerance)


@torch.no_grad()
@pytest.mark.parametrize("suffix", ["ImageReward.pt", "model.safetensors"])
def test_the_scorer_tokenises_and_prepares_as_published(state, bert_dir, tmp_path, pictures, monkeypatch, suffix):
    from safetensors.torch import save_file

    (save_file if suffix.endswith("safetensors") else torch.save)(
        {name: value.contiguous() for name, value in state.items()}, tmp_path / suffix
    )
    monkeypatch.setattr(imagereward, "Heads", lambda: HEADS)
    scorer = imagereward.ImageReward(str(tmp_path), tokenizer=str(bert_dir))
    prompts = ["a bee", "[ENC] a", "b" * 99, "", "a bee"]
    vocabulary = (bert_dir / "vocab.txt").read_text().split("\n")
    number = {token: i for i, token in enumerate([*vocabulary, "[DEC]", "[ENC]"])}
    words = [["a", "b", "##e", "##e"], ["[ENC]", "a"], ["b"] + ["##b"] * 32, [], ["a", "b", "##e", "##e"]]
    tokens, mask = torch.zeros(5, 35, dtype=torch.int64), torch.zeros(5, 35, dtype=torch.int64)
    for row, word in enumerate(words):
        ids = [number[token] for token in ["[CLS]", *word, "[SEP]"]]
        tokens[row, : len(ids)], mask[row, : len(ids)] = torch.tensor(ids), 1
    assert mask[2].all()  # cut to 35 tokens with its end

    expected = reward(state, TINY, clip_pixels(pictures, TINY.image, centre_crop), tokens, mask)
    torch.testing.assert_close(scorer.score(pictures, prompts), expected, atol=1e-4, rtol=1e-4)
    assert scorer.score([], []).shape == (0,)


def test_every_released_tensor_has_its_place_and_shape():
    """ViT-L/16 and BERT at their full size, on the meta device."""
    from transformers.models.blip.modeling_blip import BlipVisionModel
    from transformers.models.blip.modeling_blip_text import BlipTextModel

    released = shapes(Sizes())
    gigabytes = 4 * sum(np.prod(shape, dtype=np.int64) for shape in released.values()) / 1e9
    assert gigabytes == pytest.approx(1.79, abs=0.005)  # the size of ImageReward.pt on the Hub
    parts = split_blip(on_meta(released))
    with torch.device("meta"):
        vision = BlipVisionModel(vision_config(parts.vision, 16))
        text = BlipTextModel(text_config(parts.text, 12), add_pooling_layer=False)
    for ours, theirs in ((parts.vision, vision), (parts.text, text)):
        assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    assert vision.config.image_size == 224


def test_the_centre_crop_is_torchvisions(pictures):
    """Bicubic to the shortest side, then the rounded centre (half to even), mean and deviation by channel."""
    odd = [*pictures, Image.fromarray(np.random.default_rng(1).integers(0, 256, (35, 32, 3), dtype=np.uint8))]
    for picture, pixels in zip(odd, clip_pixels(odd, 32, centre_crop), strict=True):
        width, height = picture.size
        size = (32, int(32 * height / width)) if width <= height else (int(32 * width / height), 32)
        whole = np.asarray(picture.resize(size, Image.Resampling.BICUBIC), dtype=np.float64) / 255
        left, top = int(round((size[0] - 32) / 2.0)), int(round((size[1] - 32) / 2.0))  # noqa: RUF046
        cut = (whole[top : top + 32, left : left + 32] - CLIP_MEAN) / CLIP_STD
        np.testing.assert_allclose(pixels.permute(1, 2, 0), cut, atol=1e-6)


def test_tensors_without_a_place_or_with_another_shape_are_named(state, tmp_path):
    with pytest.raises(ScorerError, match=r"visual_encoder\.blocks\.0\.ls1"):
        split_blip({**state, "blip.visual_encoder.blocks.0.ls1": torch.zeros(1)})
    with pytest.raises(ScorerError, match="'optimizer'"):
        split_blip({**state, "optimizer": torch.zeros(1)})
    without = {k: v for k, v in state.items() if k != "blip.text_encoder.encoder.layer.1.output.dense.bias"}
    with pytest.raises(ModelError, match=r"layer\.1\.output\.dense\.bias"):
        imagereward.blip_reward(without, "weights", HEADS)
    with pytest.raises(ScorerError, match="weights is not ImageReward's state dict"):
        imagereward.blip_reward({"blip.vision_proj.weight": torch.zeros(1)}, "weights", HEADS)
    with pytest.raises(ScorerError, match=r"hf download nobody/none ImageReward\.pt"):
        load_scorer("imagereward=nobody/none")
