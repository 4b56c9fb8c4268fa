from __future__ import annotations

import pytest
import torch
from torch import nn

from diffalign.rewards import Scorer, ScorerError, load_scorer, scorer_names, tie_of
from diffalign.rewards.aesthetic import WIDTHS, Aesthetic
from diffalign.rewards.clip_score import ClipScore
from diffalign.rewards.pickscore import PickScore


@pytest.fixture
def cosine(clip_dir, processor, pictures, prompts):
    """Image-text cosines by CLIPModel's own forward and transformers' own processing."""
    from transformers import CLIPModel, CLIPTokenizer

    model = CLIPModel.from_pretrained(clip_dir).eval()
    tokens = CLIPTokenizer.from_pretrained(clip_dir)(
        prompts, padding=True, truncation=True, max_length=12, return_tensors="pt"
    )
    with torch.no_grad():
        out = model(**processor(pictures, return_tensors="pt"), **tokens)
    return (out.image_embeds * out.text_embeds).sum(-1), model.logit_scale.detach().exp(), out.image_embeds


def test_clip_score_is_100_times_the_cosine(clip_dir, pictures, prompts, cosine):
    torch.testing.assert_close(ClipScore(str(clip_dir)).score(pictures, prompts), 100 * cosine[0], atol=1e-4, rtol=0)


def test_pickscore_is_the_scaled_cosine(clip_dir, pictures, prompts, cosine):
    score = PickScore(str(clip_dir)).score(pictures, prompts)
    torch.testing.assert_close(score, cosine[1] * cosine[0], atol=1e-4, rtol=0)


def test_pickscore_takes_another_tokenizer_when_its_folder_has_none(clip_dir, tmp_path, pictures, prompts, cosine):
    for file in ("config.json", "model.safetensors"):
        (tmp_path / file).symlink_to(clip_dir / file)
    score = PickScore(str(tmp_path), tokenizer=str(clip_dir)).score(pictures, prompts)
    torch.testing.assert_close(score, cosine[1] * cosine[0], atol=1e-4, rtol=0)


def test_scores_do_not_depend_on_the_batch(clip_dir, pictures, prompts):
    scorer = ClipScore(str(clip_dir))
    together = scorer.score(pictures * 8, prompts * 8)  # 40 images: more than one batch
    alone = torch.cat([scorer.score([p], [t]) for p, t in zip(pictures, prompts, strict=True)])
    torch.testing.assert_close(together, alone.repeat(8), atol=1e-4, rtol=0)
    assert scorer.score([], []).shape == (0,)


@pytest.fixture
def head_file(tmp_path):
    """The published layout: five linear layers in a Sequential with three dropouts between."""
    torch.manual_seed(1)
    inputs = (16, *WIDTHS[:-1])
    linear = [nn.Linear(i, o) for i, o in zip(inputs, WIDTHS, strict=True)]
    layers = nn.Sequential(
        linear[0], nn.Dropout(), linear[1], nn.Dropout(), linear[2], nn.Dropout(), linear[3], linear[4]
    ).eval()
    file = tmp_path / "aesthetic-model.pth"
    torch.save({f"layers.{key}": value for key, value in layers.state_dict().items()}, file)
    return file, layers


def test_aesthetic_is_the_published_head_on_unit_embeddings(clip_dir, head_file, pictures, prompts, cosine):
    file, layers = head_file
    scorer = Aesthetic(str(file), clip=str(clip_dir))
    torch.testing.assert_close(scorer.score(pictures, prompts), layers(cosine[2]).squeeze(-1), atol=1e-5, rtol=0)
    from_folder = Aesthetic(str(file.parent), clip=str(clip_dir))
    torch.testing.assert_close(from_folder.score(pictures, prompts), scorer.score(pictures, prompts))


def test_aesthetic_head_has_the_published_number_of_parameters():
    sizes = [(i + 1) * o for i, o in zip((768, *WIDTHS[:-1]), WIDTHS, strict=True)]
    assert sum(sizes) == 927_969


def test_a_file_that_is_not_the_head_is_refused(clip_dir, tmp_path):
    file = tmp_path / "other.pth"
    torch.save({"layers.0.weight": torch.zeros(3, 16), "layers.0.bias": torch.zeros(3)}, file)
    with pytest.raises(ScorerError, match="not the aesthetic head"):
        Aesthetic(str(file), clip=str(clip_dir))


def test_number_of_prompts_must_match(clip_dir, pictures):
    with pytest.raises(ScorerError, match="5 images and 1 prompts"):
        ClipScore(str(clip_dir)).score(pictures, ["one"])


def test_unknown_name_gets_the_nearest():
    with pytest.raises(ScorerError, match="did you mean 'pickscore'"):
        load_scorer("pikscore")


@pytest.mark.parametrize(
    ("name", "said"),
    [("pickscore=", "nothing behind '='"), ("world=x", "world takes no path"), ("emoji=x", "takes no path")],
)
def test_a_path_that_is_empty_or_would_not_be_used_is_refused(name, said):
    with pytest.raises(ScorerError, match=said):
        load_scorer(name)


def test_missing_weights_say_what_to_download():
    with pytest.raises(ScorerError, match="hf download nobody/no-such-model"):
        load_scorer("clip=nobody/no-such-model")
    with pytest.raises(ScorerError, match=r"hf download nobody/no-head HPS_v2.1_compressed.pt"):
        load_scorer("hpsv2.1=nobody/no-head")


def test_a_folder_without_weights_is_named(tmp_path):
    with pytest.raises(ScorerError, match=str(tmp_path)):
        load_scorer(f"clip={tmp_path}")


def test_load_scorer_takes_a_path_and_ones_own_class(clip_dir):
    assert load_scorer(f"clip={clip_dir}").name == "clip"
    own = load_scorer(f"{__name__}:Brightness", device="cpu")
    assert isinstance(own, Scorer)
    assert tie_of(own) == 0.01
    with pytest.raises(ScorerError, match="cannot import"):
        load_scorer("no_such_package.judges:Brightness")
    with pytest.raises(ScorerError, match="no `name`"):
        load_scorer("builtins:dict")


class Brightness:
    name = "brightness"

    def __init__(self, device: str) -> None:
        self.device = device

    def score(self, images, prompts):
        return torch.tensor([sum(image.convert("L").getdata()) / 255 for image in images])


def test_every_built_in_name_is_listed():
    assert {"world", "world-accuracy", "pickscore", "hpsv2.1", "clip", "aesthetic"} <= set(scorer_names())
