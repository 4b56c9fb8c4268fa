"""LAION aesthetic predictor v2: five linear layers on unit CLIP-L image embeddings; the prompt is not used.

Head: github.com/christophschuhmann/improved-aesthetic-predictor (sac+logos+ava1-l14-linearMSE), 927,969
parameters, no activation between the layers. Scores follow the 1 to 10 scale of its raters. A preference run
that raises only this score is probably painting the same image everywhere: read it beside diversity.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL.Image import Image
from torch import Tensor, nn

from diffalign.rewards.base import ScorerError, check_lengths
from diffalign.rewards.clip import hub_file, load_clip, load_state

HEAD_REPO, HEAD_FILE = "trl-lib/ddpo-aesthetic-predictor", "aesthetic-model.pth"
WIDTHS = (1024, 128, 64, 16, 1)


class Aesthetic:
    """About 4 to 7 on ordinary images. `path` is the head (a file, a folder or a Hub id)."""

    name = "aesthetic"
    span = (1.0, 10.0)  # the ratings that the head was trained on

    def __init__(
        self, path: str = HEAD_REPO, *, clip: str = "openai/clip-vit-large-patch14", device: str = "cpu"
    ) -> None:
        self.clip = load_clip(clip, clip, device)
        self.embed_images = self.clip.embed_images
        file = hub_file(path, HEAD_FILE)
        self.head = linear_head(load_state(file), str(file), "the aesthetic head")

    @torch.no_grad()
    def score(self, images: Sequence[Image], prompts: Sequence[str]) -> Tensor:
        """The predicted rating, [n]; prompts are ignored."""
        check_lengths(self.name, images, prompts)
        return self.head(self.clip.embed_images(images)).squeeze(-1)


def linear_head(state: dict[str, Tensor], where: str, what: str) -> nn.Sequential:
    """The head from a published state dict, whose layers are numbered with the dropouts of training between.

    Raises ScorerError for another structure; `where` and `what` name the file and the head in it.
    """
    weights = [state[key] for key in sorted(state) if key.endswith(".weight")]  # layers.0, .2, .4, .6, .7
    biases = [state[key] for key in sorted(state) if key.endswith(".bias")]
    if tuple(len(weight) for weight in weights) != WIDTHS or len(biases) != len(weights):
        found = {key: tuple(value.shape) for key, value in state.items()}
        raise ScorerError(f"{where} is not {what}: expected five linear layers {WIDTHS}, found {found}")
    layers = []
    for weight, bias in zip(weights, biases, strict=True):
        layer = nn.Linear(weight.shape[1], weight.shape[0])
        layer.load_state_dict({"weight": weight.float(), "bias": bias.float()})
        layers.append(layer)
    return nn.Sequential(*layers).requires_grad_(False)
