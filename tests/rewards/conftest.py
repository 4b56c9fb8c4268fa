"""A tiny random CLIPModel with its tokenizer in a folder, as the real scorers load it."""

from __future__ import annotations

import json
import string

import pytest
import torch


@pytest.fixture(scope="session")
def clip_dir(tmp_path_factory):
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

    folder = tmp_path_factory.mktemp("clip")
    letters = [*string.ascii_lowercase, *(f"{letter}</w>" for letter in string.ascii_lowercase)]
    vocabulary = {token: i for i, token in enumerate([*letters, "<|startoftext|>", "<|endoftext|>"])}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    CLIPTokenizer.from_pretrained(str(folder)).save_pretrained(folder)
    tower = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    CLIPModel(
        CLIPConfig(
            text_config={
                **tower,
                "vocab_size": len(vocabulary),
                "max_position_embeddings": 12,
                "eos_token_id": vocabulary["<|endoftext|>"],
                "pad_token_id": vocabulary["<|endoftext|>"],
            },
            vision_config={**tower, "image_size": 32, "patch_size": 8},
            projection_dim=16,
        )
    ).save_pretrained(folder)
    return folder


@pytest.fixture
def pictures():
    """Five images of different shapes, none of them CLIP's size."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    shapes = [(40, 60, 3), (60, 40, 3), (33, 32, 3), (16, 16, 3), (100, 50, 3)]
    return [Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)) for shape in shapes]


@pytest.fixture
def prompts():
    return ["a red fox", "two cats", "a red fox", "snow", "a very long prompt that does not fit the context"]


@pytest.fixture
def processor():
    """transformers' own CLIP image processing with PIL, at the tiny model's size."""
    module = pytest.importorskip("transformers.models.clip.image_processing_pil_clip")
    return module.CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
