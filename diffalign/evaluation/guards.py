"""What a higher reward may have cost: variety between seeds, and the look of the images.

Faithfulness, the third guard, is a scorer like any other (world-accuracy, clip) and is compared by `stats`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

SMALL = 64  # pixels: larger images are shrunk first, so that distance means layout and colour, not grain

Embed = Callable[[Sequence[Image.Image]], Tensor]  # images -> features "n d"


@dataclass(frozen=True)
class Look:
    """Averages over images; a tuned model far from the base here has changed style, whatever it scores."""

    saturation: float  # mean of (largest - smallest RGB channel), 0 to 1
    sharpness: float  # mean absolute difference of neighbouring pixels' luminance, 0 to 1
    brightness: float  # mean luminance, 0 to 1


def look(images: Sequence[Image.Image]) -> Tensor:
    """Saturation, sharpness and brightness of each image at full size, "n 3"."""
    values = []
    for image in images:
        rgb = np.asarray(image.convert("RGB"), np.float32) / 255
        grey = rgb @ np.array([0.299, 0.587, 0.114], np.float32)
        edges = (np.abs(np.diff(grey, axis=0)).mean() + np.abs(np.diff(grey, axis=1)).mean()) / 2
        values.append([(rgb.max(2) - rgb.min(2)).mean(), edges, grey.mean()])
    return torch.tensor(np.array(values), dtype=torch.float64)


def pixel_features(images: Sequence[Image.Image]) -> Tensor:
    """Images of one size, shrunk to 64 pixels, as vectors "n d" whose distance is the RMS pixel difference."""
    flat = torch.from_numpy(np.stack([_small(image) for image in images])).flatten(1).float() / 255
    return flat / flat.shape[1] ** 0.5


def mean_distance(features: Tensor) -> float:
    """Mean Euclidean distance of two of the images "n d" of one prompt; 0 for a single image.

    With `pixel_features` 0 to 1; with unit vectors (a scorer's `embed_images`) sqrt(2 - 2 cos).
    """
    distances = torch.nn.functional.pdist(features.double())
    return float(distances.mean()) if len(distances) else 0.0


def _small(image: Image.Image) -> np.ndarray:
    if max(image.size) > SMALL:
        scale = SMALL / max(image.size)
        width, height = (max(1, round(side * scale)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BOX)
    return np.asarray(image.convert("RGB"))
