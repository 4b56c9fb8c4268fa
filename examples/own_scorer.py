"""Score images with a scorer of your own: here, how colourful an image is.

    python examples/own_scorer.py

On the command line it is `--scorer own_scorer:Colourfulness`, with the folder of this file on PYTHONPATH.
"""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

from diffalign import Sampling, generate
from diffalign.world import base_path
from diffalign.world.captions import prompts


class Colourfulness:
    """Hasler and Suesstrunk's measure (2003) of an RGB image: 0 is grey, about 100 extremely colourful."""

    name = "colourfulness"

    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> torch.Tensor:
        """The colourfulness of each image, float [n]; the prompts are not used."""
        return torch.tensor([self._one(np.asarray(image.convert("RGB"), dtype=np.float64)) for image in images])

    @staticmethod
    def _one(rgb: np.ndarray) -> float:
        red, green, blue = rgb[..., 0], rgb[..., 1], rgb[..., 2]
        rg, yb = red - green, (red + green) / 2 - blue
        return float(np.hypot(rg.std(), yb.std()) + 0.3 * np.hypot(rg.mean(), yb.mean()))


def main(out_dir: str = "runs/examples/own_scorer", steps: int = 10) -> torch.Tensor:
    """Generates an image for each of four prompts with the small model of the package, and returns the scores."""
    images = generate(
        str(base_path()), prompts("heldout")[:4], [0], out_dir=out_dir, sampling=Sampling(num_inference_steps=steps)
    )
    opened = [Image.open(image.file) for image in images]
    return Colourfulness().score(opened, [image.prompt for image in images])


if __name__ == "__main__":
    print(main())
