"""The renaming of weights to CLIPModel, against a small CLIP with torch's attention in open_clip's layout."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
from torch import nn

from diffalign.rewards import ScorerError, hpsv21
from diffalign.rewards.preprocess import clip_pixels, pad

HEADS = 2


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, HEADS, batch_first=True)
        self.mlp = nn.Sequential(
            OrderedDict(c_fc=nn.Linear(width, 2 * width), gelu=nn.GELU(), c_proj=nn.Linear(2 * width, width))
        )

    def forward(self, x, mask=None):
        h = self.ln_1(x)
        x = x + self.attn(h, h, h, attn_mask=mask, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


class Tower(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(Block(width) for _ in range(2))

    def forward(self, x, mask=None):
        for block in self.resblocks:
            x = block(x, mask)
        return x


class Visual(nn.Module):
    def __init__(self, width: int, embed: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 8, 8, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(width))
        self.positional_embedding = nn.Parameter(torch.randn(17, width))
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = Tower(width)
        self.proj = nn.Parameter(torch.randn(width, embed))

    def forward(self, pixels):
        x = self.conv1(pixels).flatten(2).mT
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], 1) + self.positional_embedding
        return self.ln_post(self.transformer(self.ln_pre(x))[:, 0]) @ self.proj


class OpenClip(nn.Module):
    def __init__(self, vocabulary: int, context: int, width: int = 24, embed: int = 16) -> None:
        super().__init__()
        self.visual = Visual(32, embed)
        self.token_embedding = nn.Embedding(vocabulary, width)
        self.positional_embedding = nn.Parameter(torch.randn(context, width))
        self.transformer = Tower(width)
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.randn(width, embed))
        self.logit_scale = nn.Parameter(torch.tensor(3.0))

    def encode_text(self, ids):
        mask = torch.full((ids.shape[1],) * 2, float("-inf")).triu(1)
        x = self.transformer(self.token_embedding(ids) + self.positional_embedding, mask)
        x = self.ln_final(x)[torch.arange(len(ids)), ids.argmax(-1)]  # end-of-text has the largest id
        return x @ self.text_projection


@pytest.fixture
def reference():
    torch.manual_seed(0)
    model = OpenClip(vocabulary=54, context=77).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms too: a wrong place must show
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@torch.no_grad()
def test_score_is_the_cosine_of_the_open_clip_model(reference, clip_dir, tmp_path, pictures, prompts, monkeypatch):
    from transformers import CLIPTokenizer

    file = tmp_path / "HPS_v2.1_compressed.pt"
    torch.save({"state_dict": reference.state_dict()}, file)
    monkeypatch.setattr(hpsv21, "HEADS", HEADS)
    scorer = hpsv21.HPSv21(str(file), tokenizer=str(clip_dir))

    tokens = CLIPTokenizer.from_pretrained(clip_dir)(
        prompts, padding="max_length", truncation=True, max_length=77, return_tensors="pt"
    )
    image = nn.functional.normalize(reference.visual(clip_pixels(pictures, 32, pad)), dim=-1)
    text = nn.functional.normalize(reference.encode_text(tokens.input_ids), dim=-1)
    torch.testing.assert_close(scorer.score(pictures, prompts), (image * text).sum(-1), atol=1e-5, rtol=0)
    torch.testing.assert_close(scorer.embed_images(pictures), image, atol=1e-5, rtol=0)


def test_missing_and_foreign_tensors_are_named(reference):
    state = reference.state_dict()
    with pytest.raises(ScorerError, match="ema_step"):
        hpsv21.clip_from_open_clip({**state, "ema_step": torch.zeros(1)}, HEADS)
    del state["visual.ln_pre.bias"]
    with pytest.raises(ScorerError, match=r"pre_layrnorm\.bias"):
        hpsv21.clip_from_open_clip(state, HEADS)
    with pytest.raises(ScorerError, match="not an open_clip ViT checkpoint"):
        hpsv21.clip_from_open_clip({"weight": torch.zeros(1)}, HEADS)


@torch.no_grad()
def test_open_clip_itself_agrees(pictures):
    """Exact pixels and 1e-6 in the embeddings with open_clip 3.3.0, where it can be imported."""
    try:
        import open_clip
        from open_clip.transform import image_transform
    except Exception as error:  # a torchvision of another build fails with RuntimeError
        pytest.skip(f"open_clip does not import here: {error}")
    torch.manual_seed(0)
    theirs = open_clip.model.CLIP(
        embed_dim=32,
        vision_cfg={"layers": 2, "width": 64, "head_width": 32, "patch_size": 8, "image_size": 32},
        text_cfg={"context_length": 77, "vocab_size": 49408, "width": 48, "heads": HEADS, "layers": 2},
    ).eval()
    ours = hpsv21.clip_from_open_clip(theirs.state_dict(), HEADS).eval()
    pixels = clip_pixels(pictures, 32, pad)
    transform = image_transform(32, is_train=False, resize_mode="longest")
    assert torch.equal(pixels, torch.stack([transform(picture) for picture in pictures]))
    image = ours.visual_projection(ours.vision_model(pixel_values=pixels).pooler_output)
    torch.testing.assert_close(image, theirs.encode_image(pixels), atol=1e-5, rtol=0)
    ids = open_clip.get_tokenizer("ViT-H-14")(["a red fox", "two cats in the snow"])
    text = ours.text_projection(ours.text_model(input_ids=ids).pooler_output)
    torch.testing.assert_close(text, theirs.encode_text(ids), atol=1e-5, rtol=0)
