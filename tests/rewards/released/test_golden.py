"""Scores of the authors' own code on random weights of small sizes: `tests/golden/scorers.json`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from diffalign.rewards.released import hpsv3, imagereward, mps
from diffalign.rewards.released.blip import Heads
from tests.rewards.released import blip as blip_layout
from tests.rewards.released import mps as mps_layout
from tests.rewards.released import qwen as qwen_layout
from tests.rewards.released.weights import random_state

THEIRS = json.loads((Path(__file__).parents[2] / "golden" / "scorers.json").read_text())
BLIP = blip_layout.Sizes(
    vision=48, vision_layers=3, vision_heads=4, image=32, patch=16, text=24, text_layers=3, text_heads=2, words=80
)
MPS = mps_layout.Sizes(
    text=24, text_layers=2, words=54, context=20, vision=32, vision_layers=2, patch=8, image=32, joint=32, layers=3,
    heads=3,
)  # fmt: skip
QWEN = qwen_layout.Sizes(
    width=48, inner=40, layers=3, heads=3, shared=1, words=60, eye=32, eye_layers=2, eye_heads=2, head=(12, 8)
)


def inputs(name: str):
    """Pixels or patches, tokens and masks of a case, by its seed."""
    generator = torch.Generator().manual_seed(THEIRS[name]["seed"])
    if name == "hpsv3":
        grids = torch.tensor([[1, 4, 6], [1, 2, 8]])
        patches = torch.randn(40, 1176, generator=generator)
        ids, mask = torch.full((2, 14), 2), torch.zeros(2, 14, dtype=torch.long)
        for row, count in enumerate((6, 4)):
            tokens = torch.tensor([5, 6, *[0] * count, 7, 8, 9 + row, 59, 3, 4])
            ids[row, : len(tokens)], mask[row, : len(tokens)] = tokens, 1
        return ids, mask, (patches, grids)
    pixels = torch.randn(3, 3, 32, 32, generator=generator)
    if name == "imagereward":
        return (
            pixels,
            torch.randint(5, 80, (3, 9), generator=generator),
            (torch.arange(9) < torch.tensor([9, 4, 6])[:, None]).long(),
        )
    prompts = torch.randint(0, 53, (3, 20), generator=generator)
    condition = torch.randint(0, 53, (1, 20), generator=generator)
    for row, end in zip((*prompts, condition[0]), (5, 12, 19, 9), strict=True):
        row[end:] = 53
    return pixels, prompts, condition


def ours(name: str):
    """The network of a case with its weights."""
    scale = THEIRS[name]["scale"]
    if name == "imagereward":
        return imagereward.blip_reward(random_state(blip_layout.shapes(BLIP), scale=scale), name, Heads(4, 2))
    if name == "mps":
        state = random_state(mps_layout.shapes(MPS), scale=scale)
        return mps.mps_network(state, name, THEIRS[name]["threshold"], heads=2)
    state = random_state(qwen_layout.shapes(QWEN), scale=scale)
    return hpsv3.qwen_reward(state, qwen_layout.config(QWEN), name, torch.float32)


@torch.no_grad()
@pytest.mark.parametrize("name", ["imagereward", "mps", "hpsv3"])
def test_scores_are_those_of_the_authors_code(name: str) -> None:
    places = ((0, 59),) if name == "hpsv3" else ()
    expected = torch.tensor(THEIRS[name]["scores"])
    assert expected.std() > 0.01  # scores that depend on the input
    torch.testing.assert_close(ours(name)(*inputs(name), *places), expected, atol=1e-4, rtol=1e-4)
