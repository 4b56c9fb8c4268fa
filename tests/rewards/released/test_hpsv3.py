"""HPSv3 against its published arithmetic, restated in plain torch on random weights of the released layout.

In float64 both agree to 1e-6 only: transformers rounds rotations and RMS norms to float32.
"""

from __future__ import annotations

import hashlib
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from diffalign.rewards import ScorerError, load_scorer
from diffalign.rewards.released import hpsv3
from diffalign.rewards.released.qwen import PIXELS, patches_of, sides, split_qwen
from tests.rewards.released.qwen import Sizes, config, mu_sigma, shapes
from tests.rewards.released.weights import on_meta, random_state

WORDS = ["<|image_pad|>", "<|im_start|>", "<|im_end|>", *"abcdefghijklmnopqrstuvwxyz :.-{}\n"]
TINY = Sizes(
    width=24, inner=40, layers=2, heads=3, shared=1, words=len(WORDS) + 1,
    eye=32, eye_layers=2, eye_heads=2, head=(12, 8),
)  # fmt: skip
COLLATOR = (
    'import nowhere\n\nINSTRUCTION = """rate {text_prompt}\n"""\nprompt_with_special_token = " r: <|Reward|>\\nend"\n'
)
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for part in m.content %}"
    "{% if part.type == 'image' %}<|image_pad|>{% else %}{{ part.text }}{% endif %}{% endfor %}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant{% endif %}"
)


@pytest.fixture(scope="module")
def state():
    return random_state(shapes(TINY))


