"""Scorers for tests, named `tests.sources.judges:Class` in configs."""

from __future__ import annotations

import numpy as np
import torch


class Brightness:
    """The mean of all pixels; does not read the prompt."""

    name = "brightness"

    def score(self, images, prompts):
        return torch.tensor([float(np.asarray(image).mean()) for image in images])


class Indifferent:
    """Every image is as good as any other."""

    name = "indifferent"

    def score(self, images, prompts):
        return torch.zeros(len(images))


class Broken(Indifferent):
    """Not a number."""

    name = "broken"

    def score(self, images, prompts):
        return torch.full((len(images),), torch.nan)