@pytest.fixture(scope="module")
def folder(state, tmp_path_factory):
    """Weights, config, a tokenizer of letters and a wording, as a user has them in a folder."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    place = tmp_path_factory.mktemp("hpsv3")
    save_file(state, place / hpsv3.FILE)
    config(TINY).save_pretrained(place)
    letters = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="-"))
    letters.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=letters, pad_token="-", extra_special_tokens=WORDS[:3])
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(place)
    (place / "data_collator_qwen.py").write_text(COLLATOR)
    return place


@pytest.fixture
def wording(monkeypatch):
    text = "rate {text_prompt}\n r: <|Reward|>\nend"
    monkeypatch.setattr(hpsv3, "WORDING_SHA256", hashlib.sha256(text.encode()).hexdigest())


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-4)])
def test_the_score_is_the_published_arithmetic(state, folder, wording, dtype, tolerance):
    scorer = hpsv3.HPSv3(str(folder), dtype=dtype)
    scorer.network.head.to(dtype)
    images = [Image.new("RGB", (60, 40), (90, 10, 200)), noise(500, 300), noise(31, 64)]
    prompts = ["a fox", "{two} cats in the snow", ""]
    exact = {name: value.to(dtype) for name, value in state.items()}
    expected = []
    for image, prompt in zip(images, prompts, strict=True):
        patches, grid = patches_of(image)
        seen = scorer.network.vision(patches.to(dtype), grid_thw=grid[None]).pooler_output  # transformers' own
        text = f"rate {prompt}\n r: <|Reward|>\nend"
        before, after = text.split("<|Reward|>")
        rows = [number(p) for p in ("<|im_start|>", "user\n", "IMAGE", before, "REWARD", after, "<|im_end|>")]
        rows += [number("<|im_start|>"), number("assistant")]
        rows[2], rows[4] = [0] * len(seen), [len(WORDS)]
        tokens = torch.tensor([token for part in rows for token in part])
        embedded = exact["model.embed_tokens.weight"][tokens]
        embedded[tokens == 0] = seen
        expected.append(mu_sigma(exact, TINY, embedded, int((tokens == len(WORDS)).nonzero())))
    scores = scorer.score(images, prompts)
    torch.testing.assert_close(scores, torch.stack(expected)[:, 0], atol=tolerance, rtol=tolerance)
    assert torch.stack(expected)[:, 0].std() > 1e-3
    torch.testing.assert_close(scorer.score(images[:1], prompts[:1]), scores[:1], atol=tolerance, rtol=tolerance)
    assert scorer.score([], []).shape == (0,)


def number(text):
    """Tokens of a piece of text: one for a special token, else one a letter."""
    return [WORDS.index(text)] if text in WORDS else [WORDS.index(c) if c in WORDS else WORDS.index("-") for c in text]


def noise(width, height):
    return Image.fromarray(np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8))


def test_patches_are_those_of_transformers_processor():
    module = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")
    processor = module.Qwen2VLImageProcessorPil(min_pixels=3136, max_pixels=12845056)  # of Qwen2-VL-7B-Instruct
    for width, height in ((1024, 1024), (512, 512), (448, 448), (640, 360), (30, 700), (17, 16), (1344, 768)):
        assert sides(height, width) == module.smart_resize(height, width, 28, PIXELS, PIXELS)
        image = noise(width, height)
        patches, grid = patches_of(image)
        theirs = processor(images=[image.resize(sides(height, width)[::-1])], return_tensors="pt")
        assert grid.tolist() == theirs["image_grid_thw"][0].tolist()
        torch.testing.assert_close(patches, theirs["pixel_values"], atol=1e-5, rtol=0)
    with pytest.raises(ScorerError, match="2010 x 10 pixels"):
        sides(10, 2010)


@pytest.mark.parametrize("layout", [("model.", "visual."), ("model.language_model.", "model.visual.")])
def test_every_released_tensor_has_its_place_and_shape(layout):
    """Qwen2-VL-7B and the head at their full size, on the meta device, in both layouts of transformers."""
    from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel, Qwen2VLTextModel

    size = Sizes()
    released = on_meta(shapes(size, *layout))
    bytes_ = sum((4 if "rm_head" in name else 2) * value.numel() for name, value in released.items())
    assert bytes_ / 1e9 == pytest.approx(16.6, abs=0.05)  # the size of HPSv3.safetensors on the Hub
    vision, text, head = split_qwen(released)
    whole = config(size)
    with torch.device("meta"):
        models = Qwen2VisionTransformerPretrainedModel(whole.vision_config), Qwen2VLTextModel(whole.text_config)
    for ours, theirs in zip((vision, text), models, strict=True):
        assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    assert [tuple(head[f"{i}.weight"].shape) for i in (0, 3, 5)] == [(1024, 3584), (16, 1024), (2, 16)]


def test_the_wording_comes_from_the_authors_file_and_is_never_run(folder, wording, tmp_path, monkeypatch):
    expected = ("rate {text_prompt}\n", " r: <|Reward|>\nend")
    assert hpsv3.read_wording(folder) == expected  # its first line would raise if it ran
    with zipfile.ZipFile(tmp_path / hpsv3.WHEEL, "w") as wheel:
        wheel.writestr("hpsv3/dataset/data_collator_qwen.py", COLLATOR)
    assert hpsv3.read_wording(tmp_path) == expected
    (tmp_path / hpsv3.WORDING).write_text(COLLATOR.replace("rate", "judge"))
    with pytest.raises(ScorerError, match=r"not that of the release 1\.0\.0"):
        hpsv3.read_wording(tmp_path)
    with pytest.raises(ScorerError, match=r"pip download --no-deps hpsv3==1\.0\.0"):
        load_scorer("hpsv3=nobody/none")


def test_what_does_not_fit_is_named(state, folder, wording):
    with pytest.raises(ScorerError, match=r"'score\.weight'"):
        split_qwen({**state, "score.weight": torch.zeros(1)})
    with pytest.raises(ScorerError, match=r"another reward head.*'0\.weight'"):
        hpsv3.reward_head({"0.weight": torch.zeros(2, 24), "0.bias": torch.zeros(2)}, "weights")
    with pytest.raises(ScorerError, match=r"has 40 embeddings, and <\|Reward\|> is token 36"):
        hpsv3.places_of(hpsv3.load_base(str(folder))[0], 40, "weights")
    scorer = hpsv3.HPSv3(str(folder), dtype=torch.float32)
    with pytest.raises(ScorerError, match=r"cannot read the prompt 'a <\|image_pad\|>'"):
        scorer.check_prompts(["a", "a <|image_pad|>"])
